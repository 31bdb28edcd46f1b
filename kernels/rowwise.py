"""Triton backend of row kernels between cuBLAS GEMMs.

A chunk's logits are read once in the forward pass and once in the backward pass.

    u_j = z_j - z_y    other = sum_{j != y} exp(u_j)    moment = sum_{j != y} exp(u_j) u_j
    dz_j = exp(z_j - lse) (c0 + c1 (z_j - lse))         dz_y given

There is one program per row. If a row's sum exceeds SAFE_SUM, the row is read again, with u
relative to its largest logit. Bytes per logit with fp32 z and bf16 dz: 4 written by the GEMM, 4
read in the forward pass, 4 read and 2 written in the backward pass, 4 read by the GEMMs of the
gradients. The kernels run with every dtype on any GPU that Triton supports.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Pyright checks Triton's functions as if they were Python.)

import triton
import triton.language as tl
from torch import Tensor

from expo_fast.kernels.head import Head, LogProb, RowGrads, from_sums, logit_grads_about_lse
from expo_fast.kernels.products import bf16_in
from expo_fast.kernels.reference import Chunked, Tile
from expo_fast.kernels.triton_common import LOG2_E, launch_device, to_bf16

BLOCK = 4096  # logits of a row per iteration, 16 per thread
WARPS = 8
SAFE_SUM = 2.0**20  # above it, u is about 14 nats, and its rounding affects the entropy


@triton.jit
def _sums(z, base, y, V, BLOCK: tl.constexpr):
    """Return `other` and `moment` of the row at z, with u relative to base."""
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
    """Write the sums of each row, and its anchor, the logit that they are relative to."""
    row = tl.program_id(0)
    z += row.to(tl.int64) * stride
    y = tl.load(targets + row)
    base = tl.load(z + y)
    s, m = _sums(z, base, y, V, BLOCK)
    if not s < SAFE_SUM:  # true for NaN
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
    BLOCK: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Write dz. base is lse, so exp(z - base) is a probability."""
    row = tl.program_id(0)
    z += row.to(tl.int64) * stride
    dz += row.to(tl.int64) * stride
    y = tl.load(targets + row)
    anchor = tl.load(base + row)
    a0 = tl.load(c0 + row)
    a1 = tl.load(c1 + row)
    own = tl.load(at_target + row)
    for v in range(0, V, BLOCK):
        column = v + tl.arange(0, BLOCK)
        u = tl.load(z + column, column < V, -float("inf")) - anchor
        g = tl.exp2(u * LOG2_E) * (a0 + a1 * u)
        g = tl.where(column == y, own, g)
        tl.store(dz + column, to_bf16(g) if NARROW else g, column < V)


class RowTile(Tile):
    """A tile whose `eu` has the logits, and whose `e` is the buffer for their gradients."""

    @classmethod
    def softmax(cls, head: Head, z: Tensor, buffer: Tensor) -> "RowTile":
        n, v = z.shape
        other, moment, base = z.new_empty(3, n).unbind()
        with launch_device(z):
            row_sums[(n,)](
                z, head.targets, other, moment, base, v, z.stride(0),
                SAFE_SUM=SAFE_SUM, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
        shift = base.double() - z.gather(1, head.targets[:, None])[:, 0]
        results, _ = from_sums(base.double(), other.double(), moment.double(), shift)
        return cls(results, e=buffer, eu=z, log_total=None)

    @classmethod
    def known(cls, head: Head, results: LogProb, z: Tensor, buffer: Tensor) -> "RowTile":
        return cls(results, e=buffer, eu=z, log_total=None)

    def logit_gradients(self, head: Head, row_grads: RowGrads) -> tuple[Tensor, Tensor]:
        z, dz = self.eu, self.e
        if head.narrow:
            dz = bf16_in(dz, z.shape)
        base, coefficients = logit_grads_about_lse(self.results, row_grads, head.temperature)
        with launch_device(z):
            row_gradients[(len(z),)](
                z, head.targets, base, *coefficients, dz, z.shape[1], z.stride(0),
                BLOCK=BLOCK, NARROW=head.narrow, num_warps=WARPS,
            )  # fmt: skip
        return dz, bf16_in(z, z.shape) if head.narrow else z


ROWWISE = Chunked(RowTile)
