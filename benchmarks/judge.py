"""How far an op's results are from fp64, beside how far plain PyTorch in the inputs' dtype is.

    dlogits = slope (onehot(target) - softmax(logits))    slope = dloss/dlogp

The log-probs of all rows are computed, and from them the loss and its slopes; gradients of some
rows and of some vocabulary entries follow without (N, V) memory.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case, Op
from expo_fast.ops import IGNORE

SAMPLE = 64  # rows; vocabulary entries: their targets and as many others
CHUNK_LOGITS = 1 << 27
ROUNDING = 2**-8  # bf16's: of a loss one number is compared, whose error can vanish by chance


class Answer(NamedTuple):
    value: Tensor  # log-probs (N,), or the loss
    d_hidden: Tensor | None  # (S, D) of the rows sampled
    d_weight: Tensor | None  # (2S, D) of the vocabulary entries sampled


class Errors(NamedTuple):
    value: float  # nats: the largest of the rows', or the loss's
    d_hidden: float | None  # |error| / |truth|, Frobenius
    d_weight: float | None

    def __str__(self) -> str:
        found = zip(self._fields, self, strict=True)
        return ", ".join(f"{name} {x:.1e}" for name, x in found if x is not None)

    def within_twice(self, plain: "Errors", is_loss: bool) -> bool:
        pairs = zip(self[1:], plain[1:], strict=True)
        near = self.value <= 2 * plain.value + (ROUNDING if is_loss else 0)
        return near and all(a <= 2 * b for a, b in pairs if a is not None and b is not None)


class Yardstick(NamedTuple):
    truth: Answer  # fp64
    plain: Errors  # of PyTorch in the inputs' dtype, with an fp32 softmax


def yardstick(case: Case, op: Op) -> Yardstick:
    truth = by_definition(case, op, torch.float64)
    return Yardstick(truth, errors(by_definition(case, op, case.weight.dtype), truth))


def errors(got: Answer, truth: Answer) -> Errors:
    def relative(a: Tensor | None, b: Tensor | None) -> float | None:
        return None if a is None or b is None else ((a.double() - b).norm() / b.norm()).item()

    worst = (got.value.double() - truth.value).abs().max().item()
    grads = (relative(a, b) for a, b in zip(got[1:], truth[1:], strict=True))
    return Errors(worst, *grads)


def sampled(case: Case) -> tuple[Tensor, Tensor]:
    """Rows and vocabulary entries, the first and the last of each among them."""

    def spaced(n: int) -> Tensor:
        return torch.linspace(0, n - 1, min(n, SAMPLE), device=case.targets.device).long()

    rows = spaced(len(case.targets))
    entries = torch.cat([spaced(len(case.weight)), case.targets[rows].clamp(min=0)])
    return rows, entries


def answer(case: Case, value: Tensor) -> Answer:
    """Return what a contestant returned, and the gradients it left."""
    rows, entries = sampled(case)
    if case.hidden.grad is None or case.weight.grad is None:
        return Answer(value, None, None)
    return Answer(value, case.hidden.grad[rows], case.weight.grad[entries])


@torch.no_grad()
def by_definition(case: Case, op: Op, dtype: torch.dtype) -> Answer:
    hidden, weight = case.hidden.to(dtype), case.weight.to(dtype)
    logp, lse = _log_probs(hidden, weight, case.targets)
    reference = None
    if op.reference:
        reference = _log_probs(case.ref_hidden.to(dtype), weight, case.targets)[0]
    with torch.enable_grad():
        loss = op.loss(case, logp.requires_grad_(), reference)
        slope = torch.autograd.grad(loss, logp)[0] * case.live
    if not op.backward:
        return Answer(logp.detach(), None, None)
    rows, entries = sampled(case)
    y, live = case.targets[rows].clamp(min=0), slope[rows, None]
    d_rows = -live * ((hidden[rows] @ weight.T).to(lse.dtype) - lse[rows, None]).exp()
    d_rows.scatter_add_(1, y[:, None], live)
    d_entries = -slope[:, None] * ((hidden @ weight[entries].T).to(lse.dtype) - lse[:, None]).exp()
    d_entries += slope[:, None] * (case.targets[:, None] == entries)
    return Answer(
        (logp if op.head else loss).detach(),
        d_rows.to(dtype) @ weight,
        d_entries.to(dtype).T @ hidden,
    )


def _log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log-prob of the target, log-sum-exp of the logits), a chunk of rows at a time."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logp, lse = torch.empty(2, len(hidden), dtype=wide, device=hidden.device)
    size = max(1, CHUNK_LOGITS // len(weight))
    for rows in torch.arange(len(hidden), device=hidden.device).split(size):
        logits = (hidden[rows] @ weight.T).to(wide)
        lse[rows] = logits.logsumexp(-1)
        logp[rows] = logits.gather(1, targets[rows].clamp(min=0)[:, None])[:, 0] - lse[rows]
    return logp * (targets != IGNORE), lse
