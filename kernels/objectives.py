"""Policy objectives: each row's value and its derivative in the row's log-prob.

    loss = sum_t w_t (objective_t + kl_coef k3_t - entropy_coef H_t)
    k3 = exp(x) - x - 1, x = ref_logp - logp;  dk3/dlogp = 1 - exp(x)
    on-policy rows: only w_t (-A_t logp_t)

Every exp(log-ratio) is capped at exp(MAX_LOG_RATIO), in values and in derivatives. A batch with
larger ratios cannot be trained on, and fp32 would overflow at 88 nats.

To add an objective, write its class here, add its name to `__all__`, and add one line to
expo_fast/objectives.py.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from expo_fast.kernels.head import RowGrads
from expo_fast.kernels.products import segment_sum

__all__ = ["Cispo", "Clipped", "SequenceClipped", "SoftAdaptive"]  # exported by ops

MAX_LOG_RATIO = 20.0  # nats


class Surrogate(NamedTuple):
    """A policy objective's value per row, its derivative, and which rows it clipped."""

    value: Tensor  # (N,) to be minimised
    grad: Tensor  # (N,) dvalue/dlogp, equal to dvalue/dlog_ratio if the ratio is the row's own
    side: Tensor  # (N,) int8: -1 clipped for a low ratio, 1 for a high one, else 0


class PolicyObjective(Protocol):
    """A function of log-probs, ratios and advantages.

    An objective whose attribute `sequence_level` is true gets the mean log-ratio of the row's
    sequence. Its `grad` is the derivative in that mean, and it needs sequence_ids.
    """

    def __call__(
        self,
        logp: Tensor,  # (N,) nats
        log_ratio: Tensor,  # (N,) logp - old_logp, or its mean over the row's sequence
        advantage: Tensor,  # (N,)
    ) -> Surrogate: ...


def is_sequence_level(objective: PolicyObjective) -> bool:
    return bool(getattr(objective, "sequence_level", False))


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def _side(low: Tensor, high: Tensor) -> Tensor:
    """Return Surrogate.side, given masks of the rows clipped for a low and for a high ratio."""
    return high.to(torch.int8) - low.to(torch.int8)


@dataclass(frozen=True)
class Clipped:
    """-min(r A, clip(r, 1 - low, 1 + high) A): PPO (arXiv:1707.06347, eq. 7), GRPO, DAPO, Dr.GRPO.

    `cap` bounds the loss of rows with A < 0 at -cap A: dual-clip PPO (arXiv:1912.09729, with a cap
    of 3), which is also INTELLECT-2's two-sided delta (arXiv:2505.07291). None: no bound.
    Raise ValueError if low is outside [0, 1], if high is negative, or if cap is not above 1 + high.
    """

    low: float = 0.2
    high: float = 0.2
    cap: float | None = None

    def __post_init__(self):
        _check_clip(self)
        if self.cap is not None and not self.cap > 1 + self.high:
            raise ValueError(
                f"Clipped(cap={self.cap}): the ratio's cap must exceed 1 + high = {1 + self.high}"
            )

    def __call__(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor) -> Surrogate:
        ratio = _bounded_exp(log_ratio)
        capped = ratio if self.cap is None else ratio.clamp(max=self.cap)
        bounded = ratio.clamp(1 - self.low, 1 + self.high)
        value = -torch.minimum(capped * advantage, bounded * advantage)
        clipped_low = (advantage < 0) & (ratio < 1 - self.low)
        clipped_high = (advantage > 0) & (ratio > 1 + self.high)
        clipped_high |= (advantage < 0) & (ratio > capped)
        grad = torch.where(clipped_low | clipped_high, 0, -ratio * advantage)
        return Surrogate(value, grad, _side(clipped_low, clipped_high))


@dataclass(frozen=True)
class SequenceClipped:
    """GSPO (arXiv:2507.18071): `Clipped` on exp(mean over a sequence of logp - old_logp).

    Raise ValueError if low is outside [0, 1] or if high is negative.
    """

    low: float = 3e-4
    high: float = 4e-4
    sequence_level: ClassVar[bool] = True

    def __post_init__(self):
        _check_clip(self)

    def __call__(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor) -> Surrogate:
        return Clipped(self.low, self.high)(logp, log_ratio, advantage)


@dataclass(frozen=True)
class Cispo:
    """-sg(min(r, cap)) A logp, sg stop-gradient: ratios are capped, and no row loses its gradient.

    MiniMax-M1 (arXiv:2506.13585) and ScaleRL (arXiv:2510.13786), whose cap is 5. `cap` is the upper
    bound of the ratio, not its distance from 1. There is no lower bound.
    Raise ValueError if cap is below 1.
    """

    cap: float = 5.0

    def __post_init__(self):
        if not self.cap >= 1:
            raise ValueError(f"Cispo(cap={self.cap}): must be at least 1, as it bounds the ratio")

    def __call__(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor) -> Surrogate:
        ratio = _bounded_exp(log_ratio)
        grad = -ratio.clamp(max=self.cap) * advantage
        capped = ratio > self.cap
        return Surrogate(grad * logp, grad, _side(torch.zeros_like(capped), capped))


@dataclass(frozen=True)
class SoftAdaptive:
    """SAPO (arXiv:2511.20347): -4/tau sigmoid(tau (r - 1)) A, a gate with derivative 1 at r = 1.

    With s = sigmoid(tau (r - 1)), the derivative in logp is -4 s (1 - s) r A.
    Raise ValueError if a tau is not positive.
    """

    tau_positive: float = 1.0  # for A > 0
    tau_negative: float = 1.05  # for A <= 0: a larger tau damps these updates faster

    def __post_init__(self):
        for name in ("tau_positive", "tau_negative"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"SoftAdaptive({name}={value}): must be positive")

    def __call__(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor) -> Surrogate:
        ratio = _bounded_exp(log_ratio)
        tau = torch.full_like(ratio, self.tau_negative)
        tau = tau.masked_fill(advantage > 0, self.tau_positive)
        s = torch.sigmoid(tau * (ratio - 1))
        rest = torch.sigmoid(tau * (1 - ratio))  # 1 - s
        value = -4 / tau * s * advantage
        grad = -4 * s * rest * ratio * advantage
        return Surrogate(value, grad, torch.zeros_like(ratio, dtype=torch.int8))


def _check_clip(objective: Clipped | SequenceClipped) -> None:
    low, high = objective.low, objective.high
    if not (0 <= low <= 1 and high >= 0):
        name = type(objective).__name__
        raise ValueError(f"{name}(low={low}, high={high}): need low in [0, 1] and high >= 0")


@dataclass(frozen=True)
class PolicyRows:
    """Inputs of the policy loss for each row, except log-probs. Floats have the logits' dtype."""

    advantage: Tensor  # (N,)
    weight: Tensor  # (N,) not 0
    old_logp: Tensor | None  # (N,) nats; None: every ratio is 1
    ref_logp: Tensor | None  # (N,) nats
    on_policy: Tensor  # (N,) bool
    sequences: Tensor | None  # (N,) int64 in [0, S), for sequence-level objectives only

    def take(self, rows: Tensor | slice) -> "PolicyRows":
        given = {name: x for name, x in vars(self).items() if x is not None}
        return replace(self, **{name: x[rows] for name, x in given.items()})


class PolicyTerms(NamedTuple):
    """Terms of the policy loss, (N,) each. Only the derivatives include the row weights."""

    value: Tensor  # the objective, or -A logp for on-policy rows
    ratio: Tensor  # 1 for on-policy rows
    side: Tensor  # as in Surrogate
    k3: Tensor  # 0 for on-policy rows and without a reference
    grads: RowGrads  # derivatives of the loss; that of entropy is None if entropy_coef is 0


class PolicyStatistics(NamedTuple):
    """Statistics of the policy loss, () each. `ops.PolicyLoss` has them too, and defines them."""

    policy_loss: Tensor
    on_policy_loss: Tensor
    kl: Tensor
    mean_entropy: Tensor
    clip_low: Tensor
    clip_high: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor


N_STATISTICS = len(PolicyStatistics._fields)


@dataclass(frozen=True)
class PolicyLossOfRows:
    """The policy loss as a function of log-probs. It is a `RowwiseLoss` without sequences."""

    objective: PolicyObjective
    rows: PolicyRows
    kl_coef: float
    entropy_coef: float

    def row_grads(self, rows: slice, logp: Tensor) -> RowGrads:
        """Return the derivatives of the loss in the results of some rows, given their log-probs."""
        return replace(self, rows=self.rows.take(rows)).terms(logp).grads

    def terms(self, logp: Tensor) -> PolicyTerms:
        """Return the terms of all rows, given their log-probs (N,)."""
        rows = self.rows
        is_policy = ~rows.on_policy
        log_ratio = torch.zeros_like(logp)
        if rows.old_logp is not None:
            log_ratio = torch.where(is_policy, logp - rows.old_logp, 0)
        if rows.sequences is not None:
            log_ratio = _sequence_mean(log_ratio, rows)
        value, grad, side = self.objective(logp, log_ratio, rows.advantage)
        value = torch.where(is_policy, value, -rows.advantage * logp)
        grad = rows.weight * torch.where(is_policy, grad, -rows.advantage)
        if rows.sequences is not None:
            # Averaging over a sequence is its own transpose, so it also propagates derivatives.
            grad = torch.where(is_policy, _sequence_mean(grad, rows), grad)
        k3, k3_grad = _k3(rows, logp)
        grad_entropy = None
        if self.entropy_coef:
            grad_entropy = torch.where(is_policy, -self.entropy_coef * rows.weight, 0)
        return PolicyTerms(
            value=value,
            ratio=torch.where(is_policy, _bounded_exp(log_ratio), 1),
            side=torch.where(is_policy, side, 0),
            k3=k3,
            grads=RowGrads(grad + self.kl_coef * rows.weight * k3_grad, grad_entropy),
        )

    def total(self, terms: PolicyTerms, entropy: Tensor) -> Tensor:
        """Return the loss (), given the rows' terms and entropies (N,)."""
        loss = terms.value
        if self.kl_coef:
            loss = loss + self.kl_coef * terms.k3
        if self.entropy_coef:
            loss = loss - self.entropy_coef * torch.where(self.rows.on_policy, 0, entropy)
        return (self.rows.weight * loss).sum()


class LossWithCachedTerms:
    """A `PolicyLossOfRows` whose terms are computed once if a backend takes all rows together.

    It is a `RowwiseLoss` for one pass over the rows.
    """

    def __init__(self, loss: PolicyLossOfRows):
        self._loss = loss
        self._terms: PolicyTerms | None = None  # of all rows

    def row_grads(self, rows: slice, logp: Tensor) -> RowGrads:
        n_rows = len(self._loss.rows.weight)
        takes_all_rows = len(logp) == n_rows
        if not takes_all_rows:
            return self._loss.row_grads(rows, logp)
        self._terms = self._loss.terms(logp)
        return self._terms.grads

    def terms(self, logp: Tensor) -> PolicyTerms:
        """Return the terms of all rows, given the log-probs (N,) of which `row_grads` had parts."""
        if self._terms is None:
            return self._loss.terms(logp)
        return self._terms


def policy_sums(
    loss: PolicyLossOfRows, terms: PolicyTerms, entropy: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the loss () and its PolicyStatistics (N_STATISTICS,)."""
    statistics = policy_statistics(loss.rows, terms, entropy)
    return loss.total(terms, entropy), torch.stack(statistics)


def policy_statistics(rows: PolicyRows, terms: PolicyTerms, entropy: Tensor) -> PolicyStatistics:
    """Return the statistics of the rows, given their terms and entropies (N,)."""
    is_policy = (~rows.on_policy).to(entropy.dtype)
    weight = rows.weight * is_policy
    weighted_value = rows.weight * terms.value
    total_weight = weight.sum()
    total_weight = torch.where(total_weight == 0, 1, total_weight)
    count = is_policy.sum().clamp(min=1)
    ratio = terms.ratio * is_policy
    return PolicyStatistics(
        policy_loss=(weighted_value * is_policy).sum(),
        on_policy_loss=(weighted_value * rows.on_policy).sum(),
        kl=(weight * terms.k3).sum() / total_weight,
        mean_entropy=(weight * entropy).sum() / total_weight,
        clip_low=(terms.side < 0).sum() / count,
        clip_high=(terms.side > 0).sum() / count,
        ratio_mean=ratio.sum() / count,
        ratio_max=ratio.max() if len(ratio) else ratio.new_zeros(()),
    )


def _k3(rows: PolicyRows, logp: Tensor) -> tuple[Tensor, Tensor]:
    """Return the k3 estimate of KL(policy || reference) and its derivative in logp, (N,) each."""
    if rows.ref_logp is None:
        return torch.zeros_like(logp), torch.zeros_like(logp)
    x = torch.where(rows.on_policy, 0, rows.ref_logp - logp)
    growth = torch.expm1(x.clamp(max=MAX_LOG_RATIO))
    return growth - x, -growth


def _sequence_mean(x: Tensor, rows: PolicyRows) -> Tensor:
    """Return, for each row, the mean of x (N,) over the policy rows of its sequence."""
    assert rows.sequences is not None
    sequences = torch.where(rows.on_policy, 0, rows.sequences + 1)  # 0: on-policy rows
    n = int(sequences.max()) + 1 if len(sequences) else 1
    count = segment_sum(torch.ones_like(x), sequences, n)
    return (segment_sum(x, sequences, n) / count.clamp(min=1))[sequences]
