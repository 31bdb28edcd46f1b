"""Triton: draw one token per row from the block statistics of its logits, and record the token.

`blocks_of` reads the logits once. Then one program per row does the rest of a decode step: the
row's uniform number u, the block in which u times the total weight falls, the column in that block,
the log-prob, and the inputs of the next step. It reads 2 V / BLOCK + BLOCK numbers per row. That is
1.4 MB at batch 256 and 151936 columns, so its time is that of a launch. PyTorch makes about 100.

The tokens are those of `sampling.draw_from_blocks` up to rounding: both sum in fp64, in different
orders.
"""

# Pyright checks Triton's functions as if they were Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from expo_fast.kernels.triton_common import launch_device

ROWS = 128  # rows per program of `record_tokens`

# Constants of SplitMix64 as int64; see `sampling.uniform`.
_GOLDEN: tl.constexpr = tl.constexpr(-0x61C8864680B583EB)
_MIX_1: tl.constexpr = tl.constexpr(-0x40A7B892E31B1A47)
_MIX_2: tl.constexpr = tl.constexpr(-0x6B2FB644ECCEEE15)


@dataclass(frozen=True)
class Progress:
    """The progress of B rows. Only a row's own program reads or writes the row's numbers."""

    last_tokens: Tensor  # (B,) int64, the newest tokens
    positions: Tensor  # (B,) int64, positions of the newest tokens
    history: Tensor  # (burst, 2, B) fp64, tokens and log-probs; fp64 represents both exactly
    index: Tensor  # (B,) int64, the index in `history` of the next token

    @classmethod
    def start(cls, last_tokens: Tensor, positions: Tensor, burst: int) -> "Progress":
        """Return the progress of rows at the start of a burst."""
        n_rows = len(positions)
        zeros = partial(torch.zeros, device=positions.device)
        return cls(
            last_tokens=last_tokens,
            positions=positions,
            history=zeros(burst, 2, n_rows, dtype=torch.float64),
            index=zeros(n_rows, dtype=torch.int64),
        )


class SampledRows(NamedTuple):
    """Tokens drawn by B rows, with their log-probs and uniform numbers."""

    tokens: Tensor  # (B,) int64
    logps: Tensor  # (B,) fp32 nats, NaN if the logits are not finite
    u: Tensor  # (B,) fp64 in [0, 1)


@triton.jit
def _shift_right(x, BITS: tl.constexpr):
    """Shift right and fill with zeros. `>>` of a signed number fills with the sign."""
    return (x >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit
def _mix(x):
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


@triton.jit
def _uniform(seed, position):
    """Return uniform numbers, bit-identical to `sampling.uniform`."""
    mixed = _mix(_mix(seed) ^ (position * _GOLDEN))
    return _shift_right(mixed, 11).to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def _search(weight, i, target):
    """Return the first i at which the running sum exceeds the target, and the remainder.

    The remainder is the target minus the running sum before i. If the target reaches the total by
    rounding, i is the last one of positive weight.
    """
    running = tl.cumsum(weight, 0)
    some = weight > 0
    last = tl.max(tl.where(some, i, 0), 0)
    # A rounded running sum might first exceed the target at an i of weight 0.
    first = tl.min(tl.where(some & (running > target), i, last), 0)
    before = tl.sum(tl.where(i == first, running - weight, 0.0), 0)
    return first, target - before


@triton.jit
def _record(row, inside, token, logp, last_tokens, positions, history, index, B, BURST):
    """Record the tokens of one row or a block of rows, and advance the rows by one position."""
    at = tl.load(index + row, inside, 0)
    place = history + at * (2 * B) + row
    tl.store(place, token.to(tl.float64), inside)
    tl.store(place + B, logp.to(tl.float64), inside)
    tl.store(index + row, (at + 1) % BURST, inside)
    tl.store(last_tokens + row, token, inside)
    tl.store(positions + row, tl.load(positions + row, inside, 0) + 1, inside)


@triton.jit
def draw_tokens(
    z, temperature, block_max, block_sum, seeds,  # (B, V), (B,), (B, BLOCKS) twice, (B,)
    last_tokens, positions, history, index,  # fields of `Progress`
    tokens, logps, us,  # (B,) out
    V, BLOCKS, B, BURST,
    MANY: tl.constexpr, BLOCK: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """Draw a token per row. One program per row. MANY: a power of two, at least BLOCKS."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(temperature + row)
    greedy = t == 0
    t = tl.where(greedy, 1.0, t)
    u = _uniform(tl.load(seeds + row), tl.load(positions + row) + 1)

    block = tl.arange(0, MANY)
    tops = tl.load(block_max + row * BLOCKS + block, block < BLOCKS, -float("inf"))
    sums = tl.load(block_sum + row * BLOCKS + block, block < BLOCKS, 0.0)
    largest = tl.max(tops, 0)
    mass = sums.to(tl.float64) * tl.exp((tops - largest).to(tl.float64))
    total = tl.sum(mass, 0)
    drawn_block, rest = _search(mass, block, u * total)
    best_block = tl.min(tl.where(tops == largest, block, BLOCKS - 1), 0)  # the last one if NaN
    chosen_block = tl.where(greedy, best_block, drawn_block)

    i = tl.arange(0, BLOCK)
    column = chosen_block * BLOCK + i
    logit = tl.load(z + row * V + column, column < V, -float("inf"))
    inside = (tl.div_rn(logit, t) - largest).to(tl.float64)
    drawn_i, _ = _search(tl.exp(inside), i, rest)
    last_i = tl.minimum(BLOCK, V - chosen_block * BLOCK) - 1
    best_i = tl.min(tl.where(inside == tl.max(inside, 0), i, last_i), 0)
    chosen = tl.where(greedy, best_i, drawn_i)
    # The total of a row with NaN, or with only -inf, makes its log-prob NaN.
    logp = (tl.sum(tl.where(i == chosen, inside, 0.0), 0) - tl.log(total)).to(tl.float32)
    token = (chosen_block * BLOCK + chosen).to(tl.int64)
    tl.store(tokens + row, token)
    tl.store(logps + row, logp)
    tl.store(us + row, u)
    if RECORD:
        _record(row, True, token, logp, last_tokens, positions, history, index, B, BURST)


@triton.jit
def record_tokens(
    tokens, logps, last_tokens, positions, history, index,  # (B,) twice, and fields of `Progress`
    B, BURST, ROWS: tl.constexpr,
):  # fmt: skip
    """Record tokens that are already drawn. One program per ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < B
    token = tl.load(tokens + row, inside, 0)
    logp = tl.load(logps + row, inside, 0.0)
    _record(row, inside, token, logp, last_tokens, positions, history, index, B, BURST)


def sample_rows(
    logits: Tensor,  # (B, V) fp32
    block_max: Tensor,  # (B, blocks) fp32, from `blocks_of`
    block_sum: Tensor,  # (B, blocks) fp32, from `blocks_of`
    size: int,  # number of columns of a block
    temperature: Tensor,  # (B,) fp32; 0: the likeliest token, with its log-prob at temperature 1
    seeds: Tensor,  # (B,) int64
    progress: Progress,
    *,
    record: bool,  # False: `progress` does not change; call `record` later
) -> SampledRows:
    """Draw the token of each row's next position, without truncation."""
    n_rows, n_columns = logits.shape
    n_blocks = block_max.shape[1]
    sampled = SampledRows(
        tokens=torch.empty_like(seeds),
        logps=torch.empty_like(temperature),
        u=temperature.new_empty(n_rows, dtype=torch.float64),
    )
    with launch_device(logits):
        draw_tokens[(n_rows,)](
            logits.contiguous(),
            temperature,
            block_max,
            block_sum,
            seeds,
            *_pointers(progress),
            *sampled,
            n_columns,
            n_blocks,
            n_rows,
            len(progress.history),
            MANY=triton.next_power_of_2(n_blocks),
            BLOCK=size,
            RECORD=record,
        )
    return sampled


def record(sampled: SampledRows, progress: Progress) -> None:
    """Record the tokens and log-probs in `progress`, and advance each row by one position."""
    n_rows = len(sampled.tokens)
    with launch_device(sampled.tokens):
        record_tokens[(triton.cdiv(n_rows, ROWS),)](
            sampled.tokens,
            sampled.logps,
            *_pointers(progress),
            n_rows,
            len(progress.history),
            ROWS=ROWS,
        )


def _pointers(progress: Progress) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of `progress` in the order of the kernels' arguments."""
    return progress.last_tokens, progress.positions, progress.history, progress.index
