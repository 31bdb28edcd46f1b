"""Compare the CPU kernels of a decoder layer with PyTorch in fp64."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from expo_fast.modeling.attention import Layer, PackedAttention, causal_mask
from expo_fast.modeling.modules import RMSNorm
from expo_fast.op_backends import native_layer
from judges import relative_error
from test_native import isa, threads

__all__ = ["isa", "threads"]  # fixtures

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 6e-3}


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g).to(dtype).requires_grad_()


def results(compute: Callable, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs of `compute`, and the gradients of the inputs under random upstream."""
    outputs = compute(*inputs)
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    g = torch.Generator().manual_seed(7)
    upstream = [torch.randn(y.shape, generator=g).to(y.dtype) for y in outputs]
    grads = torch.autograd.grad(list(outputs), list(inputs), upstream)
    return [y.detach() for y in outputs] + list(grads)


def require_close(ours: Callable, exact: Callable, inputs: Sequence[Tensor]) -> None:
    """Assert that results and gradients are those of `exact` in fp64."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    truth = results(exact, wide)
    found = results(ours, inputs)
    tolerance = TOLERANCES[inputs[0].dtype]
    for index, (x, t) in enumerate(zip(found, truth, strict=True)):
        assert x.dtype == inputs[0].dtype
        assert relative_error(x, t) < tolerance, f"result {index}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 2, 3), (5, 64, 64), (130, 33, 71), (1100, 70, 20)], ids=str)
def test_linear(isa, shape, has_bias, dtype):
    n, n_in, n_out = shape
    inputs = [random(n, n_in, dtype=dtype), random(n_out, n_in, dtype=dtype, seed=1)]
    if has_bias:
        inputs.append(random(n_out, dtype=dtype, seed=2))

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return native_layer.linear(x, weight, bias)

    require_close(ours, F.linear, inputs)


def test_a_frozen_weight_gets_no_gradient_and_keeps_no_input():
    """Only the gradient of the weight reads the input."""
    x = random(9, 4, dtype=torch.bfloat16)
    weight = random(5, 4, dtype=torch.bfloat16).detach()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = native_layer.linear(x, weight, None)
    assert [tensor.shape for tensor in saved] == [weight.shape]
    y.sum().backward()
    assert x.grad is not None
    assert relative_error(x.grad, weight.double().sum(0).expand(9, 4)) < TOLERANCES[x.dtype]
    assert weight.grad is None


@pytest.mark.parametrize("shape", [(0, 8, 5), (3, 0, 5), (3, 8, 0)], ids=str)
def test_linear_of_nothing(shape):
    n, n_in, n_out = shape
    x = random(n, n_in, dtype=torch.bfloat16)
    weight = random(n_out, n_in, dtype=torch.bfloat16)
    y, d_x, d_weight = results(lambda *a: native_layer.linear(*a, None), [x, weight])
    assert (y.shape, d_x.shape, d_weight.shape) == ((n, n_out), x.shape, weight.shape)
    assert not y.any() and not d_x.any() and not d_weight.any()


def test_where_the_kernels_do_not_run():
    x = random(70, 8, dtype=torch.bfloat16)
    weight = random(8, 8, dtype=torch.bfloat16)
    assert native_layer.runs(x, weight)
    assert not native_layer.runs(x, weight.float())
    assert not native_layer.runs(x.half(), weight.half())
    assert not native_layer.runs(x, weight.to("meta"))
    assert not native_layer.multiplies(x, weight, torch.zeros(8))  # a bias of another dtype
    assert not native_layer.multiplies(random(70, 9, dtype=torch.bfloat16), weight, None)


def test_forward_mode_derivatives_are_those_of_pytorch():
    """The ops have none. They would silently be 0."""
    norm = RMSNorm(8, 1e-5)
    x = random(4, 8, dtype=torch.float32).detach()
    tangent = torch.func.jvp(norm, (x,), (torch.ones_like(x),))[1]
    step = 1e-3
    expected = (norm(x + step) - norm(x - step)) / (2 * step)
    assert relative_error(tangent, expected.double()) < 1e-3


def test_a_pack_that_does_not_cover_the_tokens_is_refused():
    q = random(12, 2, 8, dtype=torch.float32)
    attention = PackedAttention(torch.tensor([0, 10]))
    with pytest.raises(ValueError, match=r"cu_seqlens are from 0 to 10: they must cover .* 12"):
        attention(Layer(0, scale=1.0, window=None), q, q, q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (3, 64), (130, 37)], ids=str)
def test_norms(isa, shape, dtype):
    n, d = shape
    inputs = [random(n, d, dtype=dtype), random(d, dtype=dtype, seed=2)]

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, 1e-5)

    require_close(lambda *a: native_layer.rms_norm(*a, 1e-5)[0], exact, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 10, 64])
def test_rotation(isa, head_dim, dtype):
    x = random(11, 3, head_dim, dtype=dtype)
    angles = torch.arange(11.0)[:, None, None] * torch.linspace(1, 0.1, head_dim // 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def exact(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        c, s = cos.double(), sin.double()
        return torch.cat((a * c - b * s, b * c + a * s), -1)

    require_close(lambda x: native_layer.rotate(x, cos, sin, False), exact, [x])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (40, 64)], ids=str)
def test_swiglu(isa, shape, dtype):
    inputs = [random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)]
    require_close(native_layer.swiglu, lambda gate, up: F.silu(gate) * up, inputs)


def test_swiglu_of_large_values_is_finite():
    gate = torch.tensor([[-1e4, -200.0, 200.0, 1e4]], requires_grad=True)
    up = torch.ones(1, 4, requires_grad=True)
    require_close(native_layer.swiglu, lambda gate, up: F.silu(gate) * up, [gate, up])


# Attention

TREES = {  # lengths of the segments, and their parents
    "one": ([37], [-1]),
    "long": ([1100], [-1]),
    "two": ([5, 70], [-1, -1]),
    "group": ([40, 20, 1, 33, 63], [-1, 0, 0, 0, 0]),
    "shots": ([17, 30, 12, 9, 50, 300, 8], [-1, 0, 1, 1, 0, 4, 4]),
    "interleaved": ([6, 7, 5, 3, 4], [-1, -1, 0, 1, 0]),
    "empty": ([6, 0, 5], [-1, 0, 0]),
}


def tree(lengths: list[int], parents: list[int]) -> tuple[Tensor, Tensor]:
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    return boundaries, torch.tensor(parents, dtype=torch.int32)


def by_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    parents: list[int],
    window: int,
    scale: float,
) -> Tensor:
    """Return the attention of a tree from explicit scores of each segment."""
    keys = k.split(lengths)
    values = v.split(lengths)
    outputs = []
    for segment, queries in enumerate(q.split(lengths)):
        chain = [segment]
        while parents[chain[0]] >= 0:
            chain.insert(0, parents[chain[0]])
        group = q.shape[1] // k.shape[1]
        seen_keys = torch.cat([keys[s] for s in chain]).repeat_interleave(group, 1)
        seen_values = torch.cat([values[s] for s in chain]).repeat_interleave(group, 1)
        mask = causal_mask(len(queries), len(seen_keys), window or None, q.device)
        scores = torch.einsum("nhd,mhd->hnm", queries, seen_keys) * scale
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hnm,mhd->nhd", weights, seen_values))
    return torch.cat(outputs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 1, 9])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (9, 1)], ids=str)
@pytest.mark.parametrize("name", TREES)
def test_tree_attention(name, heads, window, dtype):
    check_attention(name, heads, 16, window, dtype)


@pytest.mark.parametrize("head_dim", [2, 22, 64, 128])
def test_tree_attention_of_any_head_size(isa, head_dim):
    check_attention("shots", (4, 2), head_dim, 0, torch.bfloat16)


def check_attention(
    name: str, heads: tuple[int, int], head_dim: int, window: int, dtype: torch.dtype
) -> None:
    lengths, parents = TREES[name]
    n = sum(lengths)
    boundaries, parent_ids = tree(lengths, parents)
    scale = head_dim**-0.5
    inputs = [
        random(n, heads[0], head_dim, dtype=dtype),
        random(n, heads[1], head_dim, dtype=dtype, seed=1),
        random(n, heads[1], head_dim, dtype=dtype, seed=2),
    ]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return native_layer.tree_attention(q, k, v, boundaries, parent_ids, window, scale)[0]

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return by_segments(q, k, v, lengths, parents, window, scale)

    if window == 1:  # the weight is 1, so the gradients of q and k are 0
        truth = exact(*inputs)
        assert relative_error(ours(*inputs), truth.double()) < TOLERANCES[dtype]
        return
    require_close(ours, exact, inputs)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_number_of_threads_changes_no_bit(threads, count):
    lengths, parents = TREES["shots"]
    boundaries, parent_ids = tree(lengths, parents)
    n = sum(lengths)
    qkv = [random(n, heads, 32, dtype=torch.bfloat16, seed=heads) for heads in (4, 2, 2)]
    x = random(300, 48, dtype=torch.bfloat16)
    weight = random(100, 48, dtype=torch.bfloat16)
    norm_weight = random(48, dtype=torch.bfloat16)

    def compute() -> list[Tensor]:
        return [
            *results(
                lambda *a: native_layer.tree_attention(*a, boundaries, parent_ids, 0, 0.2)[0], qkv
            ),
            *results(lambda *a: native_layer.linear(*a, None), [x, weight]),
            *results(lambda *a: native_layer.rms_norm(*a, 1e-5)[0], [x, norm_weight]),
        ]

    threads(2)
    expected = compute()
    threads(count)
    for found, wanted in zip(compute(), expected, strict=True):
        assert torch.equal(found, wanted)


def test_scores_far_from_zero_lose_no_digits():
    q = random(40, 2, 8, dtype=torch.float32)
    inputs = [
        (q * 30).detach().requires_grad_(),
        *(random(40, 2, 8, dtype=torch.float32, seed=s) for s in (1, 2)),
    ]
    boundaries, parents = tree([40], [-1])

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return native_layer.tree_attention(q, k, v, boundaries, parents, 0, 1.0)[0]

    wide_q, wide_k, wide_v = (x.detach().double() for x in inputs)
    truth = by_segments(wide_q, wide_k, wide_v, [40], [-1], 0, 1.0)
    assert relative_error(ours(*inputs).detach(), truth) < 1e-5
