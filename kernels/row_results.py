"""Triton: the results of rows from the partial sums of their column tiles, in one launch.

Between its GEMMs, the fused head computes a few numbers per row. PyTorch launches about 30 kernels
for them. On an H100 these launches took as long as the GEMM of 1024 rows.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# (Pyright checks Triton's functions as if they were Python.)

import triton
import triton.language as tl

from expo_fast.kernels.triton_common import to_bf16

ROWS = 32  # rows per program, which reads 128 bytes of each tile
AT_ONCE = 32  # number of tiles whose partial sums are loaded together


@triton.jit
def _expm1(x):
    """Return expm1 of fp64, which Triton lacks. The rounding error of exp(x) is corrected."""
    u = tl.exp(x)
    is_near = (u > 0.5) & (u < 2.0)
    is_at = u == 1.0
    by_log = (u - 1.0) * (x / tl.log(tl.where(is_near & ~is_at, u, 2.0)))
    return tl.where(is_at, x, tl.where(is_near, by_log, u - 1.0))


@triton.jit
def _log1p(x):
    """Return log1p of fp64 for x >= -1, corrected in the same way."""
    u = 1.0 + x
    is_near = (u > 0.5) & (u < 2.0)
    is_at = u == 1.0
    by_log = tl.log(u) * (x / tl.where(is_near & ~is_at, u - 1.0, 1.0))
    return tl.where(is_at, x, tl.where(is_near, by_log, tl.log(u)))


@triton.jit
def _sum_of_tiles(partials, row, inside, N, TILES, ROWS: tl.constexpr, AT_ONCE: tl.constexpr):
    """Return (ROWS,) fp64 sums over the rows' column tiles, in a fixed order."""
    total = tl.zeros([AT_ONCE, ROWS], tl.float64)
    for first in range(0, TILES, AT_ONCE):
        tile = first + tl.arange(0, AT_ONCE)
        at = tile.to(tl.int64)[:, None] * N + row[None, :]
        part = tl.load(partials + at, (tile < TILES)[:, None] & inside[None, :], 0.0)
        total += part.to(tl.float64)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["N"])
def row_results(
    other, moment,  # (column tiles, N), as softmax_sums writes them
    z, base, scale, targets,  # (N,); z: the targets' logits before temperature
    any_again, tile_again, row_again,  # bool flags: (1,), (row tiles,), (N,)
    logp, entropy, lse, log_total,  # (N,) fp64 out
    e, se,  # (N, V) or None, updated at the targets; stride of its rows
    N, V,
    BN: tl.constexpr, BV: tl.constexpr, SAFE_SUM: tl.constexpr, LOG2_E: tl.constexpr,
    REDONE: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Write the results of each row (head.from_sums). ROWS rows per program.

    The first launch sets the flags of rows that must be computed again, of their row tiles, and
    whether there is any. With REDONE, it writes the results of the rows of these tiles.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    if REDONE:
        inside = row < tl.where(tl.load(any_again).to(tl.int32) != 0, N, 0)
        inside = inside & (tl.load(tile_again + row // BN, inside, 0).to(tl.int32) != 0)
    if not REDONE or tl.max(inside.to(tl.int32), 0) > 0:
        tiles_v = tl.cdiv(V, BV)
        total = _sum_of_tiles(other, row, inside, N, tiles_v, ROWS, AT_ONCE)
        if not REDONE:
            wrong = inside & ~(total < SAFE_SUM)  # true for NaN
            tl.store(any_again + row * 0, wrong, wrong)  # all threads that write it write True
            tl.store(tile_again + row // BN, wrong, wrong)
            tl.store(row_again + row, wrong, inside)
        s = tl.load(scale + row, inside, 1.0).to(tl.float64)
        b = tl.load(base + row, inside, 0.0).to(tl.float64)
        anchor = tl.load(z + row, inside, 0.0).to(tl.float64) * s
        shift = (b - anchor) / LOG2_E  # includes the rounding of base to fp32
        log_sum = _log1p(total + _expm1(-shift))
        log_p = -shift - log_sum
        h = tl.full([ROWS], float("nan"), tl.float64)
        if moment is not None:
            own = tl.exp(-shift)
            m = _sum_of_tiles(moment, row, inside, N, tiles_v, ROWS, AT_ONCE) / LOG2_E
            h = log_sum - (m - own * shift) / (own + total)
        tl.store(logp + row, log_p, inside)
        tl.store(entropy + row, h, inside)
        tl.store(lse + row, b / LOG2_E + log_sum, inside)
        tl.store(log_total + row, log_sum, inside)
        if e is not None:
            y = tl.load(targets + row, inside, 0)
            patch = _expm1(log_p) * tl.exp(log_sum)
            tl.store(e + row.to(tl.int64) * se + y, to_bf16(patch.to(tl.float32)), inside)


@triton.jit(do_not_specialize=["N"])
def largest_logits(
    largest,  # (column tiles, N)
    any_again, row_again,  # flags of row_results
    base,  # (N,) out
    N, V,
    BV: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Write `base` of the rows that are computed again: their largest logit, in bits."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wrong = row < tl.where(tl.load(any_again).to(tl.int32) != 0, N, 0)
    wrong = wrong & (tl.load(row_again + row, wrong, 0).to(tl.int32) != 0)
    if tl.max(wrong.to(tl.int32), 0) > 0:
        tiles = tl.cdiv(V, BV)
        top = tl.full([AT_ONCE, ROWS], -float("inf"), tl.float32)
        for first in range(0, tiles, AT_ONCE):
            tile = first + tl.arange(0, AT_ONCE)
            at = tile.to(tl.int64)[:, None] * N + row[None, :]
            mask = (tile < tiles)[:, None] & wrong[None, :]
            top = tl.maximum(top, tl.load(largest + at, mask, -float("inf")))
        tl.store(base + row, tl.max(top, 0), wrong)
