"""What a pair of sequences contributes to the loss, and its derivative in their summed log-probs.

    loss = sum_p w_p objective_p
    h = (chosen - its ref) - (rejected - its ref), nats;  average = sum / targets
    most are -log sigmoid(s), s linear in the sums:  d/ds = -sigmoid(-s)

A sequence without targets has sum and average 0. An objective that needs no reference ignores it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from expo_fast.kernels.products import segment_sum

# Nats a target. Orpo takes no average for closer to 0, so 1 / (1 - p) stays below 1e20, finite in
# fp32. The odds of a likelier sequence, each target 46 nats ahead of the rest, have no gradient.
CERTAIN = -1e-20


class Pairs(NamedTuple):
    """Sums over the targets of each chosen and rejected sequence, (P,) each."""

    chosen: Tensor  # log-prob, nats
    rejected: Tensor
    chosen_ref: Tensor  # the same under the reference
    rejected_ref: Tensor
    chosen_length: Tensor  # targets
    rejected_length: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """How much more the policy prefers the chosen sequence than the reference does, nats."""
        return (self.chosen - self.chosen_ref) - (self.rejected - self.rejected_ref)

    @property
    def per_target(self) -> tuple[Tensor, Tensor]:
        """What turns the sums of the chosen and of the rejected sequence into averages."""
        return 1 / self.chosen_length.clamp(min=1), 1 / self.rejected_length.clamp(min=1)


def count_pairs(ids: Tensor, ref_logp: Tensor | None, pair_weight: Tensor | None) -> int:
    n = int(ids.max()) // 2 + 1 if ids.numel() else 0
    if ref_logp is not None:
        n = len(ref_logp) // 2
    elif pair_weight is not None:
        n = len(pair_weight)
    for name, x, size in (("ref_logp", ref_logp, 2 * n), ("pair_weight", pair_weight, n)):
        if x is not None and x.shape != (size,):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, {n} pairs need ({size},)")
    return n


def check_pair_ids(ids: Tensor, n_pairs: int) -> None:
    wrong = ids[(ids < 0) | (ids >= 2 * n_pairs)]
    if len(wrong):
        raise ValueError(
            f"sequence_ids holds {int(wrong[0])}: {n_pairs} pairs have ids 0 to {2 * n_pairs - 1}"
        )


def sum_pairs(
    logp: Tensor,  # (N,) nats
    ids: Tensor,  # (N,) int64 in [0, 2P): pair p's chosen is 2p, its rejected 2p + 1
    n_pairs: int,
    ref_logp: Tensor | None,  # (2P,) summed; None: 0
) -> Pairs:
    sums = segment_sum(logp, ids, 2 * n_pairs).view(-1, 2)
    ref = torch.zeros_like(sums) if ref_logp is None else ref_logp.detach().to(sums).view(-1, 2)
    length = segment_sum(torch.ones_like(logp), ids, 2 * n_pairs).view(-1, 2)
    return Pairs(*(x[:, side] for x in (sums, ref, length) for side in (0, 1)))


class PairLoss(NamedTuple):
    value: Tensor  # (P,)
    slope_chosen: Tensor  # (P,) dvalue/dchosen
    slope_rejected: Tensor  # (P,) dvalue/drejected


class PreferenceObjective(Protocol):
    def __call__(self, pairs: Pairs) -> PairLoss: ...


@dataclass(frozen=True)
class Dpo:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), h the pair's log-ratio.

    arXiv:2305.18290, eq. 7; the label smoothing e is conservative DPO's chance of a flipped label.
    """

    beta: float = 0.1  # per nat
    label_smoothing: float = 0.0

    def __post_init__(self):
        _check(self)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"Dpo(label_smoothing={self.label_smoothing}): must lie in [0, 0.5)")

    def __call__(self, pairs: Pairs) -> PairLoss:
        value, slope = _logistic(self.beta * pairs.log_ratio, self.label_smoothing)
        return PairLoss(value, self.beta * slope, -self.beta * slope)


@dataclass(frozen=True)
class Ipo:
    """(h - 1 / (2 beta))^2, h the pair's log-ratio (arXiv:2310.12036, eq. 17).

    `average` divides each sequence's log-ratio by its targets first, as TRL does.
    """

    beta: float = 0.1
    average: bool = False

    def __post_init__(self):
        _check(self)

    def __call__(self, pairs: Pairs) -> PairLoss:
        one = torch.ones_like(pairs.chosen)
        per_chosen, per_rejected = pairs.per_target if self.average else (one, one)
        chosen = (pairs.chosen - pairs.chosen_ref) * per_chosen
        rejected = (pairs.rejected - pairs.rejected_ref) * per_rejected
        gap = chosen - rejected - 1 / (2 * self.beta)
        return PairLoss(gap**2, 2 * gap * per_chosen, -2 * gap * per_rejected)


@dataclass(frozen=True)
class Hinge:
    """max(0, 1 - beta h), h the pair's log-ratio: a pair with beta h > 1 has no gradient.

    SLiC-HF's calibration loss (arXiv:2305.10425) on log-ratios in place of log-probs, without its
    SFT term: hinge-norm of RSO (arXiv:2309.06657), whose gamma is beta, and TRL's "hinge".
    """

    beta: float = 0.1  # per nat, TRL's

    def __post_init__(self):
        _check(self)

    def __call__(self, pairs: Pairs) -> PairLoss:
        missing = 1 - self.beta * pairs.log_ratio
        slope = torch.where(missing > 0, -self.beta, torch.zeros_like(missing))
        return PairLoss(missing.clamp(min=0), slope, -slope)


@dataclass(frozen=True)
class RDpo:
    """-log sigmoid(beta h + alpha (L_w - L_l)), L the targets, h the pair's log-ratio.

    Length-regularised DPO (arXiv:2403.19159): the policy is to pay alpha for each target. A pair
    whose chosen sequence is the longer one is pushed apart less than by Dpo, for its length may be
    why it was chosen; a pair whose chosen sequence is the shorter one is pushed apart more.
    """

    alpha: float  # per target; no default, for it depends on how much the lengths differ
    beta: float = 0.1  # per nat

    def __post_init__(self):
        _check(self, "alpha")

    def __call__(self, pairs: Pairs) -> PairLoss:
        longer = pairs.chosen_length - pairs.rejected_length
        value, slope = _logistic(self.beta * pairs.log_ratio + self.alpha * longer)
        return PairLoss(value, self.beta * slope, -self.beta * slope)


@dataclass(frozen=True)
class DpoPositive:
    """-log sigmoid(beta (h - penalty max(0, chosen_ref - chosen))), h the pair's log-ratio.

    DPOP of Smaug (arXiv:2402.13228): DPO that also pays for a chosen sequence that has become less
    likely than under the reference.
    """

    beta: float = 0.1  # per nat
    penalty: float = 50.0  # the paper's lambda

    def __post_init__(self):
        _check(self, "penalty")

    def __call__(self, pairs: Pairs) -> PairLoss:
        lost = (pairs.chosen_ref - pairs.chosen).clamp(min=0)
        value, slope = _logistic(self.beta * (pairs.log_ratio - self.penalty * lost))
        slope = self.beta * slope
        return PairLoss(value, slope + torch.where(lost > 0, self.penalty * slope, 0), -slope)


@dataclass(frozen=True)
class SimPo:
    """-log sigmoid(beta (average_w - average_l) - gamma) (arXiv:2405.14734, eq. 6); no reference.

    gamma is the margin itself, as in the paper and in TRL's `simpo_gamma`, not the authors' later
    `gamma_beta_ratio`, which is gamma / beta.
    """

    beta: float = 2.0  # per nat a target; the paper's 2.0 to 2.5
    gamma: float = 1.0  # half of beta, where the authors start

    def __post_init__(self):
        _check(self, "gamma")

    def __call__(self, pairs: Pairs) -> PairLoss:
        per_chosen, per_rejected = pairs.per_target
        gap = pairs.chosen * per_chosen - pairs.rejected * per_rejected
        value, slope = _logistic(self.beta * gap - self.gamma)
        slope = self.beta * slope
        return PairLoss(value, slope * per_chosen, -slope * per_rejected)


@dataclass(frozen=True)
class Cpo:
    """-log sigmoid(beta (chosen - rejected)) - nll_coef average_w (arXiv:2401.08417); no reference.

    The NLL is each chosen sequence's mean over its targets, so that the loss is a sum over pairs
    however they are split into batches, and no length weighs more. The paper writes the sum over
    the sequence; TRL takes the mean over all chosen targets of the batch.
    """

    beta: float = 0.1  # per nat
    nll_coef: float = 1.0  # the paper's, TRL's cpo_alpha

    def __post_init__(self):
        _check(self, "nll_coef")

    def __call__(self, pairs: Pairs) -> PairLoss:
        value, slope = _logistic(self.beta * (pairs.chosen - pairs.rejected))
        slope, nll_slope = self.beta * slope, -self.nll_coef * pairs.per_target[0]
        return PairLoss(value + nll_slope * pairs.chosen, slope + nll_slope, -slope)


@dataclass(frozen=True)
class Orpo:
    """-average_w - beta log sigmoid(log odds_w - log odds_l), odds = p / (1 - p), p = exp(average).

    arXiv:2403.07691, eq. 6; no reference. p comes no closer to 1 than exp(CERTAIN). The NLL is each
    chosen sequence's mean over its targets, as in Cpo; TRL's is over the prompts' tokens too.
    """

    beta: float = 0.1  # the paper's lambda

    def __post_init__(self):
        _check(self)

    def __call__(self, pairs: Pairs) -> PairLoss:
        per_chosen, per_rejected = pairs.per_target
        chosen = pairs.chosen * per_chosen
        odds, odds_slope = _log_odds(chosen)
        odds_rejected, odds_rejected_slope = _log_odds(pairs.rejected * per_rejected)
        value, slope = _logistic(odds - odds_rejected)
        slope = self.beta * slope
        return PairLoss(
            self.beta * value - chosen,
            (slope * odds_slope - 1) * per_chosen,
            -slope * odds_rejected_slope * per_rejected,
        )


def _logistic(s: Tensor, flipped: float = 0.0) -> tuple[Tensor, Tensor]:
    """-(1 - flipped) log sigmoid(s) - flipped log sigmoid(-s), and its derivative in s."""
    value = -(1 - flipped) * F.logsigmoid(s) - flipped * F.logsigmoid(-s)
    return value, flipped * torch.sigmoid(s) - (1 - flipped) * torch.sigmoid(-s)


def _log_odds(logp: Tensor) -> tuple[Tensor, Tensor]:
    """log(p / (1 - p)) and its derivative in log p, which is 0 beyond CERTAIN."""
    bounded = logp.clamp(max=CERTAIN)
    rest = -torch.expm1(bounded)  # rounds to 1 for a small p, which bounded itself outweighs
    return bounded - rest.log(), torch.where(logp > CERTAIN, 0, 1 / rest)


def _check(objective: PreferenceObjective, *coefficients: str) -> None:
    for name in ("beta", *coefficients):
        value, positive = getattr(objective, name), name == "beta"
        if not 0 <= value < math.inf or (positive and value == 0):
            need = "positive" if positive else "at least 0"
            raise ValueError(
                f"{type(objective).__name__}({name}={value}): must be finite and {need}"
            )
