"""Triton: a row's results from the partial sums of its tiles of columns, in one launch.

Between its GEMMs the fused head works on numbers of rows alone. PyTorch takes some 30 kernels for
that, and on an H100 they took as long to launch as 1024 rows to multiply.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# (of Triton's functions, which it takes for Python's)

import triton
import triton.language as tl

from expo_fast.kernels.rowwise import to_bf16

ROWS = 32  # of a program: it reads 128 bytes of each tile
AT_ONCE = 32  # tiles whose partial sums are loaded together


@triton.jit
def _expm1(x):
    """expm1 of fp64, which Triton lacks: what 1 + (exp(x) - 1) has lost is scaled back."""
    u = tl.exp(x)
    is_near = (u > 0.5) & (u < 2.0)
    is_at = u == 1.0
    by_log = (u - 1.0) * (x / tl.log(tl.where(is_near & ~is_at, u, 2.0)))
    return tl.where(is_at, x, tl.where(is_near, by_log, u - 1.0))


@triton.jit
def _log1p(x):
    """log1p of fp64 for x >= -1, in the same way."""
    u = 1.0 + x
    is_near = (u > 0.5) & (u < 2.0)
    is_at = u == 1.0
    by_log = tl.log(u) * (x / tl.where(is_near & ~is_at, u - 1.0, 1.0))
    return tl.where(is_at, x, tl.where(is_near, by_log, tl.log(u)))


@triton.jit
def _sum_of_tiles(partials, row, inside, N, TILES, ROWS: tl.constexpr, AT_ONCE: tl.constexpr):
    """(ROWS,) fp64: the sums over a row's tiles of columns, in a fixed order."""
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
    z, base, scale, targets,  # (N,); z the target's logit before temperature
    again,  # (1 + row tiles + N,) bool: what softmax_sums reads, and which rows
    logp, entropy, lse, log_total,  # (N,) fp64 out
    e, se,  # (N, V) or None, to be patched at the targets; stride of its rows
    N, V,
    BN: tl.constexpr, BV: tl.constexpr, SAFE_SUM: tl.constexpr, LOG2_E: tl.constexpr,
    REDONE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Return the results of each row (head.from_sums). ROWS rows a program.

    At first it marks in `again` what has to be redone. If REDONE, it does the tiles marked.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    tiles_n = tl.cdiv(N, BN)
    if REDONE:
        inside = row < N * tl.load(again).to(tl.int32)
        marked = tl.load(again + 1 + row // BN, inside, 0).to(tl.int32)
        inside = inside & (marked != 0)
    if not REDONE or tl.max(inside.to(tl.int32), 0) > 0:
        tiles_v = tl.cdiv(V, BV)
        total = _sum_of_tiles(other, row, inside, N, tiles_v, ROWS, AT_ONCE)
        if not REDONE:
            wrong = inside & ~(total < SAFE_SUM)  # NaN too
            tl.store(again + row * 0, wrong, wrong)  # all that write there write the same
            tl.store(again + 1 + row // BN, wrong, wrong)
            tl.store(again + 1 + tiles_n + row, wrong, inside)
        s = tl.load(scale + row, inside, 1.0).to(tl.float64)
        b = tl.load(base + row, inside, 0.0).to(tl.float64)
        anchor = tl.load(z + row, inside, 0.0).to(tl.float64) * s
        shift = (b - anchor) / LOG2_E  # that base is rounded to fp32 is part of it
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
            tl.store(e + row.to(tl.int64) * se + y, to_bf16(patch.to(tl.float32), WIDE), inside)


@triton.jit(do_not_specialize=["N"])
def largest_logits(
    largest, again, base,  # (column tiles, N); as row_results marks it; (N,) out
    N, V,
    BN: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Return base of the rows that are redone: their largest logit, in bits."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wrong = row < N * tl.load(again).to(tl.int32)
    marked = tl.load(again + 1 + tl.cdiv(N, BN) + row, wrong, 0).to(tl.int32)
    wrong = wrong & (marked != 0)
    if tl.max(wrong.to(tl.int32), 0) > 0:
        tiles = tl.cdiv(V, BV)
        top = tl.full([AT_ONCE, ROWS], -float("inf"), tl.float32)
        for first in range(0, tiles, AT_ONCE):
            tile = first + tl.arange(0, AT_ONCE)
            at = tile.to(tl.int64)[:, None] * N + row[None, :]
            mask = (tile < tiles)[:, None] & wrong[None, :]
            top = tl.maximum(top, tl.load(largest + at, mask, -float("inf")))
        tl.store(base + row, tl.max(top, 0), wrong)
