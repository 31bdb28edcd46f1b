"""Check the fused functions of a training layer against fp64 and plain PyTorch."""

import copy
from collections.abc import Callable, Sequence
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_decode import TINY, random_model
from benchmarks.lease.report import Report
from expo_fast.kernels import fused
from expo_fast.modeling.attention import PackedAttention, copy_keys
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.modules import swiglu
from expo_fast.modeling.rope import rotate, rotate_heads

Function = Callable[..., Tensor | tuple[Tensor, ...]]
DTYPES = (torch.bfloat16, torch.float16)
# Segments of a pack and their parents: worked examples, two questions, samples of each question,
# and a segment without a parent.
LENGTHS = (301, 57, 64, 130, 1, 255, 33, 128, 77)
PARENTS = (-1, 0, 0, 1, 1, 1, 2, 2, -1)


def normal(report: Report, *size: int, seed: int = 0) -> Tensor:
    """Return normal random numbers with standard deviation 2."""
    g = torch.Generator(report.device).manual_seed(seed)
    return 2 * torch.randn(*size, generator=g, device=report.device)


def judge(
    report: Report, what: str, ours: Function, plain: Function, inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Check that our errors are at most twice those of plain PyTorch in the same dtype.

    Return our values and gradients.
    """

    def run(function: Function, dtype: torch.dtype) -> list[Tensor]:
        arguments = [x.detach().to(dtype).requires_grad_() for x in inputs]
        values = function(*arguments)
        if isinstance(values, Tensor):
            values = (values,)
        upstream = []
        for i, value in enumerate(values):
            grad = normal(report, *value.shape, seed=9 + i)
            upstream.append(grad.to(inputs[0].dtype).to(dtype))
        grads = torch.autograd.grad(values, arguments, upstream)
        return [*(value.detach() for value in values), *grads]

    dtype = inputs[0].dtype
    got = run(ours, dtype)
    from_plain = run(plain, dtype)
    truth = run(plain, torch.float64)
    n_values = len(got) - len(inputs)
    for i, exact in enumerate(truth):
        name = f"value {i}" if i < n_values else f"gradient {i}"
        plain_error = float((from_plain[i].double() - exact).norm() / exact.norm())
        allowed = 2 * plain_error + torch.finfo(dtype).eps / 2
        report.compare(f"{what}, {name}", got[i], exact, allowed)
    return got


def train_swiglu(report: Report) -> None:
    """Check SwiGLU at the width of Qwen2.5 0.5B and at an odd width."""

    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    for dtype in DTYPES:
        for size in ((1000, 4864), (77, 1031)):
            gate, up = (normal(report, *size, seed=i).to(dtype) for i in range(2))
            judge(report, f"{dtype}, {size}", swiglu, plain, (gate, up))


def train_rope(report: Report) -> None:
    """Check the RoPE of queries and keys: values must equal those of plain PyTorch to the bit."""
    sizes = ((14, 2, 64), (6, 2, 80), (32, 32, 96), (16, 2, 128), (8, 4, 256))
    for dtype in DTYPES:
        for heads, kv_heads, dim in sizes:
            q = normal(report, 515, heads, dim, seed=heads).to(dtype)
            k = normal(report, 515, kv_heads, dim, seed=kv_heads).to(dtype)
            angle = normal(report, 515, 1, dim // 2, seed=2)
            rotation = angle.cos().to(dtype), angle.sin().to(dtype)

            def ours(q: Tensor, k: Tensor, rotation=rotation) -> tuple[Tensor, Tensor]:
                return rotate_heads(q, k, *rotation)

            def plain(q: Tensor, k: Tensor, rotation=rotation) -> tuple[Tensor, Tensor]:
                cos, sin = (x.to(q.dtype) for x in rotation)
                return rotate(q, cos, sin), rotate(k, cos, sin)

            what = f"{dtype}, {dim}"
            got = judge(report, what, ours, plain, (q, k))
            for name, a, b in zip("qk", got, plain(q, k), strict=False):
                report.require_equal(f"{name}, {what}", a, b)


def train_keys(report: Report) -> None:
    """Check the copies of keys and values that segments share with their ancestors."""
    pack = packed(report)
    copies = pack._visible_keys.copies
    assert copies is not None
    rows = copies.rows.long()
    for dtype in DTYPES:
        for heads, dim in ((2, 64), (5, 80), (32, 96)):
            size = (sum(LENGTHS), heads, dim)
            k, v = (normal(report, *size, seed=i).to(dtype) for i in range(2))

            def ours(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
                return copy_keys(k, v, copies)

            def plain(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
                return k[rows], v[rows]

            what = f"{dtype}, {heads} x {dim}"
            got = judge(report, what, ours, plain, (k, v))
            again = judge(report, f"{what}, again", ours, plain, (k, v))
            for name, a, b in zip(("k", "v", "dk", "dv"), got, again, strict=True):
                report.require_equal(f"{name}, {what}", a, b)


def packed(report: Report) -> PackedAttention:
    """Return the attention of the segments LENGTHS and PARENTS."""
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(report.device)
    return PackedAttention(borders, torch.tensor(PARENTS, device=report.device))


def train_decoder(report: Report) -> None:
    """Check a small decoder with the fused functions against the same decoder without them."""
    model = random_model(TINY, report.device)
    model_fp64 = copy.deepcopy(model).double()
    got = hidden_and_gradients(report, model)
    with patch.object(fused, "runs", lambda *x: False):
        plain = hidden_and_gradients(report, model)
        truth = hidden_and_gradients(report, model_fp64)
    for name, exact in truth.items():
        plain_error = float((plain[name].double() - exact).norm() / exact.norm())
        report.compare(name, got[name], exact, 2 * plain_error + 1e-6)
    report.show(tensors=len(truth))


def hidden_and_gradients(report: Report, model: Decoder) -> dict[str, Tensor]:
    """Return the hidden states of a pack, and the gradients of all parameters."""
    starts = []  # the position of each segment's first token
    for parent in PARENTS:
        starts.append(starts[parent] + LENGTHS[parent] if parent >= 0 else 0)
    by_segment = [start + torch.arange(n) for n, start in zip(LENGTHS, starts, strict=True)]
    positions = torch.cat(by_segment).to(report.device)
    tokens = torch.arange(len(positions), device=report.device) % model.shape.vocabulary
    pack = packed(report)
    hidden = model.run(tokens, positions, pack)
    upstream = normal(report, *hidden.shape).bfloat16().to(hidden.dtype)
    named = dict(model.model.named_parameters())
    grads = torch.autograd.grad(hidden, list(named.values()), upstream)
    return {"hidden": hidden.detach()} | dict(zip(named, grads, strict=True))
