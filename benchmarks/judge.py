"""Compare an op's results with fp64, and with the accuracy of plain PyTorch in the inputs' dtype.

    d logits = grad (onehot(target) - softmax(logits))    grad = d loss / d logp

The log-probs of all rows are computed, and from them the loss and its gradients `grad`. The
gradients of the inputs are compared in some rows and some vocabulary entries, so that no (N, V)
memory is needed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case, Op
from expo_fast.ops import IGNORE

SAMPLE = 64  # at most so many rows are compared; of vocabulary entries, twice as many
CHUNK_LOGITS = 1 << 27  # logits that are in memory at once
# The rounding error of bf16. A loss may differ by as much in addition, because the error of a
# single number in plain PyTorch may be close to 0 by chance.
ROUNDING = 2**-8


class Answer(NamedTuple):
    """What a contestant computed."""

    value: Tensor  # log-probs (N,), or the loss
    d_hidden: Tensor | None  # (S, D), in the sampled rows
    d_weight: Tensor | None  # (2S, D), in the sampled vocabulary entries


class Errors(NamedTuple):
    """Distances from the truth."""

    value: float  # nats: the largest error of a row, or the error of the loss
    d_hidden: float | None  # |error| / |truth|, Frobenius norms
    d_weight: float | None

    def __str__(self) -> str:
        found = zip(self._fields, self, strict=True)
        return ", ".join(f"{name} {x:.1e}" for name, x in found if x is not None)

    def within_twice(self, plain: "Errors", is_loss: bool) -> bool:
        """Return whether no error exceeds twice that of plain PyTorch."""
        allowed = 2 * plain.value
        if is_loss:
            allowed += ROUNDING
        if not self.value <= allowed:
            return False
        for error, plain_error in zip(self[1:], plain[1:], strict=True):
            if error is None or plain_error is None:
                continue
            if not error <= 2 * plain_error:
                return False
        return True


class Baseline(NamedTuple):
    """What results are compared with."""

    truth: Answer  # the answer in fp64
    plain: Errors  # errors of PyTorch in the inputs' dtype, with an fp32 softmax


def baseline(case: Case, op: Op) -> Baseline:
    """Compute the truth, and the errors of plain PyTorch."""
    truth = by_definition(case, op, torch.float64)
    plain = by_definition(case, op, case.weight.dtype)
    return Baseline(truth, errors(plain, truth))


def errors(got: Answer, truth: Answer) -> Errors:
    """Return the errors of an answer. A gradient that either one lacks gives None."""
    value = (got.value.double() - truth.value).abs().max().item()
    d_hidden = _relative_error(got.d_hidden, truth.d_hidden)
    d_weight = _relative_error(got.d_weight, truth.d_weight)
    return Errors(value, d_hidden, d_weight)


def _relative_error(got: Tensor | None, truth: Tensor | None) -> float | None:
    if got is None or truth is None:
        return None
    return ((got.double() - truth).norm() / truth.norm()).item()


def sampled(case: Case) -> tuple[Tensor, Tensor]:
    """Return the row and vocabulary indices to compare, the first and the last of each included.

    Half of the rows are active ones, because all others may have a gradient of 0. Vocabulary
    entries are the targets of the rows and as many others.
    """

    def spaced(n: int, most: int) -> Tensor:
        return torch.linspace(0, n - 1, min(n, most), device=case.targets.device).long()

    active = case.active.nonzero().squeeze(1)
    some_active = active[spaced(len(active), SAMPLE // 2)]
    rows = torch.cat([spaced(len(case.targets), SAMPLE // 2), some_active])
    entries = torch.cat([spaced(len(case.weight), SAMPLE), case.targets[rows].clamp(min=0)])
    return rows, entries


def answer(case: Case, value: Tensor) -> Answer:
    """Return the value that a contestant returned, with the gradients that it left in the case."""
    rows, entries = sampled(case)
    if case.hidden.grad is None or case.weight.grad is None:
        return Answer(value, None, None)
    return Answer(value, case.hidden.grad[rows], case.weight.grad[entries])


@torch.no_grad()
def by_definition(case: Case, op: Op, dtype: torch.dtype) -> Answer:
    """Return the answer by the formulas, computed in a dtype."""
    hidden = case.hidden.to(dtype)
    weight = case.weight.to(dtype)
    logp, lse = _log_probs(hidden, weight, case.targets)
    reference = None
    if op.reference:
        reference, _ = _log_probs(case.ref_hidden.to(dtype), weight, case.targets)
    with torch.enable_grad():
        loss = op.loss(case, logp.requires_grad_(), reference)
        grad = torch.autograd.grad(loss, logp)[0] * case.active
    if not op.backward:
        return Answer(logp.detach(), None, None)

    rows, entries = sampled(case)
    row_grad = grad[rows, None]
    row_targets = case.targets[rows].clamp(min=0)
    row_logits = (hidden[rows] @ weight.T).to(lse.dtype)
    d_row_logits = -row_grad * (row_logits - lse[rows, None]).exp()
    d_row_logits.scatter_add_(1, row_targets[:, None], row_grad)

    entry_logits = (hidden @ weight[entries].T).to(lse.dtype)
    d_entry_logits = -grad[:, None] * (entry_logits - lse[:, None]).exp()
    d_entry_logits += grad[:, None] * (case.targets[:, None] == entries)

    value = logp if op.head else loss
    d_hidden = d_row_logits.to(dtype) @ weight
    d_weight = d_entry_logits.to(dtype).T @ hidden
    return Answer(value.detach(), d_hidden, d_weight)


def _log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the targets' log-probs and the log-sum-exp of the logits, (N,) each.

    Logits are computed for one chunk of rows at a time.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logp, lse = torch.empty(2, len(hidden), dtype=wide, device=hidden.device)
    size = max(1, CHUNK_LOGITS // len(weight))
    for rows in torch.arange(len(hidden), device=hidden.device).split(size):
        logits = (hidden[rows] @ weight.T).to(wide)
        lse[rows] = logits.logsumexp(-1)
        index = targets[rows].clamp(min=0)[:, None]
        logp[rows] = logits.gather(1, index)[:, 0] - lse[rows]
    return logp * (targets != IGNORE), lse
