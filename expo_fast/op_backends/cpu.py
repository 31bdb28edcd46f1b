"""C++ backend: log-probs and gradients of a head on a CPU.

forward alone      1 GEMM, nothing of size (N, V)
one pass           3 GEMMs: the exponentials of one span of rows are kept in bf16
forward, backward  3 GEMMs for the rows whose exponentials fit KEPT_BYTES, 4 for later rows

Exponentials are kept if hidden states and weight are bf16. Else each backward recomputes the
logits. It also does so for a derivative in the entropy, which needs more digits of the logits than
bf16 has. `Forward.kept` has the bytes of native_head.KeptExponentials.

native_library.py compiles and loads the kernels.
"""

import torch

from expo_fast.kernels.head import (
    NOTHING,
    Forward,
    Gradients,
    Head,
    LogProb,
    Needs,
    RowGrads,
    RowwiseLoss,
    logit_grads_about_lse,
)
from expo_fast.kernels.integers import ceil_div
from expo_fast.op_backends import native_head
from expo_fast.op_backends.native_head import (
    ROW_MULTIPLE,
    KeptExponentials,
    as_kernels_read,
    can_keep,
)

SPAN = 1024  # rows, csrc's kSpan: the weight gradient of more rows is summed in fp32 memory
# Bytes of exponentials that `log_probs` keeps for `gradients`: 2 V bytes a row.
KEPT_BYTES = 512 << 20


def log_probs(head: Head, needs: Needs = NOTHING) -> Forward:
    """Return the results in fp64. If gradients are needed, keep exponentials for them.

    Raise native_library.Unavailable if the kernels cannot be compiled or loaded.
    """
    head = as_kernels_read(head)
    n_kept = _n_kept(head) if any(needs) else 0
    if not n_kept:
        return Forward(native_head.forward(head))
    kept = KeptExponentials.empty(head, n_kept)
    parts = [native_head.forward(head.take(slice(0, n_kept)), kept)]
    if n_kept < len(head.targets):
        rest = head.take(slice(n_kept, None))
        parts.append(native_head.forward(rest))
    return Forward(LogProb.concatenate(parts), kept=kept.memory)


def log_probs_and_gradients(
    head: Head, loss: RowwiseLoss, needs: Needs
) -> tuple[LogProb, Gradients]:
    """Return results and gradients of a loss whose rows are independent."""
    n = len(head.targets)
    if not n or not can_keep(head):
        results = log_probs(head).results
        row_grads = loss.row_grads(slice(0, n), results.logp.to(head.dtype))
        return results, gradients(head, Forward(results), row_grads, needs)
    head = as_kernels_read(head)
    memory = KeptExponentials.empty(head, min(n, SPAN)).memory
    sums = _GradientSums(head, needs, n_sums=ceil_div(n, SPAN))
    parts = []
    for start in range(0, n, SPAN):
        rows = slice(start, min(start + SPAN, n))
        kept = KeptExponentials(memory, rows.stop - start)
        results = native_head.forward(head.take(rows), kept)
        row_grads = loss.row_grads(rows, results.logp.to(head.dtype))
        sums.add(rows, results, row_grads, kept)
        parts.append(results)
    return LogProb.concatenate(parts), sums.finish()


def gradients(head: Head, forward: Forward, row_grads: RowGrads, needs: Needs) -> Gradients:
    """Return gradients from the forward results. Rows without a derivative are not computed."""
    if not any(needs):
        return Gradients(None, None, None)
    head = as_kernels_read(head)
    n = len(head.targets)
    n_kept = 0
    if forward.kept is not None and len(forward.kept):
        n_kept = _n_kept(head)
    n_sums = ceil_div(n_kept, SPAN) + ceil_div(n - n_kept, SPAN)
    sums = _GradientSums(head, needs, n_sums)
    if n_kept:
        assert forward.kept is not None
        rows = slice(0, n_kept)
        kept = KeptExponentials(forward.kept, n_kept)
        sums.add(rows, forward.results.take(rows), row_grads.take(rows), kept)
    if n_kept < n:
        rows = slice(n_kept, n)
        sums.add(rows, forward.results.take(rows), row_grads.take(rows))
    return sums.finish()


def _n_kept(head: Head) -> int:
    """Return the number of rows whose exponentials `log_probs` keeps.

    It is the number of all rows, or a multiple of ROW_MULTIPLE.
    """
    if not can_keep(head):
        return 0
    most = KEPT_BYTES // (2 * len(head.weight))
    n = len(head.targets)
    return n if n <= most else most // ROW_MULTIPLE * ROW_MULTIPLE


class _GradientSums:
    """The gradients of a head, from one part of its rows after the other."""

    def __init__(self, head: Head, needs: Needs, n_sums: int):
        """head: from `as_kernels_read`.

        n_sums: number of terms of the weight's gradient. The sum of several is in fp32.
        """
        self._head = head
        self._grads = _empty_gradients(head, needs, n_sums)
        self._has_sums = False  # whether the gradients of weight and bias have values

    def add(
        self,
        rows: slice,
        results: LogProb,  # of these rows, fp64
        row_grads: RowGrads,
        kept: KeptExponentials | None = None,
    ) -> None:
        """Write the gradients of these rows' hidden states, and add to those of weight and bias.

        kept: the exponentials of these rows; None: recompute their logits.
        """
        out = self._grads.at(rows)
        active = row_grads.active_rows()
        n_active = len(results.logp) if active is None else len(active)
        if out.hidden is not None and active is not None:
            out.hidden.zero_()
        if n_active == 0:
            return
        head = self._head.take(rows).take(active)
        t = head.temperature
        base, coefficients = logit_grads_about_lse(
            results.take(active),
            row_grads.take(active),
            t,
            per_nat=t,  # csrc's logits are before temperature
        )
        active_grads = out
        if out.hidden is not None and active is not None:
            hidden = native_head.empty((n_active, out.hidden.shape[1]), out.hidden.dtype)
            active_grads = out._replace(hidden=hidden)
        native_head.backward(
            head,
            base,
            coefficients,
            active_grads,
            kept=kept if row_grads.entropy is None else None,
            columns=None if active is None else active.int(),
            accumulate=self._has_sums,
        )
        self._has_sums = True
        if out.hidden is not None and active is not None:
            assert active_grads.hidden is not None
            out.hidden.index_copy_(0, active, active_grads.hidden)

    def finish(self) -> Gradients:
        """Return the gradients. They are 0 if no row has a derivative."""
        _, weight, bias = self._grads
        if not self._has_sums:
            for sums in (weight, bias):
                if sums is not None:
                    sums.zero_()
        return self._grads


def _empty_gradients(head: Head, needs: Needs, n_sums: int) -> Gradients:
    """Return memory for the gradients. They are bf16 if their inputs are, unless they are sums."""
    bf16_hidden = head.hidden.dtype == torch.bfloat16
    bf16_weight = head.weight.dtype == torch.bfloat16 and n_sums <= 1
    return Gradients.allocate(
        head,
        needs,
        hidden=torch.bfloat16 if bf16_hidden else torch.float32,
        weight=torch.bfloat16 if bf16_weight else torch.float32,
        bias=torch.float32,
    )
