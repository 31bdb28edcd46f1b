"""Fused functions of a training layer, forward and backward, against fp64 and plain PyTorch."""

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
from expo_fast.modeling.decoder import Decoder, swiglu
from expo_fast.modeling.rope import rotate, rotate_heads

Function = Callable[..., Tensor | tuple[Tensor, ...]]
DTYPES = (torch.bfloat16, torch.float16)
# segments and their parents: worked examples, two questions, samples of each, one that stands alone
LENGTHS = (301, 57, 64, 130, 1, 255, 33, 128, 77)
PARENTS = (-1, 0, 0, 1, 1, 1, 2, 2, -1)


def normal(report: Report, *size: int, seed: int = 0) -> Tensor:
    g = torch.Generator(report.device).manual_seed(seed)
    return 2 * torch.randn(*size, generator=g, device=report.device)


def judge(
    report: Report, what: str, ours: Function, plain: Function, inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Errors are at most twice those of plain PyTorch in the same dtype.

    Return values and gradients.
    """

    def run(function: Function, dtype: torch.dtype) -> list[Tensor]:
        given = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = function(*given)
        out = (out,) if isinstance(out, Tensor) else out
        upstream = []
        for i, x in enumerate(out):
            u = normal(report, *x.shape, seed=9 + i)
            upstream.append(u.to(inputs[0].dtype).to(dtype))
        return [*(x.detach() for x in out), *torch.autograd.grad(out, given, upstream)]

    dtype = inputs[0].dtype
    got = run(ours, dtype)
    near = run(plain, dtype)
    truth = run(plain, torch.float64)
    for i, (g, n, t) in enumerate(zip(got, near, truth, strict=True)):
        name = f"value {i}" if i < len(got) - len(inputs) else f"gradient {i}"
        error = float((n.double() - t).norm() / t.norm())
        report.compare(f"{what}, {name}", g, t, 2 * error + torch.finfo(dtype).eps / 2)
    return got


def train_swiglu(report: Report) -> None:
    """Of Qwen2.5 0.5B's width, and of an odd one."""
    for dtype in DTYPES:
        for size in ((1000, 4864), (77, 1031)):
            gate, up = (normal(report, *size, seed=i).to(dtype) for i in range(2))
            judge(report, f"{dtype}, {size}", swiglu, lambda g, u: F.silu(g) * u, (gate, up))


def train_rope(report: Report) -> None:
    """Check queries and keys of several head sizes: equal to plain PyTorch to the bit."""
    for dtype in DTYPES:
        for heads, kv_heads, dim in (
            (14, 2, 64),
            (6, 2, 80),
            (32, 32, 96),
            (16, 2, 128),
            (8, 4, 256),
        ):
            q, k = (normal(report, 515, h, dim, seed=h).to(dtype) for h in (heads, kv_heads))
            angle = normal(report, 515, 1, dim // 2, seed=2)
            turn = angle.cos().to(dtype), angle.sin().to(dtype)

            def ours(q: Tensor, k: Tensor, turn=turn) -> tuple[Tensor, Tensor]:
                return rotate_heads(q, k, *turn)

            def plain(q: Tensor, k: Tensor, turn=turn) -> tuple[Tensor, Tensor]:
                cos, sin = (x.to(q.dtype) for x in turn)
                return rotate(q, cos, sin), rotate(k, cos, sin)

            what = f"{dtype}, {dim}"
            got = judge(report, what, ours, plain, (q, k))
            for name, a, b in zip("qk", got, plain(q, k), strict=False):
                report.require_equal(f"{name}, {what}", a, b)


def train_keys(report: Report) -> None:
    """Keys and values that segments share, in packs of segments whose parents have parents."""
    pack = packed(report)
    copies = pack._visible_keys.copies
    assert copies is not None
    rows = copies.rows.long()
    for dtype in DTYPES:
        for heads, dim in ((2, 64), (5, 80), (32, 96)):
            k, v = (normal(report, sum(LENGTHS), heads, dim, seed=i).to(dtype) for i in range(2))

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
    """Return the attention of the segments above."""
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(report.device)
    return PackedAttention(borders, torch.tensor(PARENTS, device=report.device))


def train_decoder(report: Report) -> None:
    """Check a small decoder, forward and backward, with the fused functions and without them."""
    model = random_model(TINY, report.device)
    wide = copy.deepcopy(model).double()
    got = hidden_and_gradients(report, model)
    with patch.object(fused, "runs", lambda *x: False):
        plain = hidden_and_gradients(report, model)
        truth = hidden_and_gradients(report, wide)
    for name, t in truth.items():
        error = float((plain[name].double() - t).norm() / t.norm())
        report.compare(name, got[name], t, 2 * error + 1e-6)
    report.show(tensors=len(truth))


def hidden_and_gradients(report: Report, model: Decoder) -> dict[str, Tensor]:
    """Return the hidden states of a pack, and the gradients of all parameters."""
    starts = []
    for parent in PARENTS:
        starts.append(starts[parent] + LENGTHS[parent] if parent >= 0 else 0)
    each = [torch.arange(n) + start for n, start in zip(LENGTHS, starts, strict=True)]
    positions = torch.cat(each).to(report.device)
    tokens = torch.arange(len(positions), device=report.device) % model.shape.vocabulary
    pack = packed(report)
    hidden = model.run(tokens, positions, pack)
    upstream = normal(report, *hidden.shape).bfloat16().to(hidden.dtype)
    named = dict(model.model.named_parameters())
    grads = torch.autograd.grad(hidden, list(named.values()), upstream)
    return {"hidden": hidden.detach()} | dict(zip(named, grads, strict=True))
