"""Preference objectives: each pair's value and its derivatives in the pair's summed log-probs.

    loss = sum_p w_p objective_p
    h = (chosen - chosen_ref) - (rejected - rejected_ref), nats;  average = sum / targets
    most are -log sigmoid(s), s linear in the sums:  d/ds = -sigmoid(-s)

A pair is a chosen (w) and a rejected (l) sequence. A sequence without targets has sum 0 and average
0. An objective that needs no reference ignores it.

To add an objective, write its class here, add its name to `__all__`, and add one line to
expo_fast/objectives.py.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from expo_fast.kernels.products import segment_sum

__all__ = ["Cpo", "Dpo", "DpoPositive", "Hinge", "Ipo", "Orpo", "RDpo", "SimPo"]

# Nats per target. Orpo clamps averages at this value, so that 1 / (1 - p) <= 1e20 is finite in
# fp32. The odds of a likelier sequence, whose targets lead by 46 nats each, have no gradient.
CERTAIN = -1e-20


class Pairs(NamedTuple):
    """Sums over the targets of each pair's sequences, (P,) each."""

    chosen: Tensor  # log-prob, nats
    rejected: Tensor
    chosen_ref: Tensor  # log-prob under the reference, nats
    rejected_ref: Tensor
    chosen_length: Tensor  # number of targets
    rejected_length: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """The log-ratio h of each pair, (P,): the policy's difference minus the reference's."""
        return (self.chosen - self.chosen_ref) - (self.rejected - self.rejected_ref)

    @property
    def per_target(self) -> tuple[Tensor, Tensor]:
        """Factors (P,) that convert sums over the chosen and the rejected sequence to averages."""
        per_chosen = 1 / self.chosen_length.clamp(min=1)
        per_rejected = 1 / self.rejected_length.clamp(min=1)
        return per_chosen, per_rejected


def count_pairs(ids: Tensor, ref_logp: Tensor | None, pair_weight: Tensor | None) -> int:
    """Return P: half of ref_logp's length, or pair_weight's length, or the least P for the ids.

    Raise ValueError if the lengths of ref_logp (2P,) and pair_weight (P,) do not agree, or if
    ref_logp has a value for each row and the rows are of fewer pairs.
    """
    if ref_logp is not None:
        n = len(ref_logp) // 2
    elif pair_weight is not None:
        n = len(pair_weight)
    else:
        n = int(ids.max()) // 2 + 1 if ids.numel() else 0
    for name, x, size in (("ref_logp", ref_logp, 2 * n), ("pair_weight", pair_weight, n)):
        if x is not None and x.shape != (size,):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, {n} pairs need ({size},)")
    if ref_logp is not None and len(ref_logp) == len(ids) > 0:
        found = int(ids.max()) // 2 + 1
        if found < n:
            raise ValueError(
                f"ref_logp has a value for each of {len(ids)} rows, whose ids are of {found} "
                "pairs: sum it over the rows of each text, as (2P,)"
            )
    return n


def check_pair_ids(ids: Tensor, n_pairs: int) -> None:
    """Raise ValueError if an id lies outside [0, 2P)."""
    wrong = ids[(ids < 0) | (ids >= 2 * n_pairs)]
    if len(wrong):
        raise ValueError(
            f"sequence_ids has {int(wrong[0])}: ids of {n_pairs} pairs are 0 to {2 * n_pairs - 1}"
        )


def sum_pairs(
    logp: Tensor,  # (N,) nats
    ids: Tensor,  # (N,) int64 in [0, 2P): 2p for the chosen sequence of pair p, else 2p + 1
    n_pairs: int,
    ref_logp: Tensor | None,  # (2P,) summed; None: 0
) -> Pairs:
    """Return the sums of each sequence's rows, in a fixed order."""
    sums = segment_sum(logp, ids, 2 * n_pairs).view(-1, 2)
    ref = torch.zeros_like(sums)
    if ref_logp is not None:
        ref = ref_logp.detach().to(sums).view(-1, 2)
    length = segment_sum(torch.ones_like(logp), ids, 2 * n_pairs).view(-1, 2)
    return Pairs(
        chosen=sums[:, 0],
        rejected=sums[:, 1],
        chosen_ref=ref[:, 0],
        rejected_ref=ref[:, 1],
        chosen_length=length[:, 0],
        rejected_length=length[:, 1],
    )


class PairLoss(NamedTuple):
    """A preference objective's value per pair and its derivatives, (P,) each."""

    value: Tensor  # to be minimised
    grad_chosen: Tensor  # dvalue/dchosen
    grad_rejected: Tensor  # dvalue/drejected


class PreferenceObjective(Protocol):
    """A function of the pairs' summed log-probs."""

    def __call__(self, pairs: Pairs) -> PairLoss: ...


@dataclass(frozen=True)
class Dpo:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), h the pair's log-ratio.

    DPO (arXiv:2305.18290, eq. 7). The label smoothing e is the probability of a flipped label
    (conservative DPO).
    Raise ValueError if beta is not positive and finite, or if e is outside [0, 0.5).
    """

    beta: float = 0.1  # per nat
    label_smoothing: float = 0.0

    def __post_init__(self):
        _check(self)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"Dpo(label_smoothing={self.label_smoothing}): must be in [0, 0.5)")

    def __call__(self, pairs: Pairs) -> PairLoss:
        value, grad = _logistic(self.beta * pairs.log_ratio, self.label_smoothing)
        return PairLoss(value, self.beta * grad, -self.beta * grad)


@dataclass(frozen=True)
class Ipo:
    """(h - 1 / (2 beta))^2, h the pair's log-ratio: IPO (arXiv:2310.12036, eq. 17).

    `average` divides each sequence's log-ratio by its number of targets first, as TRL does.
    Raise ValueError if beta is not positive and finite.
    """

    beta: float = 0.1  # per nat
    average: bool = False

    def __post_init__(self):
        _check(self)

    def __call__(self, pairs: Pairs) -> PairLoss:
        per_chosen = per_rejected = torch.ones_like(pairs.chosen)
        if self.average:
            per_chosen, per_rejected = pairs.per_target
        chosen = (pairs.chosen - pairs.chosen_ref) * per_chosen
        rejected = (pairs.rejected - pairs.rejected_ref) * per_rejected
        gap = chosen - rejected - 1 / (2 * self.beta)
        return PairLoss(gap**2, 2 * gap * per_chosen, -2 * gap * per_rejected)


@dataclass(frozen=True)
class Hinge:
    """max(0, 1 - beta h), h the pair's log-ratio. A pair with beta h > 1 has no gradient.

    SLiC-HF's calibration loss (arXiv:2305.10425) with log-ratios in place of log-probs and without
    its SFT term. It is the hinge-norm loss of RSO (arXiv:2309.06657), whose gamma is beta, and
    TRL's "hinge".
    Raise ValueError if beta is not positive and finite.
    """

    beta: float = 0.1  # per nat; TRL's default

    def __post_init__(self):
        _check(self)

    def __call__(self, pairs: Pairs) -> PairLoss:
        missing = 1 - self.beta * pairs.log_ratio
        grad = torch.where(missing > 0, -self.beta, torch.zeros_like(missing))
        return PairLoss(missing.clamp(min=0), grad, -grad)


@dataclass(frozen=True)
class RDpo:
    """-log sigmoid(beta h + alpha (L_w - L_l)), L the number of targets, h the pair's log-ratio.

    Length-regularised DPO (arXiv:2403.19159): each target costs alpha. If the chosen sequence is
    the longer one, the loss separates the pair less than Dpo, because the length may be the reason
    for the choice. If it is the shorter one, the loss separates the pair more.
    Raise ValueError if beta is not positive and finite, or if alpha is negative or not finite.
    """

    alpha: float  # per target; no default, because it depends on the differences in length
    beta: float = 0.1  # per nat

    def __post_init__(self):
        _check(self, "alpha")

    def __call__(self, pairs: Pairs) -> PairLoss:
        longer = pairs.chosen_length - pairs.rejected_length
        value, grad = _logistic(self.beta * pairs.log_ratio + self.alpha * longer)
        return PairLoss(value, self.beta * grad, -self.beta * grad)


@dataclass(frozen=True)
class DpoPositive:
    """-log sigmoid(beta (h - penalty max(0, chosen_ref - chosen))), h the pair's log-ratio.

    DPOP of Smaug (arXiv:2402.13228): DPO with a penalty if the chosen sequence is less likely than
    under the reference.
    Raise ValueError if beta is not positive and finite, or if penalty is negative or not finite.
    """

    beta: float = 0.1  # per nat
    penalty: float = 50.0  # the paper's lambda

    def __post_init__(self):
        _check(self, "penalty")

    def __call__(self, pairs: Pairs) -> PairLoss:
        lost = (pairs.chosen_ref - pairs.chosen).clamp(min=0)
        value, grad = _logistic(self.beta * (pairs.log_ratio - self.penalty * lost))
        grad = self.beta * grad
        grad_penalty = torch.where(lost > 0, self.penalty * grad, 0)
        return PairLoss(value, grad + grad_penalty, -grad)


@dataclass(frozen=True)
class SimPo:
    """-log sigmoid(beta (average_w - average_l) - gamma): SimPO (arXiv:2405.14734, eq. 6).

    There is no reference. gamma is the margin, as in the paper and in TRL's `simpo_gamma`. The
    authors' later `gamma_beta_ratio` is gamma / beta.
    Raise ValueError if beta is not positive and finite, or if gamma is negative or not finite.
    """

    beta: float = 2.0  # per nat per target; the paper has 2.0 to 2.5
    gamma: float = 1.0  # half of beta, the authors' initial value

    def __post_init__(self):
        _check(self, "gamma")

    def __call__(self, pairs: Pairs) -> PairLoss:
        per_chosen, per_rejected = pairs.per_target
        gap = pairs.chosen * per_chosen - pairs.rejected * per_rejected
        value, grad = _logistic(self.beta * gap - self.gamma)
        grad = self.beta * grad
        return PairLoss(value, grad * per_chosen, -grad * per_rejected)


@dataclass(frozen=True)
class Cpo:
    """-log sigmoid(beta (chosen - rejected)) - nll_coef average_w: CPO (arXiv:2401.08417).

    There is no reference. The NLL is each chosen sequence's mean over its targets. The loss is
    therefore a sum over pairs for any split into batches, and long sequences have no larger weight.
    The paper has the sum over the sequence. TRL has the mean over all chosen targets of the batch.
    Raise ValueError if beta is not positive and finite, or if nll_coef is negative or not finite.
    """

    beta: float = 0.1  # per nat
    nll_coef: float = 1.0  # the paper's value; TRL's cpo_alpha

    def __post_init__(self):
        _check(self, "nll_coef")

    def __call__(self, pairs: Pairs) -> PairLoss:
        value, grad = _logistic(self.beta * (pairs.chosen - pairs.rejected))
        grad = self.beta * grad
        per_chosen, _ = pairs.per_target
        grad_nll = -self.nll_coef * per_chosen
        return PairLoss(value + grad_nll * pairs.chosen, grad + grad_nll, -grad)


@dataclass(frozen=True)
class Orpo:
    """-average_w - beta log sigmoid(log odds_w - log odds_l), odds = p / (1 - p), p = exp(average).

    ORPO (arXiv:2403.07691, eq. 6), without a reference. p is clamped at exp(CERTAIN). The NLL is
    each chosen sequence's mean over its targets, as in Cpo. TRL's includes the prompts' tokens.
    Raise ValueError if beta is not positive and finite.
    """

    beta: float = 0.1  # the paper's lambda

    def __post_init__(self):
        _check(self)

    def __call__(self, pairs: Pairs) -> PairLoss:
        per_chosen, per_rejected = pairs.per_target
        chosen = pairs.chosen * per_chosen
        odds_chosen, odds_grad_chosen = _log_odds(chosen)
        odds_rejected, odds_grad_rejected = _log_odds(pairs.rejected * per_rejected)
        value, grad = _logistic(odds_chosen - odds_rejected)
        grad = self.beta * grad
        return PairLoss(
            value=self.beta * value - chosen,
            grad_chosen=(grad * odds_grad_chosen - 1) * per_chosen,
            grad_rejected=-grad * odds_grad_rejected * per_rejected,
        )


def _logistic(s: Tensor, flipped: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return -(1 - flipped) log sigmoid(s) - flipped log sigmoid(-s), and its derivative in s."""
    value = -(1 - flipped) * F.logsigmoid(s) - flipped * F.logsigmoid(-s)
    grad = flipped * torch.sigmoid(s) - (1 - flipped) * torch.sigmoid(-s)
    return value, grad


def _log_odds(logp: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(p / (1 - p)) and its derivative in log p, which is 0 above CERTAIN."""
    bounded = logp.clamp(max=CERTAIN)
    rest = -torch.expm1(bounded)  # 1 - p; for a small p it rounds to 1 and `bounded` dominates
    return bounded - rest.log(), torch.where(logp > CERTAIN, 0, 1 / rest)


def _check(objective: PreferenceObjective, *coefficients: str) -> None:
    """Raise ValueError unless beta is finite and positive, and `coefficients` finite and >= 0."""
    for name in ("beta", *coefficients):
        value = getattr(objective, name)
        positive = name == "beta"
        if not 0 <= value < math.inf or (positive and value == 0):
            need = "positive" if positive else "at least 0"
            raise ValueError(
                f"{type(objective).__name__}({name}={value}): must be finite and {need}"
            )
