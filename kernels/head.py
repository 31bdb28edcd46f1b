"""Inputs, results and gradients of a linear head, and the formulas that all backends share.

    z = (hidden @ weight.T + bias) / temperature      y the target, u_j = z_j - z_y - shift
    other = sum_{j != y} exp(u_j)    moment = sum_{j != y} exp(u_j) u_j    own = exp(-shift)
    log_total = log1p(other + expm1(-shift))    logp = -shift - log_total
    lse = z_y + shift + log_total
    H = log_total - (moment - own shift) / (own + other)
    dz_j = p_j (g_lse - g_logp - g_H (z_j - lse + H))    p_j = exp(z_j - lse)    for j != y
    dz_y = -g_logp expm1(logp) + p_y (g_lse - g_H (logp + H))

g_x is the derivative of the loss in x. u is relative to an anchor, by default the target's logit
(shift = 0). Then no digits cancel as p_y -> 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

IGNORE = -100  # target of a row without a target


class LogProb(NamedTuple):
    """Results of each row, (N,) each, in nats. They are 0 for a row without a target."""

    logp: Tensor  # log-prob of the target
    entropy: Tensor  # entropy of the distribution over the vocabulary
    lse: Tensor  # log-sum-exp of the logits

    @classmethod
    def concatenate(cls, parts: Sequence["LogProb"]) -> "LogProb":
        """Return the results of the rows of all parts, in their order."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            logp=torch.cat([part.logp for part in parts]),
            entropy=torch.cat([part.entropy for part in parts]),
            lse=torch.cat([part.lse for part in parts]),
        )

    def take(self, rows: Tensor | slice | None) -> "LogProb":
        """Return the results of some rows; None means all."""
        return self if rows is None else LogProb(*(x[rows] for x in self))

    def to(self, dtype: torch.dtype) -> "LogProb":
        return LogProb(*(x.to(dtype) for x in self))


class Forward(NamedTuple):
    """Results of a forward pass that the backward pass needs."""

    results: LogProb  # (N,) each; the dtype may be wider than that of the logits
    log_total: Tensor | None = None  # (N,) fp64, if the backend needs it to read `kept`
    # (B,) uint8 in the backend's format. None or empty: all rows are recomputed.
    kept: Tensor | None = None


@dataclass(frozen=True)
class Head:
    """The LM head with the rows that have a target."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (N,) int64 in [0, V)
    temperature: float | Tensor  # scalar or (N,)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of logits, results and accumulators: fp64 if an input is fp64, else fp32."""
        inputs = torch.promote_types(self.hidden.dtype, self.weight.dtype)
        return torch.promote_types(inputs, torch.float32)

    @property
    def narrow(self) -> bool:
        """Whether GEMMs multiply bf16 values, which is faster than fp32 on this device."""
        if self.hidden.dtype != torch.bfloat16 or self.weight.dtype != torch.bfloat16:
            return False
        return self.hidden.is_cuda or torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def take(self, rows: Tensor | slice | None) -> "Head":
        """Return the head with some of its rows; None means all."""
        if rows is None:
            return self
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature[rows]
        return replace(
            self, hidden=self.hidden[rows], targets=self.targets[rows], temperature=temperature
        )


class RowGrads(NamedTuple):
    """Derivatives of the loss in each row's results, (N,) each; None means 0 in all rows."""

    logp: Tensor | None
    entropy: Tensor | None = None
    lse: Tensor | None = None

    def take(self, rows: Tensor | slice | None) -> "RowGrads":
        """Return the derivatives of some rows; None means all."""
        if rows is None:
            return self
        return RowGrads(*(g if g is None else g[rows] for g in self))

    def active_rows(self) -> Tensor | None:
        """Return the indices of the rows with a derivative other than 0; None means all rows."""
        given = [g != 0 for g in self if g is not None]
        active = torch.stack(given).any(0).nonzero()[:, 0]
        return None if len(active) == len(given[0]) else active


class RowwiseLoss(Protocol):
    """A loss whose derivatives in a row's results depend only on that row.

    A backend can therefore compute a chunk's gradients right after its log-probs.
    """

    def row_grads(
        self,
        rows: slice,  # of the N rows
        logp: Tensor,  # (rows,) nats
    ) -> RowGrads: ...  # (rows,) each


class Needs(NamedTuple):
    """The inputs that need a gradient. A frozen input costs no GEMM."""

    hidden: bool
    weight: bool
    bias: bool


NOTHING = Needs(False, False, False)


class Gradients(NamedTuple):
    """Derivatives of the loss in a head's inputs. None if they are not needed."""

    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D) in the accumulators' dtype, or in weight's if written once
    bias: Tensor | None  # (V,) in the accumulators' dtype

    @classmethod
    def allocate(
        cls,
        head: Head,
        needs: Needs,
        *,
        hidden: torch.dtype,
        weight: torch.dtype,
        bias: torch.dtype,
        zero: bool = False,
    ) -> "Gradients":
        """Return memory of these dtypes for the gradients that are needed.

        zero: whether it is filled with 0.
        """
        make = partial(torch.zeros if zero else torch.empty, device=head.hidden.device)
        return cls(
            hidden=make(head.hidden.shape, dtype=hidden) if needs.hidden else None,
            weight=make(head.weight.shape, dtype=weight) if needs.weight else None,
            bias=make(len(head.weight), dtype=bias) if needs.bias else None,
        )

    def at(self, rows: slice) -> "Gradients":
        """Return the gradients with views of some rows of the hidden states' gradient."""
        if self.hidden is None:
            return self
        return self._replace(hidden=self.hidden[rows])

    def with_all_rows(self, rows: Tensor | None, n: int) -> "Gradients":
        """Return gradients of n rows from gradients of only `rows`. The other rows get 0.

        rows: None means all n rows.
        """
        if rows is None or self.hidden is None:
            return self
        hidden = self.hidden.new_zeros(n, *self.hidden.shape[1:])
        return self._replace(hidden=hidden.index_copy_(0, rows, self.hidden))


def from_sums(
    base: Tensor,  # (N,) logit / temperature that the sums are relative to
    other: Tensor,  # (N,)
    moment: Tensor | None,  # (N,); None: entropy is not needed, and is 0
    shift: Tensor,  # (N,) base minus the target's logit / temperature
) -> tuple[LogProb, Tensor]:
    """Return the results and log_total, (N,) each, from the rows' sums over the vocabulary."""
    own = (-shift).exp()
    log_total = torch.log1p(other + torch.expm1(-shift))
    logp = -shift - log_total
    entropy = torch.zeros_like(log_total)
    if moment is not None:
        entropy = log_total - (moment - own * shift) / (own + other)
    return LogProb(logp, entropy, base + log_total), log_total


class LogitGrads(NamedTuple):
    """Coefficients of the derivative in the logits before temperature, (N,) each.

    dz_j = exp(u_j) (c0 + c1 u_j) for all j except the target, with u_j relative to a base.
    """

    c0: Tensor
    c1: Tensor
    at_target: Tensor  # dz_y


def logit_grads(
    results: LogProb,
    row_grads: RowGrads,
    temperature: float | Tensor,
    log_total: Tensor | float = 0.0,
) -> LogitGrads:
    """Return the coefficients for u_j = z_j - lse + log_total."""
    logp, entropy, _ = results
    zero = torch.zeros_like(logp)
    g_logp, g_entropy, g_lse = (zero if g is None else g for g in row_grads)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(zero)
    per_z = zero + 1 / temperature
    at_target = -g_logp * logp.expm1() + logp.exp() * (g_lse - g_entropy * (logp + entropy))
    c0 = g_lse - g_logp + g_entropy * (log_total - entropy)
    per_e = per_z * (zero - log_total).exp()
    return LogitGrads(c0 * per_e, -g_entropy * per_e, at_target * per_z)


def logit_grads_about_lse(
    results: LogProb,  # wider than fp32
    row_grads: RowGrads,
    temperature: float | Tensor,
    per_nat: float | Tensor = 1.0,  # scalar or (N,): units of base and u per nat
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, LogitGrads]:
    """Return base (N,) and the coefficients for u_j = z_j - base, contiguous and of `dtype`.

    base is lse rounded to `dtype`. The rounding error would scale all probabilities of a row, so c0
    and c1 correct for it.
    """
    c0, c1, at_target = logit_grads(results, row_grads, temperature)
    exact = results.lse * per_nat
    base = exact.to(dtype)
    rest = (exact - base) / per_nat
    scale = (-rest).exp()
    coefficients = LogitGrads(
        c0=(scale * (c0 - rest * c1)).to(dtype).contiguous(),
        c1=(scale * c1 / per_nat).to(dtype).contiguous(),
        at_target=at_target.to(dtype).contiguous(),
    )
    return base.contiguous(), coefficients
