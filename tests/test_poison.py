"""Results have the same bits where fresh memory is NaN: ops, engines and a training step."""

import ctypes
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from expo_fast import generate, ops
from expo_fast.generate import Generator, Request
from expo_fast.inference import cuda_engine
from expo_fast.inference.cpu_engine import cpu_buffer
from expo_fast.inference.cuda_engine import CudaEngine
from expo_fast.inference.exact_hidden import exact_hidden
from expo_fast.inference.joined_weights import JoinedWeights
from expo_fast.kernels import fused, reference
from expo_fast.kernels.products import widened
from expo_fast.modeling import attention, lora, packing
from expo_fast.modeling.attention import PackedAttention
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.optimizer import Optimizer
from expo_fast.modeling.packing import Sample
from expo_fast.objectives import POLICY_OBJECTIVES, PREFERENCE_OBJECTIVES
from expo_fast.op_backends import custom_ops, native_library, row_selection
from poison import poisoned, require_same_bits
from tiny import tiny_model

DTYPES = [torch.float32, torch.bfloat16]
OPTIONS = SimpleNamespace(
    clip_low=0.2, clip_high=0.28, dpo_beta=0.1, label_smoothing=0.1, rdpo_alpha=0.2
)


# Ops


@dataclass(frozen=True)
class Rows:
    """Inputs of an op; a third of the rows have no target."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor  # (V,)
    targets: Tensor  # (N,)
    temperature: Tensor  # (N,)
    noise: Tensor  # (8, N) normal numbers

    @classmethod
    def make(cls, n: int, d: int, v: int, dtype: torch.dtype) -> "Rows":
        g = torch.Generator().manual_seed(n + d + v)
        targets = torch.randint(v, (n,), generator=g)
        targets[1::3] = ops.IGNORE
        hidden = torch.randn(n, d, generator=g)
        hidden[3:5] *= 40  # rows whose target is so unlikely that their sums are computed again
        return cls(
            hidden=hidden.to(dtype),
            weight=torch.randn(v, d, generator=g).to(dtype),
            bias=torch.randn(v, generator=g),
            targets=targets,
            temperature=torch.rand(n, generator=g) + 0.5,
            noise=torch.randn(8, n, generator=g),
        )

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Return new leaves for hidden and weight."""
        return self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()


SIZES = {
    "ragged": (32, 16, 151),
    "odd depth": (6, 7, 131),
    "one row": (1, 8, 2),
    "empty": (0, 8, 33),
}
Op = Callable[[Rows, str], Iterator[Tensor]]


def logprob(rows: Rows, backend: str) -> Iterator[Tensor]:
    """Log-probs with gradients of all results, of one, and of one input alone."""
    hidden, weight = rows.inputs()
    bias = rows.bias.clone().requires_grad_()
    upstream = rows.noise[:3].clone()
    upstream[:, ::5] = 0  # rows that are active in the forward alone
    for frozen in ("", "head", "hidden"):
        hidden.requires_grad_(frozen != "hidden")
        weight.requires_grad_(frozen != "head")
        bias.requires_grad_(frozen != "head")
        inputs = [x for x in (hidden, weight, bias) if x.requires_grad]
        found = ops.linear_logprob(
            hidden,
            weight,
            rows.targets,
            bias=bias,
            temperature=rows.temperature,
            backend=backend,
        )
        yield from found
        yield from torch.autograd.grad(found, inputs, list(upstream), retain_graph=True)
        yield from torch.autograd.grad(found.logp, inputs, upstream[0])
    yield from ops.linear_logprob(rows.hidden, rows.weight, rows.targets, backend=backend)
    # with what it keeps for a backward, which is an output of the operator
    yield from custom_ops.logprob(
        hidden=rows.hidden,
        weight=rows.weight,
        bias=rows.bias,
        targets=rows.targets,
        row_temperature=rows.temperature,
        scalar_temperature=1.0,
        backend=backend,
        complete=False,
        needs=[True, True, True],
    )


def policy_loss(name: str) -> Op:
    def op(rows: Rows, backend: str) -> Iterator[Tensor]:
        n = len(rows.targets)
        ids = torch.arange(n) // 8
        advantage, old, ref, row_weight = rows.noise[:4].unbind()
        row_weight = row_weight.abs()
        if name != "gspo":
            row_weight = torch.where(row_weight < 0.3, 0, row_weight)  # such rows are dropped
        logp = ops.linear_logprob(rows.hidden, rows.weight, rows.targets, backend="torch").logp
        hidden, weight = rows.inputs()
        loss = ops.linear_policy_loss(
            hidden,
            weight,
            rows.targets,
            advantage.round(),  # 0 in some rows, which have no gradient
            row_weight,
            objective=POLICY_OBJECTIVES[name].build(OPTIONS),
            old_logp=logp + 0.3 * old,
            ref_logp=logp + 0.3 * ref,
            on_policy=ids % 3 == 1,
            kl_coef=0.1,
            entropy_coef=0.05 if name == "clipped" else 0.0,
            sequence_ids=ids,
            backend=backend,
        )
        yield from (x.detach() for x in loss)
        yield from torch.autograd.grad(loss.loss, [hidden, weight])

    return op


def preference_loss(name: str) -> Op:
    def op(rows: Rows, backend: str) -> Iterator[Tensor]:
        hidden, weight = rows.inputs()
        loss = ops.linear_preference_loss(
            hidden,
            weight,
            rows.targets,
            torch.arange(len(rows.targets)) % 6,
            objective=PREFERENCE_OBJECTIVES[name].build(OPTIONS),
            ref_logp=torch.linspace(-9, -7, 6),
            temperature=rows.temperature,
            backend=backend,
        )
        yield from (x.detach() for x in loss)
        yield from torch.autograd.grad(loss.loss, [hidden, weight])

    return op


def advantages(rows: Rows, backend: str) -> Iterator[Tensor]:
    rewards = torch.where(rows.noise[0] > 1, torch.nan, rows.noise[0])
    for scale in ("group", "batch", "none"):
        yield ops.group_advantage(rewards, torch.arange(len(rewards)) % 5, scale=scale)


OPS: dict[str, Op] = {"logprob": logprob, "advantages": advantages}
OPS |= {f"policy-{name}": policy_loss(name) for name in POLICY_OBJECTIVES}
OPS |= {f"preference-{name}": preference_loss(name) for name in PREFERENCE_OBJECTIVES}


@pytest.fixture(params=["torch", "native", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Divide the work of ops into several chunks and threads; "triton" takes a GPU's paths."""
    monkeypatch.setattr(reference, "CHUNK_BYTES", 1 << 13)
    if request.param == "triton":
        take_the_paths_of_a_gpu(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 if request.param == "native" else 1)
    yield request.param
    torch.set_num_threads(threads)


def take_the_paths_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from expo_fast.kernels import groups, logprob, policy_sums, selection
    from expo_fast.op_backends import triton_fused

    monkeypatch.setattr(custom_ops, "advantage_kernel", lambda _: groups.group_advantage)
    monkeypatch.setattr(custom_ops, "policy_sums_kernel", lambda _: policy_sums.policy_sums)
    monkeypatch.setattr(row_selection, "_selection_kernel", lambda _: selection.selected)
    name = logprob.BY_CARD["default"]
    monkeypatch.setitem(logprob.VARIANTS, name, replace(logprob.VARIANTS[name], BN=16))
    fits = {triton_fused.KEPT_FRACTION: 16, triton_fused.CHUNK_FRACTION: 16}
    monkeypatch.setattr(triton_fused, "_rows_within", lambda fraction, _: fits[fraction])
    monkeypatch.setattr(triton_fused, "GATHER_FROM", 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_ops(name: str, backend: str, dtype: torch.dtype):
    for size in SIZES.values() if name == "logprob" else (SIZES["ragged"], SIZES["empty"]):
        rows = Rows.make(*size, dtype)
        require_same_bits(lambda rows=rows: OPS[name](rows, backend))


def test_which_rows_a_gpu_selects():
    pytest.importorskip("triton")
    from expo_fast.kernels.selection import selected

    rows = Rows.make(40, 1, 30, torch.float32)

    def select() -> Iterator[Tensor]:
        for wanted in (None, rows.noise[0] > 0):
            indices, valid = selected(rows.targets, wanted, vocabulary=30)
            assert valid
            yield indices

    require_same_bits(select)


def test_many_tokens_of_native_kernels():
    """Each span of 1024 tokens adds to the gradient of the weights."""
    rows = Rows.make(1600, 6, 40, torch.bfloat16)
    require_same_bits(lambda: policy_loss("clipped")(rows, "native"))


# Generation

PREFIX = tuple(20 + i % 60 for i in range(70))  # more than two pages, and than csrc's block
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
RULES = [{}, {"top_p": 0.7}, {"top_k": 3, "min_p": 0.1}, {"temperature": 0.0}, {}]


def requests(backend: str) -> list[Request]:
    """Return requests with a common prefix, more of them than there are rows.

    Rows are truncated in several ways, for "triton" in none: its interpreter takes seconds a row.
    """
    asked = []
    for i, rule in enumerate(RULES):
        prefix = PREFIX[:40] if backend == "triton" else PREFIX
        prompt = (*prefix, *range(80, 82 + i // 2 * 12))
        request = Request(prompt, 2 + 2 * i % 5, temperature=0.8, seed=i, stop_ids=())
        asked.append(replace(request, **rule))
    return [asked[0], *asked[3:]] if backend == "triton" else asked


def sample(model: Decoder, backend: str, exact: bool = False) -> Iterator[Tensor]:
    generator = Generator(model, backend=backend, batch_invariant=exact)
    for done in generator.sample(requests(backend)):
        assert done.finish_reason == "length"
        yield torch.tensor(done.token_ids)
        yield done.logp


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a request wait for a row that is free, and bursts be short."""
    for name in ("MAX_ROWS", "CUDA_MAX_ROWS"):
        monkeypatch.setattr(generate, name, 2)
    monkeypatch.setattr(cuda_engine, "ROW_BUCKETS", (3,))
    monkeypatch.setattr(cuda_engine, "MIN_TABLE_WIDTH", 4)
    monkeypatch.setattr(CudaEngine, "burst", 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["llama-biases", "qwen3", "smollm3-windows", "gemma3", "olmo2"])
@pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)
def test_engines(backend: str, kind: str, dtype: torch.dtype, few_rows):
    model = tiny_model(kind, dtype=dtype)
    require_same_bits(lambda: sample(model, backend))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype", "hooked"),
    [("qwen3-biases", torch.bfloat16, False), ("mistral-window", torch.float32, True)],
)
def test_the_engine_of_a_gpu(kind: str, dtype: torch.dtype, hooked: bool, few_rows):
    """Through joined weights and fused kernels, or through the model and its hooks."""
    pytest.importorskip("triton")
    model = tiny_model(kind, dtype=dtype, **SMALL)
    if hooked:
        model.model.norm.register_forward_hook(lambda module, inputs, out: out)
    require_same_bits(lambda: sample(model, "triton"))


def test_a_step_of_a_gpu_that_is_captured_before_rows_are_loaded():
    pytest.importorskip("triton")
    from expo_fast.inference.decode_step import DecodeStep, StepKey
    from expo_fast.kernels.decode import Paged

    model = tiny_model("qwen3", dtype=torch.bfloat16, **SMALL)
    shape = model.shape

    @torch.no_grad()
    def launch() -> Tensor:
        slab = torch.empty(2, 1, 2, 32, shape.kv_heads, shape.head_dim, dtype=model.dtype)
        joined = JoinedWeights(model)
        joined.refresh()
        step = DecodeStep(
            StepKey(rows=3, table_width=4, truncated=False),
            model,
            widened(model.head_weight.detach()).T,
            Paged(torch.tensor([slab.data_ptr()]), 1, 32, shape.kv_heads, shape.head_dim),
            burst=2,
            joined=joined,
        )
        step.launch()
        return step.progress.history

    require_same_bits(lambda: [launch()])


def test_truncated_draws_of_a_gpu():
    pytest.importorskip("triton")
    from expo_fast.inference.sampling import BLOCK
    from expo_fast.kernels import blocks, draw, truncate

    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 300, generator=g)  # the second block is partial
    temperature = torch.tensor([0.7, 1.1])
    seeds = torch.arange(2)
    rules = {
        "top_k": torch.tensor([0, 20]),
        "top_p": torch.tensor([0.8, 1.0]),
        "min_p": torch.tensor([0.0, 0.05]),
    }

    def draws() -> Iterator[Tensor]:
        progress = draw.Progress.start(torch.zeros_like(seeds), torch.arange(2), burst=2)
        found = blocks.blocks_of(logits, temperature, BLOCK)
        given = (logits, *found, BLOCK, temperature)
        sampled = draw.sample_rows(*given, seeds, progress, record=False)
        yield from (x.clone() for x in sampled)
        truncate.redraw(*given, sampled.u, **rules, tokens=sampled.tokens, logps=sampled.logps)
        draw.record(sampled, progress)
        yield from sampled
        yield from (progress.last_tokens, progress.positions, progress.index, progress.history)

    require_same_bits(draws)


# Training


def train(model: Decoder, backend: str, steps: int = 2) -> Iterator[Tensor]:
    """Optimizer steps of two packs and two terms each, on prompts with a common prefix."""
    noise = torch.linspace(-1, 1, 3)
    samples = [
        Sample((5, 6, 7, 8), (11, 12, 13), 0.5, 0.1, old_logp=noise),
        Sample((5, 6, 7, 9), (14, 21, 30), -1.0, 0.2, old_logp=noise - 4),
        Sample((5, 6, 7, 8), (15, 16, 60), 2.0, 0.0, old_logp=noise - 5),
        Sample((5, 6, 7, 9), (17, 40, 33), 0.0, 0.4, old_logp=noise - 3),
    ]
    optimizer = Optimizer(model.named_parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    sums = optimizer.grad_sums
    for _ in range(steps):
        for pack, hidden in packing.forward(model, samples, max_tokens=12):
            loss = ops.linear_policy_loss(
                hidden,
                model.head_weight,
                pack.targets,
                pack.advantage,
                pack.row_weight,
                old_logp=pack.old_logp,
                backend=backend,
            )
            loss.loss.backward()
        sums.start_new_term()
        (pack, hidden), *_ = packing.forward(model, samples, max_tokens=12)
        found = ops.linear_logprob(hidden, model.head_weight, pack.targets, backend=backend)
        found.logp.mean().backward()
        norms = sums.term_norms()
        report = optimizer.step(1e-2, max_grad_norm=0.5)
        yield torch.tensor([*norms, report.grad_norm, report.update_norm])
    yield from (p.detach() for p in model.parameters())
    yield from optimizer.state_dict()[0].values()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)
def test_training(backend: str, dtype: torch.dtype):
    require_same_bits(lambda: train(tiny_model("smollm3-windows", dtype=dtype), backend))


@pytest.mark.slow
def test_training_with_the_kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """Layers are computed again in the backward."""
    take_the_paths_of_a_gpu(monkeypatch)
    from benchmarks.lease.switches import each_sequence

    monkeypatch.setattr(fused, "runs", lambda *x: all(y.dtype == torch.bfloat16 for y in x))
    monkeypatch.setattr(attention, "varlen_attention", each_sequence)
    monkeypatch.setattr(PackedAttention, "__call__", PackedAttention._varlen)

    def run() -> Iterator[Tensor]:
        model = tiny_model("qwen3", dtype=torch.bfloat16, num_hidden_layers=1)
        model.checkpointing = True
        return train(model, "triton", steps=1)

    require_same_bits(run)


def test_adapters_and_their_merged_copy():
    def run() -> Iterator[Tensor]:
        model = tiny_model("qwen2", dtype=torch.bfloat16, num_hidden_layers=2)
        lora.attach(model, rank=2, alpha=4, seed=0)
        yield from train(model, "native")
        plain = lora.merged_copy(model).model
        yield from (p.detach() for p in plain.parameters())
        yield from sample(plain, "native")

    require_same_bits(run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariant_hidden_states(dtype: torch.dtype):
    def run() -> Iterator[Tensor]:
        model = tiny_model("llama-wide-heads", dtype=dtype, num_hidden_layers=2)
        model.exact = exact_hidden(model)
        yield from sample(model, "native", exact=True)
        yield from train(model, "native")

    require_same_bits(run)


# The poison itself


def test_fresh_memory_is_poisoned():
    dtypes = [*DTYPES, torch.float16, torch.float64]
    with poisoned():
        for dtype in dtypes:
            like = torch.zeros(3, dtype=dtype)
            fresh = [torch.empty(3, dtype=dtype), torch.empty_like(like), like.new_empty(3)]
            fresh += [torch.empty_strided((3,), (2,), dtype=dtype), cpu_buffer(3, dtype=dtype)]
            fresh.append(torch.zeros(0, dtype=dtype).resize_(3))
            fresh.append(torch.empty(3 * dtype.itemsize, dtype=torch.uint8).view(dtype))
            assert all(x.isnan().all() for x in fresh)
        for dtype in (torch.int32, torch.int64):
            assert (torch.empty(3, dtype=dtype) == torch.iinfo(dtype).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


PROBE = """
#include "common.h"

extern "C" float unwritten_scratch() {
  Scratch<float> buffer(3);
  for (int i = 0; i < 2; ++i) buffer.data[i] = 0;
  return buffer.data[2];
}
"""


def test_scratch_memory_of_csrc_is_poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for header in native_library.SOURCES.glob("*.h"):
        shutil.copy(header, tmp_path)
    (tmp_path / "probe.cpp").write_text(PROBE)
    monkeypatch.setattr(native_library, "SOURCES", tmp_path)
    monkeypatch.setitem(native_library.PARTS, "probe", ["probe"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with poisoned():
        probe = native_library.library("portable", "probe")
    probe.unwritten_scratch.restype = ctypes.c_float
    assert math.isnan(probe.unwritten_scratch())


def test_the_poisoned_library_is_another_one():
    name = native_library.isa()
    shipped = native_library.library(name)
    with poisoned():
        assert native_library.library(name)._name != shipped._name
    assert native_library.library(name)._name == shipped._name


def unwritten() -> Iterator[Tensor]:
    """Leave the last element as it was."""
    out = torch.empty(4)
    out[:3] = 1
    yield out


def read_too_early() -> Iterator[Tensor]:
    """Add to a sum that does not start at 0."""
    total = torch.empty(4).abs_().clamp_(max=1)  # finite
    yield total + torch.ones(4)


def weighted_by_zero() -> Iterator[Tensor]:
    """Multiply by 0 what should not be read."""
    values = torch.empty(4)
    values[:3] = 1
    yield torch.tensor([1.0, 1, 1, 0]) @ values


@pytest.mark.parametrize("broken", [unwritten, read_too_early, weighted_by_zero])
def test_a_broken_kernel_is_noticed(broken: Callable[[], Iterator[Tensor]]):
    with pytest.raises(AssertionError, match="result 0"):
        require_same_bits(broken)
