"""From logits to a token and its log-probability, one row a sequence.

A row draws with a single uniform number keyed by (seed, position), so what it samples depends on
nothing but its own logits: not on its batch, nor on how often the run was resumed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256  # vocabulary columns summed at once: a draw reads V/BLOCK + BLOCK numbers, not V
HEAD = 512  # sorted columns that nearly always hold the nucleus


@dataclass(frozen=True)
class Truncation:
    """Which tokens may be drawn. Applied in this order, each to what the one before leaves."""

    top_k: Tensor  # (B,) int, 0 = all
    top_p: Tensor  # (B,) fp32, 1 = all (nucleus sampling, arXiv:1904.09751)
    min_p: Tensor  # (B,) fp32, 0 = all; relative to the likeliest token (arXiv:2407.01082)

    def __getitem__(self, rows) -> "Truncation":
        return Truncation(self.top_k[rows], self.top_p[rows], self.min_p[rows])

    def to(self, device: torch.device) -> "Truncation":
        return Truncation(*(x.to(device) for x in vars(self).values()))

    def active(self) -> Tensor:
        """(B,) bool."""
        return (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """(B,) int64 twice -> (B,) fp64 in [0, 1), by SplitMix64 (doi:10.1145/2714064.2660195)."""
    mixed = _mix(_mix(seeds) ^ (positions * -0x61C8864680B583EB))  # 2^64 / golden ratio, as int64
    return _shift(mixed, 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = x + -0x61C8864680B583EB
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's >> keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def draw(
    logits: Tensor,  # (B, V) fp32, overwritten
    temperature: Tensor,  # (B,) fp32; 0 takes the likeliest token, scored at temperature 1
    truncation: Truncation,
    u: Tensor,  # (B,) fp64 in [0, 1)
) -> tuple[Tensor, Tensor]:  # (B,) int64; (B,) fp32 nats at the temperature, before any truncation
    """Sample a token a row. A row that holds a NaN or only -inf gets a NaN log-probability."""
    greedy = temperature == 0
    logits /= torch.where(greedy, 1.0, temperature)[:, None]
    top, best = logits.max(-1)
    weights = logits.sub_(top[:, None]).exp_()  # unnormalised probabilities, the likeliest is 1
    blocks = _block_sums(weights)
    totals = blocks.sum(-1)
    token = torch.where(greedy, best, _inverse_cdf(weights, blocks, u))
    cut = (truncation.active() & ~greedy).nonzero().squeeze(-1)
    if len(cut):
        token[cut] = _draw_truncated(weights[cut], totals[cut], truncation[cut], u[cut])
    chosen = weights.gather(1, token[:, None]).squeeze(1)
    return token, (chosen.double().log() - totals.log()).float()


def draw_from_blocks(
    logits: Tensor,  # (B, V) fp32
    top: Tensor,  # (B, blocks) fp32, largest logit over temperature of each BLOCK columns
    total: Tensor,  # (B, blocks) fp32, sums of exp(logit / temperature - top)
    temperature: Tensor,  # (B,) fp32
    u: Tensor,  # (B,) fp64 in [0, 1)
) -> tuple[Tensor, Tensor]:
    """`draw` without truncation: reads one block of a row, and no GPU's host waits."""
    greedy, last = temperature == 0, logits.shape[1] - 1
    highest = top.max(-1).values
    weights = total.double() * (top - highest[:, None]).double().exp()
    block, rest = _search(weights, u * weights.sum(-1))
    block = torch.where(greedy, top.argmax(-1), block)
    columns = block[:, None] * BLOCK + torch.arange(BLOCK, device=u.device)
    inside = logits.gather(1, columns.clamp_max(last))
    inside = inside / torch.where(greedy, 1.0, temperature)[:, None] - highest[:, None]
    inside = inside.masked_fill(columns > last, -torch.inf).double()
    column = torch.where(greedy, inside.argmax(-1), _search(inside.exp(), rest)[0])
    chosen = inside.gather(1, column[:, None]).squeeze(1)
    return block * BLOCK + column, (chosen - weights.sum(-1).log()).float()


def _block_sums(weights: Tensor) -> Tensor:
    """(B, V) -> (B, ceil(V / BLOCK)) fp64."""
    B, V = weights.shape
    whole = V - V % BLOCK
    sums = [weights[:, :whole].view(B, -1, BLOCK).sum(-1)]
    if whole < V:
        sums.append(weights[:, whole:].sum(-1, keepdim=True))
    return torch.cat(sums, 1).double()


def _inverse_cdf(weights: Tensor, blocks: Tensor, u: Tensor) -> Tensor:
    """First column whose cumulative weight exceeds u times the total."""
    block, rest = _search(blocks, u * blocks.sum(-1))
    columns = block[:, None] * BLOCK + torch.arange(BLOCK, device=u.device)
    last = weights.shape[1] - 1
    inside = weights.gather(1, columns.clamp_max(last)).double() * (columns <= last)
    return block * BLOCK + _search(inside, rest)[0]


def _search(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """First column where the running sum passes target, and what of target is left inside it.

    Rounding may leave target at the very end: then it is the last column of positive weight.
    """
    running = weights.cumsum(1)
    positive = torch.arange(weights.shape[1], device=weights.device) * (weights > 0)
    column = torch.minimum((running <= target[:, None]).sum(1), positive.max(1).values)
    before = running.gather(1, column[:, None]) - weights.gather(1, column[:, None])
    return column, target - before.squeeze(1)


def _draw_truncated(weights: Tensor, totals: Tensor, cut: Truncation, u: Tensor) -> Tensor:
    token, sure = _draw_among(HEAD, weights, totals, cut, u)
    rest = (~sure).nonzero().squeeze(-1)
    if len(rest):
        given = weights[rest], totals[rest], cut[rest], u[rest]
        token[rest] = _draw_among(weights.shape[1], *given)[0]
    return token


def _draw_among(
    size: int, weights: Tensor, totals: Tensor, cut: Truncation, u: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens from the `size` largest weights, and for which rows the others cannot matter.

    Equal weights are taken in the order of their columns, whatever the size.
    """
    size = min(size, weights.shape[1])
    columns = weights.topk(size).indices.sort().values
    kept, order = weights.gather(1, columns).sort(descending=True, stable=True)
    columns, allowed = columns.gather(1, order), _allowed(kept, totals, cut)
    inside = (kept * allowed).double()
    rank, _ = _search(inside, u * inside.sum(-1))
    # every rule cuts a tail, which begins in here unless one as light as the last is allowed
    tail = (allowed & (kept <= kept[:, -1:])).any(-1) | (cut.top_k > size)
    sure = ~tail if size < weights.shape[1] else torch.ones_like(tail)
    return columns.gather(1, rank[:, None]).squeeze(1), sure


def _allowed(kept: Tensor, totals: Tensor, cut: Truncation) -> Tensor:
    """(B, K) bool for the K largest weights, sorted: what top-k, then top-p, then min-p leave."""
    rank = torch.arange(kept.shape[1], device=kept.device)
    by_k = (rank < cut.top_k[:, None]) | (cut.top_k == 0)[:, None]
    mass = torch.where(cut.top_k > 0, (kept * by_k).double().sum(-1), totals)
    before = kept.double().cumsum(1) - kept
    by_p = (before < (cut.top_p * mass)[:, None]) | (cut.top_p >= 1)[:, None]
    return by_k & by_p & (kept >= cut.min_p[:, None] * kept[:, :1])
