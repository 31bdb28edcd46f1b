"""Compare the fused kernels of a training layer with fp64, on a GPU or in the interpreter."""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytest.importorskip("triton")

from benchmarks.lease.switches import each_sequence
from expo_fast.kernels import fused, training_layer
from expo_fast.modeling import attention, lora, modules, rope
from expo_fast.modeling.attention import PackedAttention
from expo_fast.modeling.decoder import Block, Decoder
from expo_fast.op_backends import native_layer
from judges import error_norm, values_and_gradients
from poison import poisoned_tensors
from tiny import tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.bfloat16, torch.float16]
Function = Callable[..., Tensor | tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the 16-bit kernels on a CPU too, and fill new memory with NaN."""
    if DEVICE == "cpu":
        monkeypatch.setattr(fused, "runs", lambda *x: all(y.dtype in HALVES for y in x))
    with poisoned_tensors():
        yield


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run packs on a CPU by the code path of a GPU."""
    if DEVICE == "cpu":
        monkeypatch.setattr(attention, "varlen_attention", each_sequence)
        monkeypatch.setattr(PackedAttention, "__call__", PackedAttention._varlen)


def normal(*size: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(size))
    return (2 * torch.randn(*size, generator=g)).to(DEVICE, dtype)


def require_near(
    ours: Function, plain: Function, inputs: Sequence[Tensor], upstream: Sequence[Tensor]
) -> None:
    """Assert that errors of values and gradients are at most twice those of plain PyTorch."""
    dtype = inputs[0].dtype
    got = values_and_gradients(ours, inputs, upstream)
    near = values_and_gradients(plain, inputs, upstream)
    truth = values_and_gradients(plain, inputs, upstream, torch.float64)
    for g, n, t in zip(got, near, truth, strict=True):
        assert g.dtype == n.dtype
        # plain PyTorch's error may be 0 by chance, so half a unit in the last place is allowed
        allowed = 2 * error_norm(n, t) + torch.finfo(dtype).eps / 2 * t.norm().item()
        assert error_norm(g, t) <= allowed


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def plain_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.to(q.dtype), sin.to(q.dtype)
    return rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)


def angles(n: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    turn = torch.rand(n, 1, dim // 2, generator=torch.Generator().manual_seed(n)) * 6
    return turn.cos().to(DEVICE, dtype), turn.sin().to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [(0, 7), (1, 1), (3, 7), (65, 48), (17, 1031), (2, 4864)], ids=str)
def test_swiglu_error_is_at_most_twice_that_of_plain_pytorch(size, dtype):
    gate, up, upstream = (normal(*size, dtype=dtype, seed=i) for i in range(3))
    require_near(modules.swiglu, plain_swiglu, (gate, up), (upstream,))


def test_swiglu_of_large_gates_is_finite():
    gate = torch.tensor([[-300.0, -90, -1, 0, 1, 90, 300]], device=DEVICE).bfloat16()
    up = torch.ones_like(gate)
    got = values_and_gradients(modules.swiglu, (gate, up), (up,))
    expected = values_and_gradients(plain_swiglu, (gate, up), (up,))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=2**-6, atol=1e-30)


def test_swiglu_takes_columns_and_strided_gradients():
    gate, up = normal(33, 2 * 50).split(50, 1)
    upstream = normal(50, 33).T
    require_near(modules.swiglu, plain_swiglu, (gate, up), (upstream,))
    assert torch.equal(modules.swiglu(gate, up), modules.swiglu(gate.clone(), up.clone()))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim", [2, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("n", "heads"), [(0, (4, 2)), (1, (1, 1)), (19, (7, 2))])
def test_rope_equals_plain_pytorch_to_the_bit(n, heads, dim, dtype):
    q, k = (normal(n, h, dim, dtype=dtype) for h in heads)
    upstream = [normal(n, h, dim, dtype=dtype, seed=1) for h in heads]
    rotation = angles(n, dim, dtype)
    found = [
        values_and_gradients(lambda q, k, f=f: f(q, k, *rotation), (q, k), upstream)
        for f in (rope.rotate_heads, plain_rotate)
    ]
    for ours, plain in zip(*found, strict=True):
        assert torch.equal(ours, plain)


def test_rope_error_is_at_most_twice_that_of_plain_pytorch():
    rotation = angles(37, 80, torch.bfloat16)
    given = [normal(37, h, 80) for h in (6, 2)]
    upstream = [normal(37, h, 80, seed=1) for h in (6, 2)]
    require_near(
        lambda q, k: rope.rotate_heads(q, k, *(x.to(q.dtype) for x in rotation)),
        lambda q, k: plain_rotate(q, k, *rotation),
        given,
        upstream,
    )


def test_rope_of_strided_heads_does_not_change_its_inputs():
    wide = normal(21, 10, 64)
    before = wide.clone()
    q, k = wide[:, :6], wide[:, 7:9]
    rotation = angles(21, 64, torch.bfloat16)
    for ours, plain in zip(
        rope.rotate_heads(q, k, *rotation), plain_rotate(q, k, *rotation), strict=True
    ):
        assert torch.equal(ours, plain)
    assert torch.equal(wide, before)


# Segments' lengths and parents: nothing shared, one prefix, parents of parents, an empty segment
TREES = {
    "flat": ((5, 1, 9), (-1, -1, -1)),
    "prefix": ((11, 4, 1, 30), (-1, 0, 0, 0)),
    "parents of parents": ((11, 6, 4, 9, 1, 8, 3, 2), (-1, 0, 0, 1, 1, 2, 2, 6)),
    "empty": ((7, 0, 5, 0), (-1, 0, 1, -1)),
    "many": ((3, 5, *range(1, 20)), (-1, 0, *[1] * 19)),
}


def packed(tree: str) -> PackedAttention:
    lengths, parents = TREES[tree]
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    return PackedAttention(borders, torch.tensor(parents, device=DEVICE))


def rows_by_definition(tree: str) -> list[int]:
    """Return the rows that each segment attends to, token by token."""
    lengths, parents = TREES[tree]
    starts = [0, *accumulate(lengths)]
    rows = []
    for segment in range(len(lengths)):
        chain = []
        while segment >= 0:
            chain.append(segment)
            segment = parents[segment]
        for s in reversed(chain):
            rows += range(starts[s], starts[s + 1])
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("tree", "heads"),
    [
        ("prefix", (2, 64)),
        ("prefix", (1, 1)),
        ("parents of parents", (2, 64)),
        ("parents of parents", (5, 80)),
        ("empty", (2, 64)),
        ("empty", (4, 300)),  # wider than a program
        ("many", (1, 24)),
    ],
)
def test_shared_keys_are_copied_and_their_gradients_summed(tree, heads, dtype):
    pack = packed(tree)
    n = pack.boundaries[-1]
    rows = rows_by_definition(tree)
    copies = pack._visible_keys.copies
    assert copies is not None and copies.rows.tolist() == rows
    k, v = normal(n, *heads, dtype=dtype), normal(n, *heads, dtype=dtype, seed=1)
    upstream = [normal(len(rows), *heads, dtype=dtype, seed=i) for i in (2, 3)]

    def ours(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention.copy_keys(k, v, copies)

    def plain(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k[rows], v[rows]

    require_near(ours, plain, (k, v), upstream)
    got = values_and_gradients(ours, (k, v), upstream)
    assert torch.equal(got[0], k[rows]) and torch.equal(got[1], v[rows])
    # fp32 sums, rounded once
    for grad, u in zip(got[2:], upstream, strict=True):
        exact = torch.zeros(n, *heads, dtype=torch.float64, device=DEVICE)
        exact.index_add_(0, torch.tensor(rows, device=DEVICE), u.double())
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(grad.double(), exact, rtol=0.51 * eps, atol=1e-4 * eps)
    again = values_and_gradients(ours, (k, v), upstream)
    for a, b in zip(got, again, strict=True):
        assert torch.equal(a, b)


def test_copied_keys_may_have_any_strides():
    pack = packed("prefix")
    copies = pack._visible_keys.copies
    assert copies is not None
    wide = normal(46, 6, 64)
    k, v = wide[:, 1:3], wide[:, 4:6]
    upstream = [normal(64, 2, len(copies.rows)).permute(2, 1, 0) for _ in range(2)]
    rows = copies.rows.long()
    require_near(
        lambda k, v: attention.copy_keys(k, v, copies),
        lambda k, v: (k[rows], v[rows]),
        (k, v),
        upstream,
    )


def test_keys_without_a_shared_prefix_are_not_copied(varlen, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("copied")

    monkeypatch.setattr(attention, "copy_keys", refuse)
    model = tiny_model("llama", dtype=torch.bfloat16).to(DEVICE)
    assert model.hidden(*given("flat", model)).isfinite().all()
    with pytest.raises(AssertionError, match="copied"):
        model.hidden(*given("prefix", model))


def given(tree: str, model: Decoder) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens, positions, boundaries and parents."""
    lengths, parents = TREES[tree]
    starts: list[int] = []
    for length_before, parent in enumerate(parents):
        starts.append(starts[parent] + lengths[parent] if parent >= 0 else 0)
        assert parent < length_before
    places = [torch.arange(n) + s for n, s in zip(lengths, starts, strict=True)]
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(model.shape.vocabulary, (sum(lengths),), generator=g)
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    arguments = (tokens, torch.cat(places), borders, torch.tensor(parents))
    return tuple(x.to(DEVICE) for x in arguments)  # pyright: ignore[reportReturnType]


def hidden_and_gradients(model: Decoder, tree: str) -> list[Tensor]:
    parameters = [p for p in model.model.parameters() if p.requires_grad]
    hidden = model.hidden(*given(tree, model))
    upstream = normal(*hidden.shape, dtype=hidden.dtype)
    return [hidden.detach(), *torch.autograd.grad((hidden * upstream).sum(), parameters)]


def make_model(kind: str, dtype: torch.dtype, adapters: bool = False) -> Decoder:
    model = tiny_model(kind, dtype=torch.bfloat16, intermediate_size=77)
    if adapters:
        lora.attach(model, rank=2, alpha=4, seed=0)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, 0, 0.1)
    return model.to(DEVICE, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "kind", "tree"),
    [
        ("plain", "llama", "parents of parents"),
        ("plain", "llama", "flat"),
        ("plain", "smollm3-windows", "parents of parents"),
        ("checkpointing", "qwen3", "prefix"),
        ("adapters", "qwen2", "prefix"),
    ],
)
def test_decoder_error_is_at_most_1_5_times_that_without_kernels(
    how, kind, tree, varlen, monkeypatch
):
    if how == "adapters":
        pytest.importorskip("peft")
    half = torch.bfloat16
    model = make_model(kind, half, how == "adapters")
    model.checkpointing = how == "checkpointing"
    called = record_launches(monkeypatch)
    got = hidden_and_gradients(model, tree)
    assert {"swiglu", "rotate", "swiglu_gradients"} <= set(called)
    assert ("sum_copies" in called) == ("copy_keys" in called) == (tree != "flat")
    again = hidden_and_gradients(model, tree)
    for a, b in zip(got, again, strict=True):
        assert torch.equal(a, b) or DEVICE == "cuda"  # flash's backward adds atomically
    monkeypatch.setattr(fused, "runs", lambda *x: False)
    called.clear()
    plain = hidden_and_gradients(model, tree)
    assert called == []
    truth = hidden_and_gradients(make_model(kind, torch.float64, how == "adapters"), tree)
    for g, p, t in zip(got, plain, truth, strict=True):
        assert error_norm(g, t) <= 1.5 * error_norm(p, t) + 1e-6 * t.norm().item()


def record_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    called: list[str] = []
    for name in training_layer.__all__:
        function = getattr(training_layer, name)

        def recorded(*a, name=name, function=function, **how):
            called.append(name)
            return function(*a, **how)

        monkeypatch.setattr(training_layer, name, recorded)
    return called


@pytest.mark.slow
def test_hidden_states_without_gradients_are_equal_to_the_bit(varlen):
    model = make_model("llama", torch.bfloat16)
    with_graph = model.hidden(*given("prefix", model))
    with torch.no_grad():
        without = model.hidden(*given("prefix", model))
    assert not without.requires_grad
    assert torch.equal(with_graph, without)


def test_hooks_on_projections_are_called(varlen):
    model = make_model("llama", torch.bfloat16)
    seen = []
    for block in model.model.layers:
        assert isinstance(block, Block)
        block.mlp.up_proj.register_forward_hook(lambda m, x, out: seen.append(out) or out * 0)
    out = model.hidden(*given("prefix", model))
    assert len(seen) == 4
    assert out.isfinite().all()


def test_kernels_run_for_16_bit_tensors_on_a_gpu_with_triton(monkeypatch):
    monkeypatch.undo()
    cases = {
        (True, torch.bfloat16, torch.bfloat16): True,
        (True, torch.float16, torch.float16): True,
        (True, torch.bfloat16, torch.float32): False,  # under autocast
        (True, torch.float32, torch.float32): False,
        (False, torch.bfloat16, torch.bfloat16): False,
    }
    for (is_cuda, *dtypes), expected in cases.items():
        tensors = [SimpleNamespace(is_cuda=is_cuda, dtype=dtype) for dtype in dtypes]
        assert fused.runs(*tensors) is expected  # pyright: ignore[reportArgumentType]
    fused._has_triton.cache_clear()
    monkeypatch.setitem(sys.modules, "expo_fast.kernels.training_layer", None)
    monkeypatch.delattr(sys.modules["expo_fast.kernels"], "training_layer")
    tensor = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert fused.runs(tensor) is False  # pyright: ignore[reportArgumentType]
    fused._has_triton.cache_clear()


VIEWS = {"view", "t", "transpose", "unsqueeze", "squeeze", "detach", "expand", "split", "alias"}
VIEWS |= {"slice", "_unsafe_view", "as_strided", "permute", "unbind", "new_empty", "empty_like"}


class Launches(TorchDispatchMode):
    """Counts operators that launch a kernel on a GPU."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_a_layer_needs_few_launches(monkeypatch):
    """Count those of Qwen2.5, forward and backward, without attention and norms."""
    model = tiny_model("qwen2", dtype=torch.bfloat16).to(DEVICE)
    block = model.model.layers[0]
    assert isinstance(block, Block)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        setattr(block, norm, torch.nn.Identity())
    pack = packed("parents of parents")
    copies = pack._visible_keys.copies
    assert copies is not None
    n = pack.boundaries[-1]
    x = normal(n, 48).requires_grad_()
    upstream = normal(n, 48)
    rotations = model.rotations(torch.arange(n, device=DEVICE))

    def attend(_: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Use q, k and v, with one operator each."""
        k, v = attention.copy_keys(k, v, copies)
        return Stub.apply(q, k, v)  # pyright: ignore[reportReturnType]

    def count() -> int:
        with Launches() as launches:
            block(x, rotations, attend).backward(upstream)
        return len(launches.names)

    for name in training_layer.__all__:  # as one operator each: the interpreter needs many
        monkeypatch.setattr(training_layer, name, one_operator(getattr(training_layer, name)))
    count()  # makes .grad
    ours = count()
    monkeypatch.setattr(fused, "runs", lambda *x: False)
    monkeypatch.setattr(native_layer, "runs", lambda *x: False)
    plain = count()
    assert ours <= FEW
    assert plain >= MANY


FEW = 48  # 21 products with biases, 18 sums of gradients, 3 of biases, 6 fused kernels
MANY = 83


def one_operator(launcher: Callable[..., object]) -> Callable[..., object]:
    def called(*args: object, **how: object) -> object:
        with _disable_current_modes():
            result = launcher(*args, **how)
        torch.zeros(1)
        return result

    return called


class Stub(torch.autograd.Function):
    """Stands for attention, and launches nothing."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return q.detach()

    @staticmethod
    def backward(ctx, *upstream):
        return tuple(x.detach() for x in ctx.saved_tensors)
