"""Triton: a draw among the tokens that top-k, top-p and min-p leave, with neither sort nor host.

    d_i = max_j z_j / T - z_i / T        w_i = exp(-d_i)

Tokens in the order of their depth d, equal ones by column: each rule leaves a beginning of these,
and a draw takes the first at which the running sum of w passes u times the sum of what is left.
So all of them ask for the least depth within which there are so many tokens, or so much weight.
Depths are not negative, and such floats are ordered like their bits: 31 looks at a row find it. A
look tests the largest logit of every block, and reads the blocks that lie within the depth it
tries: few where some tokens stand out, the whole row where none does, and there may be three such
searches. No GPU has timed it; what it replaces, a sort of the 512 largest, made the host wait twice
a token. Tokens are those of `sampling.draw` where weights in fp32 tell depths apart, at
temperatures below 1e4 or so.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# (of Triton's functions, which it takes for Python's)

import triton
import triton.language as tl
from torch import Tensor

from expo_fast.kernels.rowwise import LOG2_E, launch_device

DEEPEST = 0x42D00000  # bits of 104: beyond, a weight is 0 in fp32
TOGETHER = 16  # blocks that a look tests at once
WARPS = 8


@triton.jit
def _depths(z, column, V, t, highest):
    return highest - tl.div_rn(tl.load(z + column, column < V, -float("inf")), t)


@triton.jit
def _weight(depth):
    return tl.exp2(-depth * LOG2_E)


@triton.jit
def _within(z, top, t, highest, bits, V, BLOCKS, BLOCK: tl.constexpr, TOGETHER: tl.constexpr):
    """How many tokens lie within a depth, and their weight; none for bits of -1, a NaN."""
    limit = bits.to(tl.float32, bitcast=True)
    count = tl.zeros([TOGETHER * BLOCK], tl.int32)  # of each lane: warps meet once a look
    mass = tl.zeros([TOGETHER * BLOCK], tl.float64)
    for first in range(0, BLOCKS, TOGETHER):
        block = first + tl.arange(0, TOGETHER)
        nearest = highest - tl.load(top + block, block < BLOCKS, -float("inf"))
        if tl.min(nearest, 0) <= limit:
            depth = _depths(z, first * BLOCK + tl.arange(0, TOGETHER * BLOCK), V, t, highest)
            inside = depth <= limit
            count += inside.to(tl.int32)
            mass += tl.where(inside, _weight(depth), 0.0).to(tl.float64)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _reach(
    z, top, t, highest, end, goal, V, BLOCKS,
    COUNT: tl.constexpr, STRICT: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Bits of the least depth that holds `goal` tokens or so much weight (STRICT: more than it);
    `end` where none below does.
    """
    short, enough = tl.full([], -1, tl.int32), end
    while enough - short > 1:
        middle = short + (enough - short) // 2
        count, mass = _within(z, top, t, highest, middle, V, BLOCKS, BLOCK, TOGETHER)
        held = count.to(tl.float64) if COUNT else mass
        holds = held > goal if STRICT else held >= goal
        enough, short = tl.where(holds, middle, enough), tl.where(holds, short, middle)
    return enough


@triton.jit
def draw_allowed(
    z, temperature, top, total, top_k, top_p, min_p, u,  # (B, V), (B,), (B, BLOCKS) twice, (B,)
    token, logp,  # (B,) int64, (B,) fp32: of rows that nothing truncates they stay
    V, BLOCKS, DEEPEST: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    t, k = tl.load(temperature + row), tl.load(top_k + row)
    p, least = tl.load(top_p + row), tl.load(min_p + row)
    if (t > 0) & ((k > 0) | (p < 1) | (least > 0)):
        z, top, total = z + row * V, top + row * BLOCKS, total + row * BLOCKS
        highest = tl.full([], -float("inf"), tl.float32)
        for first in range(0, BLOCKS, BLOCK):
            block = first + tl.arange(0, BLOCK)
            highest = tl.maximum(highest, tl.max(tl.load(top + block, block < BLOCKS, highest), 0))
        whole = tl.zeros([], tl.float64)
        for first in range(0, BLOCKS, BLOCK):
            block = first + tl.arange(0, BLOCK)
            nearest = highest - tl.load(top + block, block < BLOCKS, -float("inf"))
            sums = tl.load(total + block, block < BLOCKS, 0.0)
            whole += tl.sum((sums * _weight(nearest)).to(tl.float64), 0)

        # what is left: all tokens less deep than `end`, and the first `ties` of those as deep
        end, ties, mass = tl.full([], DEEPEST, tl.int32), tl.full([], V, tl.int32), whole
        if k > 0:
            goal = k.to(tl.float64)
            end = _reach(z, top, t, highest, end, goal, V, BLOCKS, True, False, BLOCK, TOGETHER)
            count, before = _within(z, top, t, highest, end - 1, V, BLOCKS, BLOCK, TOGETHER)
            ties = (k - count).to(tl.int32)
            mass = before + ties * _weight(end.to(tl.float32, bitcast=True)).to(tl.float64)
        if p < 1:
            goal = p.to(tl.float64) * mass
            nucleus = _reach(
                z, top, t, highest, end, goal, V, BLOCKS, False, False, BLOCK, TOGETHER
            )
            _, before = _within(z, top, t, highest, nucleus - 1, V, BLOCKS, BLOCK, TOGETHER)
            each = _weight(nucleus.to(tl.float32, bitcast=True)).to(tl.float64)
            end, ties = nucleus, tl.ceil((goal - before) / each).to(tl.int32)
        if least > 0:
            lightest = tl.abs(tl.log(least)).to(tl.int32, bitcast=True)
            ties = tl.where(lightest < end, V, ties)
            end = tl.minimum(end, lightest)

        inside, before = _within(z, top, t, highest, end - 1, V, BLOCKS, BLOCK, TOGETHER)
        there, _ = _within(z, top, t, highest, end, V, BLOCKS, BLOCK, TOGETHER)
        ties = tl.minimum(ties, there - inside)
        mass = before + ties * _weight(end.to(tl.float32, bitcast=True)).to(tl.float64)
        goal = tl.load(u + row) * mass
        at = _reach(z, top, t, highest, end, goal, V, BLOCKS, False, True, BLOCK, TOGETHER)
        inside, before = _within(z, top, t, highest, at - 1, V, BLOCKS, BLOCK, TOGETHER)
        there, _ = _within(z, top, t, highest, at, V, BLOCKS, BLOCK, TOGETHER)
        depth = at.to(tl.float32, bitcast=True)
        rank = tl.floor((goal - before) / _weight(depth).to(tl.float64)).to(tl.int32)
        rank = tl.maximum(tl.minimum(rank, there - inside - 1), 0)  # sums in another order round

        chosen, seen = tl.zeros([], tl.int64), tl.zeros([], tl.int32)
        for first in range(0, BLOCKS, TOGETHER):
            block = first + tl.arange(0, TOGETHER)
            nearest = highest - tl.load(top + block, block < BLOCKS, -float("inf"))
            if tl.min(nearest, 0) <= depth:
                column = first * BLOCK + tl.arange(0, TOGETHER * BLOCK)
                alike = (_depths(z, column, V, t, highest) == depth).to(tl.int32)
                mine = (alike == 1) & (seen + tl.cumsum(alike, 0) == rank + 1)
                chosen += tl.sum(tl.where(mine, column, 0), 0)
                seen += tl.sum(alike, 0)
        tl.store(token + row, chosen)
        tl.store(logp + row, (-depth.to(tl.float64) - tl.log(whole)).to(tl.float32))


def redraw(
    logits: Tensor,  # (B, V) fp32
    top: Tensor,  # (B, blocks) fp32, and
    total: Tensor,  # (B, blocks) fp32: `blocks_of` the logits
    size: int,  # columns of a block
    temperature: Tensor,  # (B,) fp32
    rules: tuple[Tensor, Tensor, Tensor],  # (B,) each: top-k int64, top-p fp32, min-p fp32
    u: Tensor,  # (B,) fp64 in [0, 1)
    token: Tensor,  # (B,) int64, and
    logp: Tensor,  # (B,) fp32 nats: replaced in rows that a rule applies to
) -> None:
    (n, v), count, logits = logits.shape, top.shape[1], logits.contiguous()
    with launch_device(logits):
        draw_allowed[(n,)](
            logits, temperature, top, total, *rules, u, token, logp, v, count,
            DEEPEST=DEEPEST, BLOCK=size, TOGETHER=TOGETHER, num_warps=WARPS,
        )  # fmt: skip
