"""Triton backend: it stores the exponentials E of kernels/logprob.py to save GEMMs.

forward alone      1 GEMM, nothing of size (N, V)
one pass           3 GEMMs, over chunks of rows that store E in one buffer
forward, backward  3 GEMMs for rows whose E fits a fraction of memory, 4 for the other
                   rows, whose backward recomputes slices of the vocabulary
frozen head        2 GEMMs: the forward computes dlogp/dhidden, and the backward scales it

`Forward.kept` has the bytes of E of the first K rows, (K, V padded to 16 bytes) bf16. With a frozen
head it has the bytes of dlogp/dhidden, (N, D) fp32.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from expo_fast.kernels import logprob
from expo_fast.kernels.head import (
    NOTHING,
    Forward,
    Gradients,
    Head,
    LogProb,
    Needs,
    RowGrads,
    RowwiseLoss,
)
from expo_fast.kernels.integers import equal_spans
from expo_fast.kernels.products import matmul

# Fractions of a GPU's total memory. Fractions of free memory would make results depend on it.
KEPT_FRACTION = 0.125  # for E that the forward keeps for the backward
CHUNK_FRACTION = 0.0625  # for E or dz of one chunk
INTERPRETED_BYTES = 4 << 30  # total memory that is assumed in the interpreter
# Maximum rows of a chunk. More rows mean fewer passes over the fp32 weight gradient, and fuller
# waves of hidden's GEMM, which for 16384 rows of D 896 has 128 x 7 tiles on 132 SMs.
MOST_ROWS = 16384
MOST_COLUMNS = 32768  # maximum columns of recomputed dz
GATHER_BELOW = 0.8  # fraction of active rows below which gathering E is faster than a full GEMM
GATHER_FROM = 4096  # minimum rows; for fewer, the host sync takes longer than the GEMMs


def log_probs(head: Head, needs: Needs = NOTHING) -> Forward:
    """Return the results, with E of the rows that fit or, for a frozen head, dlogp/dhidden."""
    results = _empty_results(head)
    if needs.weight or needs.bias:
        return _keep_exponentials(head, results)
    if needs.hidden:
        return _keep_hidden_gradients(head, results)
    _forward(head, slice(0, len(head.targets)), results)
    return Forward(results)


def _empty_results(head: Head) -> LogProb:
    n = len(head.targets)
    logp, entropy, lse = head.hidden.new_empty(3, n, dtype=torch.float64)
    return LogProb(logp, entropy, lse)


def _keep_exponentials(head: Head, results: LogProb) -> Forward:
    n = len(head.targets)
    fit = min(n, _rows_within(KEPT_FRACTION, head))
    if fit < n:
        fit -= fit % logprob.config_for(head.hidden).BN
    padded = logprob.padded_e(head, fit)
    e = padded[:, : len(head.weight)]
    log_total = results.logp.new_zeros(n)
    log_total[:fit] = _forward(head, slice(0, fit), results, e)
    _forward(head, slice(fit, n), results)
    return Forward(results, log_total, _as_bytes(padded))


def _keep_hidden_gradients(head: Head, results: LogProb) -> Forward:
    hidden_grads = _empty_like(head.hidden, torch.float32)
    ones = torch.ones_like(results.logp)
    for span, chunk in _stored_chunks(head, results):
        out = Gradients(hidden_grads[span], weight=None, bias=None)
        _add_gradients(chunk, RowGrads(ones[span]), out)
    return Forward(results, kept=_as_bytes(hidden_grads))


def _empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return contiguous memory with the shape of x, for any layout of x."""
    return x.new_empty(x.shape, dtype=dtype)


def log_probs_and_gradients(
    head: Head, loss: RowwiseLoss, needs: Needs
) -> tuple[LogProb, Gradients]:
    """Return results and gradients from one pass of 3 GEMMs."""
    results = _empty_results(head)
    n_chunks = len(list(_spans(head)))
    grads = _empty_gradients(head, needs, n_chunks)
    for span, chunk in _stored_chunks(head, results):
        logp = chunk.results.logp.to(head.dtype)
        row_grads = loss.row_grads(span, logp)
        _add_gradients(chunk, row_grads, grads.at(span), accumulate=span.start > 0)
    return results, grads


def gradients(head: Head, forward: Forward, row_grads: RowGrads, needs: Needs) -> Gradients:
    """Return gradients from what `log_probs` kept. The logits of other rows are recomputed."""
    only_logp = row_grads.entropy is None and row_grads.lse is None
    if _keeps_hidden_gradients(forward, needs) and only_logp:
        return _scaled_hidden_gradients(head, forward, row_grads)
    n = len(head.targets)
    results = forward.results
    e = _kept_exponentials(head, forward, needs)
    fit = len(e)
    spans = list(_spans(head.take(slice(fit))))
    n_sums = len(spans) + (fit < n)
    grads = _empty_gradients(head, needs, n_sums)
    for span in spans:
        assert forward.log_total is not None
        chunk = _Chunk(
            head=head.take(span),
            results=results.take(span),
            e=e[span],
            log_total=forward.log_total[span],
        )
        _add_gradients(chunk, row_grads.take(span), grads.at(span), accumulate=span.start > 0)
    if fit < n and any(needs):
        rest = slice(fit, n)
        _add_recomputed(
            head.take(rest),
            results.take(rest),
            row_grads.take(rest),
            grads.at(rest),
            accumulate=fit > 0,
        )
    return grads


# The bytes that a forward pass keeps


def _as_bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8).view(-1)


def _kept_exponentials(head: Head, forward: Forward, needs: Needs) -> Tensor:
    """Return E (K, V) of the first K rows. K is 0 if nothing is kept."""
    if forward.kept is None or not (needs.weight or needs.bias):
        return logprob.empty_e(head, 0)
    padded = forward.kept.view(torch.bfloat16)
    return padded.view(-1, logprob.width_of_e(head))[:, : len(head.weight)]


def _keeps_hidden_gradients(forward: Forward, needs: Needs) -> bool:
    return forward.kept is not None and needs == Needs(True, False, False)


def _scaled_hidden_gradients(head: Head, forward: Forward, row_grads: RowGrads) -> Gradients:
    assert forward.kept is not None and row_grads.logp is not None
    hidden_grads = forward.kept.view(torch.float32)
    d_hidden = hidden_grads.view(head.hidden.shape) * row_grads.logp.float()[:, None]
    return Gradients(d_hidden.to(head.hidden.dtype), None, None)


# Chunks of rows whose E is stored


@dataclass(frozen=True)
class _Chunk:
    """C rows between the forward and the backward pass."""

    head: Head
    results: LogProb  # (C,)
    e: Tensor  # (C, V)
    log_total: Tensor  # (C,)
    reusable: bool = False  # whether E may be overwritten

    def gathered(self, rows: Tensor) -> "_Chunk":
        """Return a chunk of some of the rows, with a copy of their E."""
        e = logprob.empty_e(self.head, len(rows))
        return _Chunk(
            head=self.head.take(rows),
            results=self.results.take(rows),
            e=torch.index_select(self.e, 0, rows, out=e),
            log_total=self.log_total[rows],
            reusable=True,
        )


def _stored_chunks(head: Head, results: LogProb) -> Iterator[tuple[slice, _Chunk]]:
    """Yield spans of rows with their chunks, and fill `results`. Chunks use the same buffer."""
    buffer = None
    for span in _spans(head):
        if buffer is None:
            buffer = logprob.empty_e(head, span.stop)
        e = buffer[: span.stop - span.start]
        log_total = _forward(head, span, results, e)
        chunk = _Chunk(
            head=head.take(span),
            results=results.take(span),
            e=e,
            log_total=log_total,
            reusable=True,
        )
        yield span, chunk


def _forward(
    head: Head,
    span: slice,
    results: LogProb,
    e: Tensor | None = None,
) -> Tensor:
    """Fill the results of a span and, if it is given, E. Return the span's log_total."""
    log_total = results.logp.new_empty(span.stop - span.start)
    logprob.forward(head.take(span), e, out=(results.take(span), log_total))
    return log_total


def _add_gradients(
    chunk: _Chunk, row_grads: RowGrads, grads: Gradients, accumulate: bool = False
) -> None:
    """Write the chunk's rows of the hidden gradient, and write or add to the other gradients."""
    active = _active_rows(row_grads, len(chunk.e))
    if active is not None:
        if len(active) < GATHER_BELOW * len(chunk.e):
            chunk = chunk.gathered(active)
            row_grads = row_grads.take(active)
        else:
            active = None
    head = chunk.head
    e = chunk.e
    factor = None  # (C, 1): dz is factor * e
    if row_grads.entropy is None and row_grads.lse is None:
        assert row_grads.logp is not None
        # logit_grads' c0 without an entropy or lse term
        c0 = (-chunk.log_total).exp() * row_grads.logp / -head.temperature
        factor = c0.float()[:, None]
    elif len(e):
        dz = e if chunk.reusable else logprob.empty_e(head, len(e))
        logprob.from_stored(head, e, chunk.log_total, chunk.results, row_grads, dz)
        e = dz
    if grads.hidden is not None:
        wide = _empty_like(head.hidden, torch.float32)
        matmul(e, head.weight, wide, narrow=True)
        if factor is not None:
            wide.mul_(factor)
        _write_rows(grads.hidden, active, wide)
    hidden = head.hidden
    if factor is not None:
        hidden = (factor * hidden).to(hidden.dtype)
    _add_to_weights(e, hidden, factor, grads, accumulate)


def _active_rows(row_grads: RowGrads, n: int) -> Tensor | None:
    """Return the rows with a non-zero derivative, or None if all rows should be computed."""
    return row_grads.active_rows() if n >= GATHER_FROM else None


def _add_to_weights(
    e: Tensor,  # (C, V)
    hidden: Tensor,  # (C, D), already multiplied by `factor` if there is one
    factor: Tensor | None,  # (C, 1): dz is factor * e; None: dz is e
    grads: Gradients,
    accumulate: bool,
) -> None:
    """Write, or add, the contribution of the rows to the weight and bias gradients."""
    if grads.weight is not None:
        narrow = grads.weight.dtype == torch.float32
        matmul(e.T, hidden, grads.weight, narrow=narrow, accumulate=accumulate)
    if grads.bias is not None:
        if factor is None:
            factor = torch.ones_like(e[:, :1])
        matmul(factor.T, e, grads.bias[None], narrow=True, accumulate=accumulate)


def _add_recomputed(
    head: Head, results: LogProb, row_grads: RowGrads, grads: Gradients, accumulate: bool
) -> None:
    """Do the same as `_add_gradients` for rows whose E is not stored, by slices of columns."""
    active = _active_rows(row_grads, len(head.targets))
    head = head.take(active)
    results = results.take(active)
    row_grads = row_grads.take(active)
    n = len(head.targets)
    v, d = head.weight.shape
    columns_that_fit = _rows_within(CHUNK_FRACTION, head) * v // max(1, n)
    width = max(128, min(MOST_COLUMNS, columns_that_fit, v) // 128 * 128)
    wide = head.hidden.new_zeros(n, d, dtype=torch.float32)
    buffer = head.hidden.new_empty(n, width)
    for first in range(0, v, width):
        columns = slice(first, min(first + width, v))
        dz = buffer[:, : columns.stop - first]
        if n:
            logprob.recomputed(head, results, row_grads, first, dz)
        if grads.hidden is not None:
            matmul(dz, head.weight[columns], wide, narrow=True, accumulate=True)
        part = Gradients(
            hidden=None,
            weight=None if grads.weight is None else grads.weight[columns],
            bias=None if grads.bias is None else grads.bias[columns],
        )
        _add_to_weights(dz, head.hidden, None, part, accumulate)
    if grads.hidden is not None:
        _write_rows(grads.hidden, active, wide)


def _write_rows(out: Tensor, indices: Tensor | None, rows: Tensor) -> None:
    """Write rows to `out`. With indices, write the rows there, and 0 to the other rows."""
    if indices is None:
        out.copy_(rows)
    else:
        out.zero_().index_copy_(0, indices, rows.to(out.dtype))


def _empty_gradients(head: Head, needs: Needs, n_sums: int) -> Gradients:
    """Return memory for the gradients. It is 0 if there is no row to write it.

    n_sums: number of products that the weight gradient is the sum of. For more than one it is fp32.
    """
    return Gradients.allocate(
        head,
        needs,
        hidden=head.hidden.dtype,
        weight=head.weight.dtype if n_sums == 1 else torch.float32,
        bias=torch.float32,
        zero=len(head.targets) == 0,
    )


def _spans(head: Head) -> Iterator[slice]:
    """Return spans of rows that fit CHUNK_FRACTION, of nearly equal sizes and complete tiles."""
    most_rows = max(1, min(MOST_ROWS, _rows_within(CHUNK_FRACTION, head)))
    tile_rows = logprob.config_for(head.hidden).BN
    return equal_spans(len(head.targets), most_rows, multiple=tile_rows)


def _rows_within(fraction: float, head: Head) -> int:
    """Return the number of rows of E that fit a fraction of the device's memory."""
    memory = INTERPRETED_BYTES
    if head.hidden.is_cuda:
        memory = torch.cuda.get_device_properties(head.hidden.device).total_memory
    return int(fraction * memory) // (2 * len(head.weight))
