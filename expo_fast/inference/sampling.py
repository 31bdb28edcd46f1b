"""Draw a token from logits and return its log-prob, one row per sequence.

A row draws with one uniform number, which depends only on (seed, position). A row's token therefore
depends on its own logits and not on its batch, nor on how often the run was resumed.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 256  # vocabulary columns per partial sum: a draw reads V/BLOCK + BLOCK numbers, not V
NUCLEUS_COLUMNS = 512  # number of largest weights that nearly always contain the nucleus

# Constants of SplitMix64 (doi:10.1145/2714064.2660195) as int64.
_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15


class SampledTokens(NamedTuple):
    """Sampled tokens and their log-probs, both of one shape."""

    tokens: Tensor  # int64
    logps: Tensor  # fp32 nats, at the temperature and before any truncation


@dataclass(frozen=True)
class Truncation:
    """Rules for the tokens that may be drawn. Each rule applies to what the previous ones leave."""

    top_k: Tensor  # (B,) int, 0 = all
    top_p: Tensor  # (B,) fp32, 1 = all (nucleus sampling, arXiv:1904.09751)
    min_p: Tensor  # (B,) fp32, 0 = all; relative to the likeliest token (arXiv:2407.01082)

    def __getitem__(self, rows: Any) -> "Truncation":
        return Truncation(
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            min_p=self.min_p[rows],
        )

    def to(self, device: torch.device) -> "Truncation":
        return Truncation(
            top_k=self.top_k.to(device),
            top_p=self.top_p.to(device),
            min_p=self.min_p.to(device),
        )

    def active(self) -> Tensor:
        """Return (B,) bool: rows with a rule that excludes tokens."""
        return (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)


@dataclass(frozen=True)
class Sampling:
    """Sampling options of B rows. The random number of a draw depends only on (seed, position)."""

    seeds: Tensor  # (B,) int64
    temperature: Tensor  # (B,) fp32; 0: the likeliest token, with its log-prob at temperature 1
    truncation: Truncation

    def __getitem__(self, rows: Any) -> "Sampling":
        return Sampling(
            seeds=self.seeds[rows],
            temperature=self.temperature[rows],
            truncation=self.truncation[rows],
        )

    def to(self, device: torch.device) -> "Sampling":
        return Sampling(
            seeds=self.seeds.to(device),
            temperature=self.temperature.to(device),
            truncation=self.truncation.to(device),
        )

    def truncated(self) -> Tensor:
        """Return (B,) bool: rows whose draw a truncation rule restricts."""
        return self.truncation.active() & (self.temperature > 0)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Return (B,) fp64 numbers in [0, 1) for seeds and positions (B,) int64, by SplitMix64."""
    mixed = _mix(_mix(seeds) ^ (positions * _GOLDEN))
    return _shift_right(mixed, 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros. torch's >> fills with the sign."""
    mask = (1 << (64 - bits)) - 1
    return (x >> bits) & mask


def draw_from_logits(
    logits: Tensor,  # (B, V) fp32, overwritten
    temperature: Tensor,  # (B,) fp32; 0: the likeliest token, with its log-prob at temperature 1
    truncation: Truncation,
    u: Tensor,  # (B,) fp64 in [0, 1)
) -> SampledTokens:
    """Draw one token per row. Return (B,) tokens and log-probs.

    The log-prob is NaN for a row that contains NaN, or only -inf.
    """
    greedy = temperature == 0
    logits /= torch.where(greedy, 1.0, temperature)[:, None]
    largest, best = logits.max(-1)
    weights = logits.sub_(largest[:, None]).exp_()  # unnormalized; the likeliest token has 1
    block_sums = _block_sums(weights)
    totals = block_sums.sum(-1)
    tokens = torch.where(greedy, best, _inverse_cdf(weights, block_sums, u))
    truncated = (truncation.active() & ~greedy).nonzero().squeeze(-1)
    if len(truncated):
        tokens[truncated] = _draw_truncated(
            weights[truncated], totals[truncated], truncation[truncated], u[truncated]
        )
    chosen = weights.gather(1, tokens[:, None]).squeeze(1)
    logps = chosen.double().log() - totals.log()
    return SampledTokens(tokens, logps.float())


def draw_from_blocks(
    logits: Tensor,  # (B, V) fp32
    block_max: Tensor,  # (B, blocks) fp32, max of logit / temperature in each BLOCK columns
    block_sum: Tensor,  # (B, blocks) fp32, sum of exp(logit / temperature - block_max)
    temperature: Tensor,  # (B,) fp32
    u: Tensor,  # (B,) fp64 in [0, 1)
) -> SampledTokens:
    """Draw as `draw_from_logits` does without truncation, using the block statistics of the logits.

    This is the definition in PyTorch of the draw that kernels/draw.py makes. Tests and the items of
    benchmarks/lease.sh compare the two.
    """
    greedy = temperature == 0
    last_column = logits.shape[1] - 1
    largest = block_max.max(-1).values
    relative_max = block_max - largest[:, None]
    weights = block_sum.double() * relative_max.double().exp()
    total = weights.sum(-1)
    block, rest = _search(weights, u * total)
    block = torch.where(greedy, block_max.argmax(-1), block)
    columns = _columns_of(block)
    inside = logits.gather(1, columns.clamp_max(last_column))
    inside = inside / torch.where(greedy, 1.0, temperature)[:, None]
    inside = inside - largest[:, None]
    inside = inside.masked_fill(columns > last_column, -torch.inf).double()
    sampled, _ = _search(inside.exp(), rest)
    column = torch.where(greedy, inside.argmax(-1), sampled)
    chosen = inside.gather(1, column[:, None]).squeeze(1)
    logps = chosen - total.log()
    return SampledTokens(block * BLOCK + column, logps.float())


def _columns_of(block: Tensor) -> Tensor:
    """Return the (B, BLOCK) columns of one block per row. block: (B,)."""
    return block[:, None] * BLOCK + torch.arange(BLOCK, device=block.device)


def _block_sums(weights: Tensor) -> Tensor:
    """Return the sums of (B, V) over blocks of BLOCK columns: (B, ceil(V / BLOCK)) fp64."""
    n_rows, n_columns = weights.shape
    n_blocked = n_columns - n_columns % BLOCK
    blocked = weights[:, :n_blocked].view(n_rows, -1, BLOCK)
    sums = [blocked.sum(-1)]
    if n_blocked < n_columns:
        last_block = weights[:, n_blocked:]
        sums.append(last_block.sum(-1, keepdim=True))
    return torch.cat(sums, 1).double()


def _inverse_cdf(weights: Tensor, block_sums: Tensor, u: Tensor) -> Tensor:
    """Return the first column whose cumulative weight exceeds u times the total."""
    block, rest = _search(block_sums, u * block_sums.sum(-1))
    columns = _columns_of(block)
    last_column = weights.shape[1] - 1
    inside = weights.gather(1, columns.clamp_max(last_column)).double()
    inside = inside * (columns <= last_column)
    column, _ = _search(inside, rest)
    return block * BLOCK + column


def _search(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first column at which the running sum exceeds the target, and the remainder.

    The remainder is the target minus the running sum before that column. If the target reaches the
    total by rounding, the column is the last one of positive weight.
    """
    running = weights.cumsum(1)
    columns = torch.arange(weights.shape[1], device=weights.device)
    last_positive = (columns * (weights > 0)).max(1).values
    n_passed = (running <= target[:, None]).sum(1)
    column = torch.minimum(n_passed, last_positive)
    index = column[:, None]
    before = running.gather(1, index) - weights.gather(1, index)
    return column, target - before.squeeze(1)


def _draw_truncated(weights: Tensor, totals: Tensor, rules: Truncation, u: Tensor) -> Tensor:
    """Draw from the largest weights, or from all weights in rows where those do not suffice."""
    tokens, settled = _draw_among(NUCLEUS_COLUMNS, weights, totals, rules, u)
    rest = (~settled).nonzero().squeeze(-1)
    if len(rest):
        tokens[rest], _ = _draw_among(
            weights.shape[1], weights[rest], totals[rest], rules[rest], u[rest]
        )
    return tokens


def _draw_among(
    size: int, weights: Tensor, totals: Tensor, rules: Truncation, u: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw from the `size` largest weights.

    Equal weights are taken in the order of their columns, for any size.

    Return (B,) tokens, and (B,) bool: whether the rules exclude all other weights of the row.
    """
    n_columns = weights.shape[1]
    size = min(size, n_columns)
    columns = weights.topk(size).indices.sort().values
    kept = weights.gather(1, columns)
    kept, order = kept.sort(descending=True, stable=True)
    columns = columns.gather(1, order)
    allowed = _allowed(kept, totals, rules)
    inside = (kept * allowed).double()
    rank, _ = _search(inside, u * inside.sum(-1))
    # Each rule excludes a tail of the sorted weights. The tail begins among the kept weights,
    # unless the rules allow a weight as small as the last kept one.
    smallest_allowed = (allowed & (kept <= kept[:, -1:])).any(-1)
    settled = ~(smallest_allowed | (rules.top_k > size))
    if size == n_columns:
        settled = torch.ones_like(settled)
    tokens = columns.gather(1, rank[:, None])
    return tokens.squeeze(1), settled


def _allowed(kept: Tensor, totals: Tensor, rules: Truncation) -> Tensor:
    """Return (B, K) bool: which of the K largest weights, sorted, the rules allow."""
    top_k = rules.top_k[:, None]
    rank = torch.arange(kept.shape[1], device=kept.device)
    by_top_k = (rank < top_k) | (top_k == 0)
    kept_mass = (kept * by_top_k).double().sum(-1)
    mass = torch.where(rules.top_k > 0, kept_mass, totals)
    mass_before = kept.double().cumsum(1) - kept
    nucleus_mass = rules.top_p * mass
    all_allowed = rules.top_p >= 1
    by_top_p = (mass_before < nucleus_mass[:, None]) | all_allowed[:, None]
    least = rules.min_p[:, None] * kept[:, :1]
    by_min_p = kept >= least
    return by_top_k & by_top_p & by_min_p
