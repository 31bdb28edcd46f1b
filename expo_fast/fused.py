"""The Triton backend: what of E (kernels/logprob.py) is kept, and the GEMMs between the kernels.

forward alone      1 GEMM, nothing of size (N, V)
one pass           3 GEMMs, over chunks of rows whose E shares one buffer
forward, backward  3 GEMMs for the rows whose E fits into a share of memory, 4 for the
                   others: their backward recomputes slices of the vocabulary
frozen head        2 GEMMs: each row's gradient per unit of slope is made with the forward
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from expo_fast.kernels import logprob as k
from expo_fast.kernels.head import (
    NOTHING,
    Forward,
    Gradients,
    Head,
    LogProb,
    Needs,
    Slopes,
    SlopesOf,
    logit_slopes,
)
from expo_fast.kernels.products import matmul

# Shares of the GPU's memory, and not of what is free of it: same input, same bits.
KEPT_SHARE = 0.125  # for the E that a forward leaves its backward
CHUNK_SHARE = 0.0625  # for E or dz that is done with at once
INTERPRETED_BYTES = 4 << 30  # of a CPU
# More rows a chunk: fewer passes over the fp32 weight gradient, and fuller waves of hidden's GEMM,
# which for 16384 rows of D 896 is 128 x 7 tiles on 132 SMs.
MOST_ROWS = 16384
MOST_COLUMNS = 32768  # of recomputed dz
FEW = 0.8  # share of live rows below which to gather their E costs less than to multiply all


def log_probs(head: Head, needs: Needs = NOTHING) -> Forward:
    """Keeps E of the rows that fit, or where the head is frozen dlogp/dhidden."""
    n, d = head.hidden.shape
    results = LogProb(*head.hidden.new_empty(3, n, dtype=torch.float64))
    if needs.weight or needs.bias:
        fit = _rows(KEPT_SHARE, head)
        rows = k.config_for(head.hidden).BN
        fit = n if fit >= n else fit // rows * rows
        e = k.room_for_e(head, fit)
        log_total = _forward(head, slice(0, fit), results, e[:, : len(head.weight)])
        _forward(head, slice(fit, n), results)
        return Forward(results, e, log_total)
    if not needs.hidden:
        _forward(head, slice(0, n), results)
        return Forward(results)
    unit, one = head.hidden.new_empty(n, d, dtype=torch.float32), torch.ones_like(results.logp)
    spans = list(_spans(head))
    room = k.room_for_e(head, spans[0].stop if spans else 0)
    for span in spans:
        e = room[: span.stop - span.start, : len(head.weight)]
        log_total = _forward(head, span, results, e)
        out = Gradients(unit[span], None, None)
        _add(head.take(span), e, log_total, results.take(span), Slopes(one[span]), out)
    return Forward(results, unit)


def log_probs_and_gradients(
    head: Head, slopes: SlopesOf, needs: Needs
) -> tuple[LogProb, Gradients]:
    """One pass: a row's slope is known as soon as its chunk's log-probs are."""
    n = len(head.targets)
    results = LogProb(*head.hidden.new_empty(3, n, dtype=torch.float64))
    spans = list(_spans(head))
    grads = _room(head, needs, several=len(spans) != 1)
    room = k.room_for_e(head, spans[0].stop if spans else 0)
    for span in spans:
        e = room[: span.stop - span.start, : len(head.weight)]
        log_total = _forward(head, span, results, e)
        rows, at = head.take(span), results.take(span)
        slope = slopes(span, at.logp.to(head.dtype))
        _add(rows, e, log_total, at, slope, grads.at(span), span.start > 0, spare=e)
    return results, grads


def gradients(head: Head, forward: Forward, slopes: Slopes, needs: Needs) -> Gradients:
    """From what `log_probs` kept; the logits of other rows are recomputed."""
    results, kept, log_total = forward
    if kept is not None and log_total is None and slopes.entropy is None and slopes.lse is None:
        assert slopes.logp is not None
        d_hidden = kept * slopes.logp.float()[:, None]
        return Gradients(d_hidden.to(head.hidden.dtype), None, None)
    n, fit = len(head.targets), 0 if log_total is None else len(log_total)
    spans = list(_spans(head.take(slice(fit))))
    grads = _room(head, needs, several=len(spans) + (fit < n) != 1)
    if kept is not None and log_total is not None:
        for span in spans:
            rows, at, slope = head.take(span), results.take(span), slopes.take(span)
            e = kept[span, : len(head.weight)]
            _add(rows, e, log_total[span], at, slope, grads.at(span), span.start > 0)
    rest = slice(fit, n)
    if fit < n and any(needs):
        rows, at, slope = head.take(rest), results.take(rest), slopes.take(rest)
        _add_recomputed(rows, at, slope, grads.at(rest), fit > 0)
    return grads


def _forward(head: Head, span: slice, results: LogProb, e: Tensor | None = None) -> Tensor:
    """Fills a span's results, and its E; returns its log_total."""
    if span.start == span.stop:
        return results.logp[:0]
    some, log_total = k.forward(head.take(span), e)
    for whole, part in zip(results, some, strict=True):
        whole[span] = part
    return log_total


def _add(
    head: Head,  # C rows
    e: Tensor,  # (C, V)
    log_total: Tensor,  # (C,)
    results: LogProb,
    slopes: Slopes,
    grads: Gradients,
    accumulate: bool = False,
    spare: Tensor | None = None,  # (C, V) to be overwritten; may be e
) -> None:
    live = slopes.live()
    if live is not None and len(live) >= FEW * len(e):
        live = None
    if live is not None:
        head, results, slopes = head.take(live), results.take(live), slopes.take(live)
        log_total, room = log_total[live], k.room_for_e(head, len(live))[:, : e.shape[1]]
        spare = e = torch.index_select(e, 0, live, out=room)
    factor = None
    if slopes.entropy is None and slopes.lse is None:
        factor = logit_slopes(results, slopes, head.temperature, log_total)[0].float()[:, None]
    elif len(e):
        dz = k.room_for_e(head, len(e))[:, : e.shape[1]] if spare is None else spare
        k.from_stored(head, e, log_total, results, slopes, dz)
        e = dz
    if grads.hidden is not None:
        wide = head.hidden.new_empty(head.hidden.shape, dtype=torch.float32)
        matmul(e, head.weight, wide, narrow=True)
        _write(grads.hidden, live, wide if factor is None else wide.mul_(factor))
    hidden = head.hidden if factor is None else (factor * head.hidden).to(head.hidden.dtype)
    _add_to_weights(e, hidden, factor, grads, accumulate)


def _add_to_weights(
    dz: Tensor, hidden: Tensor, factor: Tensor | None, grads: Gradients, accumulate: bool
) -> None:
    """dz.T @ hidden, and dz's sums over rows, of which each is to be multiplied by its factor."""
    if grads.weight is not None:
        narrow = grads.weight.dtype == torch.float32
        matmul(dz.T, hidden, grads.weight, narrow=narrow, accumulate=accumulate)
    if grads.bias is not None:
        factor = torch.ones_like(dz[:, :1]) if factor is None else factor
        matmul(factor.T, dz, grads.bias[None], narrow=True, accumulate=accumulate)


def _add_recomputed(
    head: Head, results: LogProb, slopes: Slopes, grads: Gradients, accumulate: bool
) -> None:
    live = slopes.live()
    if live is not None:
        head, results, slopes = head.take(live), results.take(live), slopes.take(live)
    n, (v, d) = len(head.targets), head.weight.shape
    fit = _rows(CHUNK_SHARE, head) * v // max(1, n)
    width = max(128, min(MOST_COLUMNS, fit, v) // 128 * 128)
    wide = head.hidden.new_zeros(n, d, dtype=torch.float32)
    room = head.hidden.new_empty(n, width)
    for first in range(0, v, width):
        columns = slice(first, min(first + width, v))
        dz = room[:, : columns.stop - first]
        if n:
            k.recomputed(head, results, slopes, first, dz)
        if grads.hidden is not None:
            matmul(dz, head.weight[columns], wide, narrow=True, accumulate=True)
        part = Gradients(None, *(g if g is None else g[columns] for g in grads[1:]))
        _add_to_weights(dz, head.hidden, None, part, accumulate)
    if grads.hidden is not None:
        _write(grads.hidden, live, wide)


def _write(out: Tensor, live: Tensor | None, rows: Tensor) -> None:
    if live is None:
        out.copy_(rows)
    else:
        out.zero_().index_copy_(0, live, rows.to(out.dtype))


def _room(head: Head, needs: Needs, *, several: bool) -> Gradients:
    """Zeros where there is no row; a weight gradient of several sums is fp32."""
    hidden, weight = head.hidden, head.weight
    dtype = torch.float32 if several else weight.dtype
    make = torch.empty if len(head.targets) else torch.zeros
    return Gradients(
        make(hidden.shape, dtype=hidden.dtype, device=hidden.device) if needs.hidden else None,
        make(weight.shape, dtype=dtype, device=weight.device) if needs.weight else None,
        make(len(weight), dtype=torch.float32, device=weight.device) if needs.bias else None,
    )


def _spans(head: Head) -> Iterator[slice]:
    """Of as many rows as there may be in a chunk, about equal, in whole tiles."""
    n = len(head.targets)
    count = -(-n // max(1, min(MOST_ROWS, _rows(CHUNK_SHARE, head))))
    size = -(-n // max(1, count))
    rows = k.config_for(head.hidden).BN
    size = size if count == 1 else -(-size // rows) * rows
    return (slice(start, min(start + size, n)) for start in range(0, n, max(1, size)))


def _rows(share: float, head: Head) -> int:
    """Of E, in that share of the device's memory."""
    memory = INTERPRETED_BYTES
    if head.hidden.is_cuda:
        memory = torch.cuda.get_device_properties(head.hidden.device).total_memory
    return int(share * memory) // (2 * len(head.weight))
