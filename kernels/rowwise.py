"""Triton row kernels between cuBLAS GEMMs: a chunk's logits are read once forward, once backward.

    u_j = z_j - z_y    other = sum_{j != y} exp(u_j)    moment = sum_{j != y} exp(u_j) u_j
    dz_j = exp(z_j - lse) (c0 + c1 (z_j - lse))         dz_y given

One program a row. A row whose sum passes SAFE_SUM is read again, from its largest logit. Bytes a
logit, fp32 z and bf16 dz: 4 written by the GEMM, 4 read forward, 4 read and 2 written backward, 4
read by the GEMMs for the gradients. Runs every dtype on any GPU that Triton knows.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (of Triton's functions, which it takes for Python's)

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from expo_fast.kernels.head import Head, LogProb, Slopes, from_sums, slopes_about_lse
from expo_fast.kernels.products import bf16_in
from expo_fast.kernels.reference import Chunked, Tile

BLOCK = 4096  # logits of a row at a time: 16 a thread
WARPS = 8
SAFE_SUM = 2.0**20  # beyond, u is some 14 nats, and rounding it shows in the entropy
LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))


@triton.jit
def to_bf16(x, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # which cuts off what should be rounded to nearest, ties to even
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


def launch_device(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


INTERPRETED = not isinstance(to_bf16, triton.JITFunction)  # TRITON_INTERPRET=1: on a CPU


@triton.jit
def _sums(z, base, y, V, BLOCK: tl.constexpr):  # of exp(z - base) over all but y
    other = tl.zeros([BLOCK], z.dtype.element_ty)
    moment = tl.zeros([BLOCK], z.dtype.element_ty)
    for v in range(0, V, BLOCK):
        column = v + tl.arange(0, BLOCK)
        u = tl.load(z + column, column < V, -float("inf")) - base
        u = tl.where((column == y) | (column >= V), -1000.0, u)  # exp(u) and exp(u) u are 0 there
        e = tl.exp2(u * LOG2_E)
        other += e
        moment += e * u
    return tl.sum(other, 0), tl.sum(moment, 0)


@triton.jit
def row_sums(
    z, targets,  # (C, V), (C,) int64
    other, moment, anchor,  # (C,) out
    V, stride,
    SAFE_SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    z += row.to(tl.int64) * stride
    y = tl.load(targets + row)
    base = tl.load(z + y)
    s, m = _sums(z, base, y, V, BLOCK)
    if not s < SAFE_SUM:  # NaN too
        top = tl.full([BLOCK], -float("inf"), z.dtype.element_ty)
        for v in range(0, V, BLOCK):
            column = v + tl.arange(0, BLOCK)
            top = tl.maximum(top, tl.load(z + column, column < V, -float("inf")))
        base = tl.max(top, 0)
        s, m = _sums(z, base, y, V, BLOCK)
    tl.store(other + row, s)
    tl.store(moment + row, m)
    tl.store(anchor + row, base)


@triton.jit
def row_gradients(
    z, targets, base, c0, c1, at_target,  # (C, V), then (C,) each
    dz,  # (C, V) out; may be z
    V, stride,
    BLOCK: tl.constexpr, NARROW: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    z += row.to(tl.int64) * stride
    dz += row.to(tl.int64) * stride
    y, anchor = tl.load(targets + row), tl.load(base + row)
    a0, a1, own = tl.load(c0 + row), tl.load(c1 + row), tl.load(at_target + row)
    for v in range(0, V, BLOCK):
        column = v + tl.arange(0, BLOCK)
        u = tl.load(z + column, column < V, -float("inf")) - anchor
        g = tl.exp2(u * LOG2_E) * (a0 + a1 * u)
        g = tl.where(column == y, own, g)
        tl.store(dz + column, to_bf16(g, INTERPRETED) if NARROW else g, column < V)


class RowTile(Tile):
    """`eu` is the logits, and `e` room for their gradients."""

    @classmethod
    def softmax(cls, head: Head, z: Tensor, e: Tensor) -> "RowTile":
        n, v = z.shape
        other, moment, base = z.new_empty(3, n).unbind()
        given = z, head.targets, other, moment, base, v, z.stride(0)
        with launch_device(z):
            row_sums[(n,)](*given, SAFE_SUM, BLOCK, num_warps=WARPS)
        shift = base.double() - z.gather(1, head.targets[:, None])[:, 0]
        results, _ = from_sums(base.double(), other.double(), moment.double(), shift)
        return cls(results, e, z, None)

    @classmethod
    def known(cls, head: Head, results: LogProb, z: Tensor, e: Tensor) -> "RowTile":
        return cls(results, e, z, None)

    def logit_gradients(self, head: Head, slopes: Slopes) -> tuple[Tensor, Tensor]:
        z, dz, results = self.eu, self.e, self.results
        if head.narrow:
            dz = bf16_in(dz, z.shape)
        given = slopes_about_lse(results, slopes, head.temperature)
        given = z, head.targets, *given, dz, z.shape[1], z.stride(0)
        with launch_device(z):
            row_gradients[(len(z),)](*given, BLOCK, head.narrow, INTERPRETED, num_warps=WARPS)
        return dz, bf16_in(z, z.shape) if head.narrow else z


ROWWISE = Chunked(RowTile)
