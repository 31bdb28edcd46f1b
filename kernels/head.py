"""A linear head, what is known of its rows, and the formulas that every backend shares.

    z = (hidden @ weight.T + bias) / temperature      y the target, u_j = z_j - z_y - shift
    other = sum_{j != y} exp(u_j)    moment = sum_{j != y} exp(u_j) u_j    own = exp(-shift)
    log_total = log1p(other + expm1(-shift))    logp = -shift - log_total
    lse = z_y + shift + log_total
    H = log_total - (moment - own shift) / (own + other)
    dz_j = p_j (g_lse - g_logp - g_H (z_j - lse + H))    p_j = exp(z_j - lse)    for j != y
    dz_y = -g_logp expm1(logp) + p_y (g_lse - g_H (logp + H))

Anchored at the target (shift = 0) nothing cancels as p_y -> 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100  # target of a row that has none


class LogProb(NamedTuple):
    """Per row, in nats; zero where there is no target."""

    logp: Tensor  # log-prob of the target
    entropy: Tensor  # of the whole distribution
    lse: Tensor  # log-sum-exp of the logits

    def take(self, rows: Tensor | slice) -> "LogProb":
        return LogProb(*(x[rows] for x in self))

    def to(self, dtype: torch.dtype) -> "LogProb":
        return LogProb(*(x.to(dtype) for x in self))


class Forward(NamedTuple):
    """What a forward leaves for its backward."""

    results: LogProb  # (N,) each; may be wider than the logits
    # E of the first K rows, (K, V padded) bf16, or dlogp/dhidden (N, D) fp32; None: recompute
    kept: Tensor | None = None
    log_total: Tensor | None = None  # (K,), with E


@dataclass(frozen=True)
class Head:
    """Rows that have a target, and the layer they go through."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (N,) int64 in [0, V)
    temperature: float | Tensor  # scalar or (N,)

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, results and accumulators: fp64 where an input is, else fp32."""
        inputs = torch.promote_types(self.hidden.dtype, self.weight.dtype)
        return torch.promote_types(inputs, torch.float32)

    @property
    def narrow(self) -> bool:
        """Whether products are of bf16 values, which this device multiplies faster than fp32."""
        if self.hidden.dtype != torch.bfloat16 or self.weight.dtype != torch.bfloat16:
            return False
        return self.hidden.is_cuda or torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def take(self, rows: Tensor | slice) -> "Head":
        t = self.temperature
        t = t[rows] if isinstance(t, Tensor) else t
        return replace(self, hidden=self.hidden[rows], targets=self.targets[rows], temperature=t)


class Slopes(NamedTuple):
    """Derivative of the loss in each row's results; None is zero."""

    logp: Tensor | None  # (N,)
    entropy: Tensor | None = None  # (N,)
    lse: Tensor | None = None  # (N,)

    def take(self, rows: Tensor | slice) -> "Slopes":
        return Slopes(*(g if g is None else g[rows] for g in self))

    def live(self) -> Tensor | None:
        """Indices of the rows with any slope, None where all have one."""
        given = [g != 0 for g in self if g is not None]
        some = torch.stack(given).any(0).nonzero()[:, 0]
        return None if len(some) == len(given[0]) else some


class Needs(NamedTuple):
    """Which gradients are wanted: a frozen input costs no GEMM."""

    hidden: bool
    weight: bool
    bias: bool


NOTHING = Needs(False, False, False)
SlopesOf = Callable[[slice, Tensor], Slopes]  # of (rows, their logp)


class Gradients(NamedTuple):
    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D) in the accumulators' dtype
    bias: Tensor | None  # (V,) in the accumulators' dtype

    def at(self, rows: slice) -> "Gradients":
        return self._replace(hidden=self.hidden if self.hidden is None else self.hidden[rows])


def of_live_rows(
    gradients: Callable[[Head, LogProb, Slopes, Needs], Gradients],
    head: Head,
    results: LogProb,
    slopes: Slopes,
    needs: Needs,
) -> Gradients:
    """`gradients` without the rows that have no slope, whose hidden gradient is 0."""
    if not any(needs):
        return Gradients(None, None, None)
    live = slopes.live()
    if live is None:
        return gradients(head, results, slopes, needs)
    grads = gradients(head.take(live), results.take(live), slopes.take(live), needs)
    if grads.hidden is None:
        return grads
    d_hidden = grads.hidden.new_zeros(len(head.targets), grads.hidden.shape[1])
    return grads._replace(hidden=d_hidden.index_copy_(0, live, grads.hidden))


def from_sums(
    base: Tensor,  # (N,) what the sums are relative to, over temperature
    other: Tensor,  # (N,)
    moment: Tensor | None,  # (N,); None: entropy is not asked for, and 0
    shift: Tensor,  # (N,) base less the target's logit over temperature
) -> tuple[LogProb, Tensor]:  # and log_total
    own = (-shift).exp()
    log_total = torch.log1p(other + torch.expm1(-shift))
    logp, h = -shift - log_total, torch.zeros_like(log_total)
    if moment is not None:
        h = log_total - (moment - own * shift) / (own + other)
    return LogProb(logp, h, base + log_total), log_total


def logit_slopes(
    results: LogProb, slopes: Slopes, temperature: float | Tensor, log_total: Tensor | float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:  # (N,) each
    """(c0, c1, dz_y), with dz_j = exp(u_j) (c0 + c1 u_j) and u_j = z_j - lse + log_total.

    dz is the derivative in the logits before the temperature.
    """
    logp, entropy, _ = results
    zero = torch.zeros_like(logp)
    g_logp, g_entropy, g_lse = (zero if g is None else g for g in slopes)
    t = temperature.to(zero) if isinstance(temperature, Tensor) else temperature
    per_z = zero + 1 / t
    at_target = -g_logp * logp.expm1() + logp.exp() * (g_lse - g_entropy * (logp + entropy))
    c0 = g_lse - g_logp + g_entropy * (log_total - entropy)
    per_e = per_z * (zero - log_total).exp()
    return c0 * per_e, -g_entropy * per_e, at_target * per_z


def slopes_about_lse(
    results: LogProb,  # wider than fp32
    slopes: Slopes,
    temperature: float | Tensor,
    per_nat: float | Tensor = 1.0,  # scalar or (N,): the unit that base and u are measured in
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (N,) of dtype each
    """(base, c0, c1, dz_y), with dz_j = exp(u_j) (c0 + c1 u_j) and u_j = z_j - base.

    base is lse rounded to dtype. The rest would scale all of a row's probabilities, so it is put
    into c0 and c1.
    """
    c0, c1, at_target = logit_slopes(results, slopes, temperature)
    exact = results.lse * per_nat
    base = exact.to(dtype)
    rest = (exact - base) / per_nat
    scale = (-rest).exp()
    given = base, scale * (c0 - rest * c1), scale * c1 / per_nat, at_target
    base, c0, c1, at_target = (x.to(dtype).contiguous() for x in given)
    return base, c0, c1, at_target
