"""Triton: draw from the tokens that top-k, top-p and min-p allow, without a sort or a host sync.

    d_i = max_j z_j / T - z_i / T        w_i = exp(-d_i)

Order the tokens by their gap d to the largest logit, and equal gaps by column. Each rule allows a
prefix of this order. A draw takes the first token at which the running sum of w exceeds u times the
weight of the allowed tokens. Every rule, and the draw, therefore needs the smallest gap within
which there is a given number of tokens, or a given weight. Gaps are not negative, and such floats
have the order of their bits, so a bisection of 31 steps finds this gap.

A step of the bisection tests the largest logit of every block, and reads the blocks within the gap
that it tries. These are few for peaked logits, and the full row for flat logits. There are up to
three bisections. On an H100, 256 rows of 151936 columns take 2.1 ms (top-p 0.9, peaked logits) to
4.5 ms (flat logits). The alternative, a sort of the 512 largest logits, takes 0.7 ms, but makes the
host wait twice per token. The tokens are those of `sampling.draw_from_logits` if different gaps
have different fp32 weights, which holds for temperatures below about 1e4.
"""

# Pyright checks Triton's functions as if they were Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor

from expo_fast.kernels.triton_common import LOG2_E, launch_device

LARGEST_GAP = 0x42D00000  # bits of 104.0 nats; the weight of a larger gap is 0 in fp32
TOGETHER = 16  # number of blocks that are tested at once
WARPS = 8


@triton.jit
def _gaps(z, column, V, t, largest):
    logit = tl.load(z + column, column < V, -float("inf"))
    return largest - tl.div_rn(logit, t)


@triton.jit
def _weight(gap):
    return tl.exp2(-gap * LOG2_E)


@triton.jit
def _weight_at(bits):
    """Return the weight of a token at the gap with these bits, as fp64."""
    return _weight(bits.to(tl.float32, bitcast=True)).to(tl.float64)


@triton.jit
def _nearest(block_max, block, BLOCKS, largest):
    """Return the smallest gap in each of the blocks."""
    return largest - tl.load(block_max + block, block < BLOCKS, -float("inf"))


@triton.jit
def _within(z, block_max, t, largest, bits, V, BLOCKS, BLOCK: tl.constexpr, TOGETHER: tl.constexpr):
    """Return the number of tokens within a gap, and their weight. The bits -1 (NaN) give 0."""
    limit = bits.to(tl.float32, bitcast=True)
    # One sum per element: warps are reduced only once, after the loop.
    count = tl.zeros([TOGETHER * BLOCK], tl.int32)
    mass = tl.zeros([TOGETHER * BLOCK], tl.float64)
    for first in range(0, BLOCKS, TOGETHER):
        nearest = _nearest(block_max, first + tl.arange(0, TOGETHER), BLOCKS, largest)
        if tl.min(nearest, 0) <= limit:
            column = first * BLOCK + tl.arange(0, TOGETHER * BLOCK)
            gap = _gaps(z, column, V, t, largest)
            inside = gap <= limit
            count += inside.to(tl.int32)
            mass += tl.where(inside, _weight(gap), 0.0).to(tl.float64)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _reach(
    z, block_max, t, largest, end, goal,
    V, BLOCKS,
    COUNT: tl.constexpr, STRICT: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Return the bits of the smallest gap below `end` that reaches the goal, or `end` if none does.

    COUNT: whether the goal is a number of tokens, and not a weight.
    STRICT: whether the goal must be exceeded.
    """
    short = tl.full([], -1, tl.int32)
    enough = end
    while enough - short > 1:
        middle = short + (enough - short) // 2
        count, mass = _within(z, block_max, t, largest, middle, V, BLOCKS, BLOCK, TOGETHER)
        held = count.to(tl.float64) if COUNT else mass
        holds = held > goal if STRICT else held >= goal
        enough = tl.where(holds, middle, enough)
        short = tl.where(holds, short, middle)
    return enough


@triton.jit
def _largest(block_max, BLOCKS, BLOCK: tl.constexpr):
    """Return the largest logit / temperature of a row."""
    largest = tl.full([], -float("inf"), tl.float32)
    for first in range(0, BLOCKS, BLOCK):
        block = first + tl.arange(0, BLOCK)
        in_blocks = tl.load(block_max + block, block < BLOCKS, largest)
        largest = tl.maximum(largest, tl.max(in_blocks, 0))
    return largest


@triton.jit
def _total(block_max, block_sum, largest, BLOCKS, BLOCK: tl.constexpr):
    """Return the weight of all tokens of a row."""
    total = tl.zeros([], tl.float64)
    for first in range(0, BLOCKS, BLOCK):
        block = first + tl.arange(0, BLOCK)
        nearest = _nearest(block_max, block, BLOCKS, largest)
        sums = tl.load(block_sum + block, block < BLOCKS, 0.0)
        total += tl.sum((sums * _weight(nearest)).to(tl.float64), 0)
    return total


@triton.jit
def _column_of(
    z, block_max, t, largest, gap, rank, V, BLOCKS, BLOCK: tl.constexpr, TOGETHER: tl.constexpr
):
    """Return the column of the token with number `rank`, from 0, among the tokens of this gap."""
    chosen = tl.zeros([], tl.int64)
    seen = tl.zeros([], tl.int32)
    for first in range(0, BLOCKS, TOGETHER):
        nearest = _nearest(block_max, first + tl.arange(0, TOGETHER), BLOCKS, largest)
        if tl.min(nearest, 0) <= gap:
            column = first * BLOCK + tl.arange(0, TOGETHER * BLOCK)
            equal = (_gaps(z, column, V, t, largest) == gap).to(tl.int32)
            mine = (equal == 1) & (seen + tl.cumsum(equal, 0) == rank + 1)
            chosen += tl.sum(tl.where(mine, column, 0), 0)
            seen += tl.sum(equal, 0)
    return chosen


@triton.jit
def draw_allowed(
    z, temperature, top, total, top_k, top_p, min_p, u,  # (B, V), (B,), (B, BLOCKS) twice, (B,)
    token, logp,  # (B,) int64, (B,) fp32, written only in rows that a rule truncates
    V, BLOCKS, LARGEST_GAP: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Draw in the rows that a rule truncates. One program per row.

    top, total: block_max and block_sum of `blocks.py`.
    """
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(temperature + row)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    least = tl.load(min_p + row)
    if (t > 0) & ((k > 0) | (p < 1) | (least > 0)):
        z += row * V
        top += row * BLOCKS
        total += row * BLOCKS
        largest = _largest(top, BLOCKS, BLOCK)
        all_mass = _total(top, total, largest, BLOCKS, BLOCK)

        # The allowed tokens are all with a gap below `end`, and the first `ties` of the gap `end`.
        end = tl.full([], LARGEST_GAP, tl.int32)
        ties = tl.full([], V, tl.int32)
        mass = all_mass
        if k > 0:
            goal = k.to(tl.float64)
            end = _reach(z, top, t, largest, end, goal, V, BLOCKS, True, False, BLOCK, TOGETHER)
            count, before = _within(z, top, t, largest, end - 1, V, BLOCKS, BLOCK, TOGETHER)
            ties = (k - count).to(tl.int32)
            mass = before + ties * _weight_at(end)
        if p < 1:
            goal = p.to(tl.float64) * mass
            end = _reach(z, top, t, largest, end, goal, V, BLOCKS, False, False, BLOCK, TOGETHER)
            _, before = _within(z, top, t, largest, end - 1, V, BLOCKS, BLOCK, TOGETHER)
            ties = tl.ceil((goal - before) / _weight_at(end)).to(tl.int32)
        if least > 0:
            lightest = tl.abs(tl.log(least)).to(tl.int32, bitcast=True)
            ties = tl.where(lightest < end, V, ties)
            end = tl.minimum(end, lightest)
        inside, before = _within(z, top, t, largest, end - 1, V, BLOCKS, BLOCK, TOGETHER)
        there, _ = _within(z, top, t, largest, end, V, BLOCKS, BLOCK, TOGETHER)
        ties = tl.minimum(ties, there - inside)
        mass = before + ties * _weight_at(end)

        # Find the gap of the drawn token, then its column among the tokens of that gap.
        goal = tl.load(u + row) * mass
        drawn = _reach(z, top, t, largest, end, goal, V, BLOCKS, False, True, BLOCK, TOGETHER)
        inside, before = _within(z, top, t, largest, drawn - 1, V, BLOCKS, BLOCK, TOGETHER)
        there, _ = _within(z, top, t, largest, drawn, V, BLOCKS, BLOCK, TOGETHER)
        rank = tl.floor((goal - before) / _weight_at(drawn)).to(tl.int32)
        # Sums in another order round differently, so clamp the rank to the existing tokens.
        rank = tl.maximum(tl.minimum(rank, there - inside - 1), 0)
        gap = drawn.to(tl.float32, bitcast=True)
        chosen = _column_of(z, top, t, largest, gap, rank, V, BLOCKS, BLOCK, TOGETHER)
        tl.store(token + row, chosen)
        tl.store(logp + row, (-gap.to(tl.float64) - tl.log(all_mass)).to(tl.float32))


def redraw(
    logits: Tensor,  # (B, V) fp32
    block_max: Tensor,  # (B, blocks) fp32, from `blocks_of`
    block_sum: Tensor,  # (B, blocks) fp32, from `blocks_of`
    size: int,  # number of columns of a block
    temperature: Tensor,  # (B,) fp32
    u: Tensor,  # (B,) fp64 in [0, 1)
    *,
    top_k: Tensor,  # (B,) int64
    top_p: Tensor,  # (B,) fp32
    min_p: Tensor,  # (B,) fp32
    tokens: Tensor,  # (B,) int64, overwritten in rows that a rule applies to
    logps: Tensor,  # (B,) fp32 nats, overwritten in the same rows
) -> None:
    """Draw again in the rows that a rule truncates."""
    n_rows, n_columns = logits.shape
    n_blocks = block_max.shape[1]
    with launch_device(logits):
        draw_allowed[(n_rows,)](
            logits.contiguous(),
            temperature,
            block_max,
            block_sum,
            top_k,
            top_p,
            min_p,
            u,
            tokens,
            logps,
            n_columns,
            n_blocks,
            LARGEST_GAP=LARGEST_GAP,
            BLOCK=size,
            TOGETHER=TOGETHER,
            num_warps=WARPS,
        )
