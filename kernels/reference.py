"""Plain PyTorch: a linear head's log-prob, by definition and in sweeps that never hold (N, V).

The formulas are head.py's. A row whose largest logit exceeds the target's by over SAFE_GAP is
anchored at that logit instead: shift is the gap.
Chunk of C rows: two (C, V) buffers, 1 GEMM forward, 2 more for the gradients of hidden and weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from expo_fast.kernels.head import (
    NOTHING,
    Forward,
    Gradients,
    Head,
    LogProb,
    Needs,
    Slopes,
    SlopesOf,
    from_sums,
    logit_slopes,
    of_live_rows,
    slopes_about_lse,
)
from expo_fast.kernels.products import bf16_in, matmul

SAFE_GAP = 14.0  # nats; beyond, rounding u shows in the entropy, and at 88 exp(u) overflows
# Logits of a chunk. Each chunk reads and writes all of dW, whose GEMM ran at 380 GFLOP/s with
# 128 MiB and 230 with 64 (bf16, D 576, V 49152, 2 Zen 5 cores).
CHUNK_BYTES = 128 << 20
CUDA_CHUNK_BYTES = 2 << 30  # 3533 rows of 151936 in fp32, 13 GEMM tiles an SM on an H200


def linear_logprob(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,) int64 in [0, V)
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # scalar or (N,)
) -> LogProb:  # (N,) each, fp32 unless the logits are fp64
    """The definition, and the yardstick: all logits at once, upcast to fp32, softmax in fp32."""
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits if bias is None else logits + bias
    logits = logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return LogProb(logp.gather(1, targets[:, None])[:, 0], entropy, logits.logsumexp(-1))


class Chunked:
    """A backend (backends.Kernels) that multiplies chunk by chunk and then works row by row."""

    def __init__(self, tile: type["Tile"]):
        self.tile = tile

    def log_probs(self, head: Head, needs: Needs) -> Forward:
        """Forward only: 1 GEMM, and nothing kept."""
        return Forward(self._sweep(head, None, NOTHING)[0])

    def log_probs_and_gradients(
        self, head: Head, slopes: SlopesOf, needs: Needs
    ) -> tuple[LogProb, Gradients]:
        """One pass, 3 GEMMs: for losses whose slope in a row depends on that row alone."""
        return self._sweep(head, slopes, needs)

    def gradients(self, head: Head, forward: Forward, slopes: Slopes, needs: Needs) -> Gradients:
        """From a forward's results: its logits are recomputed, its sums are not."""
        return of_live_rows(self._gradients, head, forward.results, slopes, needs)

    def _gradients(self, head: Head, results: LogProb, slopes: Slopes, needs: Needs) -> Gradients:
        return self._sweep(head, lambda rows, _: slopes.take(rows), needs, results)[1]

    def _sweep(
        self,
        head: Head,
        slopes: SlopesOf | None,
        needs: Needs,
        known: LogProb | None = None,
    ) -> tuple[LogProb, Gradients]:
        n, vocabulary = len(head.targets), head.weight.shape[0]
        grads, parts = _zero_gradients(head, needs), list[LogProb]()
        spans = list(_chunks(n, vocabulary * head.dtype.itemsize, head.hidden.is_cuda))
        if not spans:
            return LogProb(*head.hidden.new_zeros(3, 0, dtype=torch.float64)), grads
        buffers = head.hidden.new_empty(2, spans[0].stop, vocabulary, dtype=head.dtype)
        # bf16 products on a CPU take operands already widened: once here, not once a chunk
        widen = head.dtype if head.hidden.device.type == "cpu" else head.weight.dtype
        operand = head.weight.to(widen if head.narrow else head.dtype).T  # (D, V)
        weight = head.weight if head.narrow else operand.T
        for span in spans:
            z, spare = (x[: span.stop - span.start] for x in (buffers[0], buffers[1]))
            rows = head.take(span)
            _write_logits(rows, operand, z)
            if known:
                tile = self.tile.known(rows, known.take(span), z, spare)
            else:
                tile = self.tile.softmax(rows, z, spare)
            parts.append(tile.results)
            if slopes:
                slope = slopes(span, tile.results.logp.to(head.dtype))
                _add_gradients(rows, weight, tile, slope, grads.at(span))
        return LogProb(*map(torch.cat, zip(*parts, strict=True))), grads


def _chunks(n: int, row_bytes: int, cuda: bool) -> Iterator[slice]:
    """Equal chunks within CHUNK_BYTES: a ragged last one would waste its GEMMs."""
    count = -(-n // max(1, (CUDA_CHUNK_BYTES if cuda else CHUNK_BYTES) // row_bytes))
    size = -(-n // max(1, count))
    return (slice(start, min(start + size, n)) for start in range(0, n, max(1, size)))


def _zero_gradients(head: Head, needs: Needs) -> Gradients:
    zeros = partial(torch.zeros, device=head.hidden.device)
    hidden_dtype = torch.bfloat16 if head.narrow else head.dtype  # rows are written once
    return Gradients(
        zeros(head.hidden.shape, dtype=hidden_dtype) if needs.hidden else None,
        zeros(head.weight.shape, dtype=head.dtype) if needs.weight else None,
        zeros(head.weight.shape[0], dtype=head.dtype) if needs.bias else None,
    )


@dataclass(frozen=True)
class Tile:
    """C rows between forward and backward, named as in head.py."""

    results: LogProb  # (C,) fp64 each
    e: Tensor  # (C, V) exp(u_j), 0 at the target
    eu: Tensor  # (C, V) exp(u_j) u_j
    log_total: Tensor | None  # (C,) fp64; None: anchored at lse, so that exp(u_j) is p_j

    @classmethod
    def softmax(cls, head: Head, z: Tensor, e: Tensor) -> "Tile":
        target, anchor = head.targets[:, None], z.gather(1, head.targets[:, None])
        top = z.amax(1, keepdim=True)
        base = torch.where(top - anchor > SAFE_GAP, top, anchor)
        u = z.sub_(base)
        torch.exp(u, out=e).scatter_(1, target, 0)
        sums = base[:, 0], e.sum(1), u.mul_(e).sum(1), (base.double() - anchor)[:, 0]
        results, log_total = from_sums(*(x.double() for x in sums))
        return cls(results, e, u, log_total)

    @classmethod
    def known(cls, head: Head, results: LogProb, z: Tensor, e: Tensor) -> "Tile":
        u = z.sub_(results.lse.to(z.dtype)[:, None])
        torch.exp(u, out=e).scatter_(1, head.targets[:, None], 0)
        return cls(results, e, u.mul_(e), None)

    def logit_gradients(self, head: Head, slopes: Slopes) -> tuple[Tensor, Tensor]:
        """(C, V) of them, and as much memory that is free now; the tile is used up."""
        given, dtype = (self.results, slopes, head.temperature), self.e.dtype
        if self.log_total is None:
            _, c0, c1, at_target = slopes_about_lse(*given, dtype=dtype)
        else:
            c0, c1, at_target = (x.to(dtype) for x in logit_slopes(*given, self.log_total))
        dz = self.e.mul_(c0[:, None])
        if slopes.entropy is not None:
            dz.addcmul_(self.eu, c1[:, None])
        return dz.scatter_(1, head.targets[:, None], at_target[:, None]), self.eu


def _write_logits(head: Head, operand: Tensor, z: Tensor) -> None:
    matmul(head.hidden, operand, z, narrow=head.narrow)
    if head.bias is not None:
        # a bias of -inf forbids a token: there exp(u) u must be 0, not 0 * inf
        z.add_(head.bias.clamp(min=-1e30))
    if isinstance(head.temperature, Tensor):
        z.div_(head.temperature[:, None])
    elif head.temperature != 1:
        z.div_(head.temperature)


def _add_gradients(
    head: Head, weight: Tensor, tile: Tile, slopes: Slopes, grads: Gradients
) -> None:
    (dz, spare), hidden = tile.logit_gradients(head, slopes), head.hidden
    live = slopes.live()
    if live is not None:
        dz, spare = torch.index_select(dz, 0, live, out=spare[: len(live)]), dz
        hidden = hidden[live]
    if grads.hidden is not None:
        narrow_dz = dz if dz.dtype == grads.hidden.dtype else bf16_in(spare, dz.shape).copy_(dz)
        d_hidden = grads.hidden.new_empty(hidden.shape)
        matmul(narrow_dz, weight, d_hidden)
        grads.hidden[slice(None) if live is None else live] = d_hidden
    if grads.weight is not None:
        matmul(dz.T, hidden, grads.weight, narrow=head.narrow, accumulate=True)
    if grads.bias is not None:
        grads.bias.add_(dz.sum(0, dtype=grads.bias.dtype))


PLAIN = Chunked(Tile)
