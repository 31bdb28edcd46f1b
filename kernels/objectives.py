"""What a row contributes to the policy loss, and its derivative in the row's log-prob.

    loss = sum_t w_t (objective_t + kl_coef k3_t - entropy_coef H_t)
    k3 = exp(x) - x - 1, x = ref_logp - logp;  dk3/dlogp = 1 - exp(x)
    rows on policy: -A_t logp_t alone

Every exp(log-ratio) is capped at exp(MAX_LOG_RATIO), in values and derivatives alike: beyond it a
batch is broken anyway, and fp32 would overflow at 88.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from expo_fast.kernels.products import segment_sum

MAX_LOG_RATIO = 20.0  # nats


class Surrogate(NamedTuple):
    """A policy objective's value per row."""

    value: Tensor  # (N,) to be minimised
    slope: Tensor  # (N,) dvalue/dlogp, which is dvalue/dlog_ratio where the ratio is the row's own
    side: Tensor  # (N,) int8: -1 clipped for a low ratio, 1 for a high one, else 0


class PolicyObjective(Protocol):
    def __call__(
        self,
        logp: Tensor,  # (N,) nats
        log_ratio: Tensor,  # (N,) logp - old_logp, or its mean over the row's sequence
        advantage: Tensor,  # (N,)
    ) -> Surrogate: ...


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def _side(low: Tensor, high: Tensor) -> Tensor:
    return high.to(torch.int8) - low.to(torch.int8)


@dataclass(frozen=True)
class Clipped:
    """-min(r A, clip(r, 1 - low, 1 + high) A): PPO (arXiv:1707.06347, eq. 7), GRPO, DAPO, Dr.GRPO.

    `cap` bounds the loss of rows with A < 0 at -cap A: dual-clip PPO (arXiv:1912.09729, there 3),
    which is INTELLECT-2's two-sided delta (arXiv:2505.07291) too.
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
        low = (advantage < 0) & (ratio < 1 - self.low)
        high = (advantage > 0) & (ratio > 1 + self.high) | (advantage < 0) & (ratio > capped)
        return Surrogate(value, torch.where(low | high, 0, -ratio * advantage), _side(low, high))


@dataclass(frozen=True)
class SequenceClipped:
    """GSPO (arXiv:2507.18071): `Clipped` on exp(mean over a sequence of logp - old_logp)."""

    low: float = 3e-4
    high: float = 4e-4

    def __post_init__(self):
        _check_clip(self)

    def __call__(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor) -> Surrogate:
        return Clipped(self.low, self.high)(logp, log_ratio, advantage)


@dataclass(frozen=True)
class Cispo:
    """-sg(min(r, cap)) A logp: the ratio is capped, no row loses its gradient.

    MiniMax-M1 (arXiv:2506.13585) and ScaleRL (arXiv:2510.13786), whose cap is 5. `cap` is the
    ratio's upper bound itself, not its distance from 1; there is no lower bound.
    """

    cap: float = 5.0

    def __post_init__(self):
        if not self.cap >= 1:
            raise ValueError(f"Cispo(cap={self.cap}): cap bounds the ratio itself, so at least 1")

    def __call__(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor) -> Surrogate:
        ratio = _bounded_exp(log_ratio)
        slope = -ratio.clamp(max=self.cap) * advantage
        high = ratio > self.cap
        return Surrogate(slope * logp, slope, _side(torch.zeros_like(high), high))


@dataclass(frozen=True)
class SoftAdaptive:
    """SAPO (arXiv:2511.20347): -4/tau sigmoid(tau (r - 1)) A, a gate whose slope is 1 at r = 1.

    With s = sigmoid(tau (r - 1)), the derivative in logp is -4 s (1 - s) r A.
    """

    tau_positive: float = 1.0  # for A > 0
    tau_negative: float = 1.05  # else: negative updates are damped a little faster

    def __post_init__(self):
        for name in ("tau_positive", "tau_negative"):
            if not getattr(self, name) > 0:
                raise ValueError(f"SoftAdaptive({name}={getattr(self, name)}): must be positive")

    def __call__(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor) -> Surrogate:
        ratio = _bounded_exp(log_ratio)
        tau = torch.full_like(ratio, self.tau_negative).masked_fill(
            advantage > 0, self.tau_positive
        )
        s, rest = torch.sigmoid(tau * (ratio - 1)), torch.sigmoid(tau * (1 - ratio))
        none = torch.zeros_like(ratio, dtype=torch.int8)
        return Surrogate(-4 / tau * s * advantage, -4 * s * rest * ratio * advantage, none)


def _check_clip(objective: Clipped | SequenceClipped) -> None:
    low, high = objective.low, objective.high
    if not (0 <= low <= 1 and high >= 0):
        name = type(objective).__name__
        raise ValueError(f"{name}(low={low}, high={high}): low must lie in [0, 1], high be >= 0")


@dataclass(frozen=True)
class PolicyRows:
    """What the loss knows of each row beside its log-prob; floats in the logits' dtype."""

    advantage: Tensor  # (N,)
    weight: Tensor  # (N,) not 0
    old_logp: Tensor | None  # (N,) nats; None: every ratio is 1
    ref_logp: Tensor | None  # (N,) nats
    on_policy: Tensor  # (N,) bool
    segments: Tensor | None  # (N,) int64 in [0, S), with a sequence-level objective only

    def take(self, rows: Tensor | slice) -> "PolicyRows":
        given = {name: t for name, t in vars(self).items() if t is not None}
        return replace(self, **{name: t[rows] for name, t in given.items()})


class PolicyTerms(NamedTuple):
    """(N,) each; weights are in the slopes, not in the values."""

    value: Tensor  # the objective, or -A logp on policy
    ratio: Tensor  # 1 on policy
    side: Tensor  # as in Surrogate
    k3: Tensor  # 0 on policy and without a reference
    slope_logp: Tensor  # dloss/dlogp
    slope_entropy: Tensor | None  # dloss/dentropy, None where the coefficient is 0


def policy_terms(
    objective: PolicyObjective,
    rows: PolicyRows,
    logp: Tensor,  # (N,)
    kl_coef: float,
    entropy_coef: float,
) -> PolicyTerms:
    policy = ~rows.on_policy
    log_ratio = torch.zeros_like(logp)
    if rows.old_logp is not None:
        log_ratio = torch.where(policy, logp - rows.old_logp, 0)
    if rows.segments is not None:
        log_ratio = _segment_mean(log_ratio, rows)
    value, slope, side = objective(logp, log_ratio, rows.advantage)
    value = torch.where(policy, value, -rows.advantage * logp)
    slope = rows.weight * torch.where(policy, slope, -rows.advantage)
    if rows.segments is not None:
        # the mean over a sequence is its own transpose: the same step takes the slopes back
        slope = torch.where(policy, _segment_mean(slope, rows), slope)
    k3, k3_slope = _k3(rows, logp)
    slope_entropy = torch.where(policy, -entropy_coef * rows.weight, 0) if entropy_coef else None
    return PolicyTerms(
        value=value,
        ratio=torch.where(policy, _bounded_exp(log_ratio), 1),
        side=torch.where(policy, side, 0),
        k3=k3,
        slope_logp=slope + kl_coef * rows.weight * k3_slope,
        slope_entropy=slope_entropy,
    )


def policy_statistics(rows: PolicyRows, row: PolicyTerms, entropy: Tensor) -> tuple[Tensor, ...]:
    """In PolicyLoss's order, from policy_loss on."""
    policy = (~rows.on_policy).to(entropy.dtype)
    weight, weighted = rows.weight * policy, rows.weight * row.value
    total, count = weight.sum(), policy.sum().clamp(min=1)
    total = torch.where(total == 0, 1, total)
    ratio = row.ratio * policy
    return (
        (weighted * policy).sum(),
        (weighted * rows.on_policy).sum(),
        (weight * row.k3).sum() / total,
        (weight * entropy).sum() / total,
        (row.side < 0).sum() / count,
        (row.side > 0).sum() / count,
        ratio.sum() / count,
        ratio.max() if len(ratio) else ratio.new_zeros(()),
    )


def _k3(rows: PolicyRows, logp: Tensor) -> tuple[Tensor, Tensor]:
    """The k3 estimate of KL(policy || reference) and its derivative in logp."""
    if rows.ref_logp is None:
        return torch.zeros_like(logp), torch.zeros_like(logp)
    x = torch.where(rows.on_policy, 0, rows.ref_logp - logp)
    growth = torch.expm1(x.clamp(max=MAX_LOG_RATIO))
    return growth - x, -growth


def _segment_mean(x: Tensor, rows: PolicyRows) -> Tensor:  # (N,) each row its sequence's mean
    assert rows.segments is not None
    segments = rows.segments + 1
    segments = torch.where(rows.on_policy, 0, segments)  # on-policy rows belong to no sequence
    n = int(segments.max()) + 1 if len(segments) else 1
    count = segment_sum(torch.ones_like(x), segments, n)
    return (segment_sum(x, segments, n) / count.clamp(min=1))[segments]
