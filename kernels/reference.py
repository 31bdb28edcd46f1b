"""PyTorch backend: a linear head's log-probs by definition, and in chunks without (N, V) tensors.

The formulas are those of head.py. If the largest logit of a row exceeds the target's logit by more
than SAFE_GAP, it is the row's anchor, and `shift` is the difference. A chunk of C rows takes two
(C, V) buffers, 1 GEMM for the forward pass, and 2 GEMMs for the gradients of hidden and weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from expo_fast.kernels.head import (
    Forward,
    Gradients,
    Head,
    LogProb,
    Needs,
    RowGrads,
    RowwiseLoss,
    from_sums,
    logit_grads,
    logit_grads_about_lse,
)
from expo_fast.kernels.integers import equal_spans
from expo_fast.kernels.products import bf16_in, matmul

SAFE_GAP = 14.0  # nats; above it, rounding of u affects the entropy, and at 88 exp(u) overflows
# Bytes of a chunk's logits. Each chunk reads and writes all of dW. The GEMM of dW ran at 380
# GFLOP/s with 128 MiB and at 230 GFLOP/s with 64 MiB (bf16, D 576, V 49152, 2 Zen 5 cores).
CHUNK_BYTES = 128 << 20
CUDA_CHUNK_BYTES = 2 << 30  # 3533 rows of 151936 in fp32, 13 GEMM tiles per SM on an H200


def linear_logprob(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,) int64 in [0, V)
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # scalar or (N,)
) -> LogProb:
    """Return the (N,) results by definition: compute all logits, cast them to fp32, then softmax.

    Backends are compared with this function. Results are fp32, or fp64 if the logits are fp64.
    """
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logits = logits + bias
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None]
    logits = logits / temperature
    logp = logits.log_softmax(-1)
    return LogProb(
        logp=logp.gather(1, targets[:, None])[:, 0],
        entropy=-(logp.exp() * logp).sum(-1),
        lse=logits.logsumexp(-1),
    )


@dataclass(frozen=True)
class Tile:
    """A chunk of C rows between its forward and its backward pass, with the names of head.py."""

    results: LogProb  # (C,) fp64 each
    e: Tensor  # (C, V) exp(u_j), 0 at the target
    eu: Tensor  # (C, V) exp(u_j) u_j
    log_total: Tensor | None  # (C,) fp64; None: u is relative to lse, so that exp(u_j) is p_j

    @classmethod
    def softmax(cls, head: Head, z: Tensor, buffer: Tensor) -> "Tile":
        """Return the tile of logits z (C, V). It takes z and the buffer (C, V) as its memory."""
        target = head.targets[:, None]
        anchor = z.gather(1, target)
        top = z.amax(1, keepdim=True)
        base = torch.where(top - anchor > SAFE_GAP, top, anchor)
        u = z.sub_(base)
        e = torch.exp(u, out=buffer).scatter_(1, target, 0)
        other = e.sum(1)
        eu = u.mul_(e)
        moment = eu.sum(1)
        shift = (base.double() - anchor)[:, 0]
        results, log_total = from_sums(
            base[:, 0].double(),
            other.double(),
            moment.double(),
            shift,
        )
        return cls(results, e, eu, log_total)

    @classmethod
    def known(cls, head: Head, results: LogProb, z: Tensor, buffer: Tensor) -> "Tile":
        """Return the tile of logits that a backward pass recomputed, given their results."""
        u = z.sub_(results.lse.to(z.dtype)[:, None])
        e = torch.exp(u, out=buffer).scatter_(1, head.targets[:, None], 0)
        return cls(results, e, u.mul_(e), None)

    def logit_gradients(self, head: Head, row_grads: RowGrads) -> tuple[Tensor, Tensor]:
        """Return dz (C, V) and a free buffer of the same size. The tile is overwritten."""
        dtype = self.e.dtype
        if self.log_total is None:
            _, coefficients = logit_grads_about_lse(
                self.results, row_grads, head.temperature, dtype=dtype
            )
        else:
            coefficients = logit_grads(self.results, row_grads, head.temperature, self.log_total)
        c0, c1, at_target = (x.to(dtype) for x in coefficients)
        dz = self.e.mul_(c0[:, None])
        if row_grads.entropy is not None:
            dz.addcmul_(self.eu, c1[:, None])
        return dz.scatter_(1, head.targets[:, None], at_target[:, None]), self.eu


class Chunked:
    """A backend (dispatch.OnePassKernels) that processes rows in chunks.

    tile: the class that computes softmax and gradients of a chunk's logits.
    """

    def __init__(self, tile: type[Tile]):
        self.tile = tile

    def log_probs(self, head: Head, needs: Needs) -> Forward:
        """Return the results from 1 GEMM. Nothing is kept for the backward pass."""
        parts = [chunk.tile.results for chunk in self._chunks(head)]
        return Forward(_concatenated(parts, head))

    def log_probs_and_gradients(
        self, head: Head, loss: RowwiseLoss, needs: Needs
    ) -> tuple[LogProb, Gradients]:
        """Return results and gradients from one pass of 3 GEMMs."""
        grads = _zero_gradients(head, needs)
        parts = []
        for chunk in self._chunks(head):
            parts.append(chunk.tile.results)
            logp = chunk.tile.results.logp.to(head.dtype)
            row_grads = loss.row_grads(chunk.rows, logp)
            _add_gradients(chunk, row_grads, grads.at(chunk.rows))
        return _concatenated(parts, head), grads

    def gradients(
        self, head: Head, forward: Forward, row_grads: RowGrads, needs: Needs
    ) -> Gradients:
        """Return gradients from the forward results. Logits are recomputed, but not their sums."""
        if not any(needs):
            return Gradients(None, None, None)
        n = len(head.targets)
        active = row_grads.active_rows()
        head, row_grads = head.take(active), row_grads.take(active)
        grads = _zero_gradients(head, needs)
        for chunk in self._chunks(head, known=forward.results.take(active)):
            _add_gradients(chunk, row_grads.take(chunk.rows), grads.at(chunk.rows))
        return grads.with_all_rows(active, n)

    def _chunks(self, head: Head, known: LogProb | None = None) -> Iterator["_Chunk"]:
        """Yield the chunks in order. `known`: forward results, if logits are recomputed.

        All chunks have the same buffers, so the next chunk overwrites the previous one.
        """
        v = len(head.weight)
        # Chunks have equal sizes, because small GEMMs are slow.
        chunk_bytes = CUDA_CHUNK_BYTES if head.hidden.is_cuda else CHUNK_BYTES
        most_rows = max(1, chunk_bytes // (v * head.dtype.itemsize))
        spans = list(equal_spans(len(head.targets), most_rows))
        if not spans:
            return
        buffers = head.hidden.new_empty(2, spans[0].stop, v, dtype=head.dtype)
        # bf16 products on a CPU need widened factors. They are widened once, not once per chunk.
        on_cpu = head.hidden.device.type == "cpu"
        weight_dtype = head.weight.dtype if head.narrow and not on_cpu else head.dtype
        factor = head.weight.to(weight_dtype)
        for rows in spans:
            part = head.take(rows)
            z = buffers[0, : rows.stop - rows.start]
            buffer = buffers[1, : rows.stop - rows.start]
            _write_logits(part, factor.T, z)
            if known is None:
                tile = self.tile.softmax(part, z, buffer)
            else:
                tile = self.tile.known(part, known.take(rows), z, buffer)
            yield _Chunk(rows, part, head.weight if head.narrow else factor, tile)


@dataclass(frozen=True)
class _Chunk:
    """C rows of a head, with the inputs of their gradients."""

    rows: slice  # rows of the complete head
    head: Head
    weight: Tensor  # (V, D), the factor of d_hidden's GEMM
    tile: Tile


def _concatenated(parts: list[LogProb], head: Head) -> LogProb:
    if not parts:
        return LogProb(*head.hidden.new_zeros(3, 0, dtype=torch.float64))
    return LogProb.concatenate(parts)


def _zero_gradients(head: Head, needs: Needs) -> Gradients:
    hidden_dtype = torch.bfloat16 if head.narrow else head.dtype  # rows are written once
    return Gradients.allocate(
        head, needs, hidden=hidden_dtype, weight=head.dtype, bias=head.dtype, zero=True
    )


def _write_logits(
    head: Head,
    weight: Tensor,  # (D, V)
    z: Tensor,  # (N, V) out
) -> None:
    matmul(head.hidden, weight, z, narrow=head.narrow)
    if head.bias is not None:
        # A bias of -inf forbids a token. Its exp(u) u must be 0, not 0 * inf.
        least = max(-1e30, torch.finfo(head.bias.dtype).min)
        z.add_(head.bias.clamp(min=least))
    if isinstance(head.temperature, Tensor):
        z.div_(head.temperature[:, None])
    elif head.temperature != 1:
        z.div_(head.temperature)


def _add_gradients(chunk: _Chunk, row_grads: RowGrads, grads: Gradients) -> None:
    """Write a chunk's rows of the hidden gradient, and add to the weight and bias gradients.

    The chunk's tile is overwritten.
    """
    head = chunk.head
    dz, spare = chunk.tile.logit_gradients(head, row_grads)
    hidden = head.hidden
    active = row_grads.active_rows()
    if active is not None:
        gathered = torch.index_select(dz, 0, active, out=spare[: len(active)])
        dz, spare = gathered, dz
        hidden = hidden[active]
    if grads.hidden is not None:
        narrow_dz = dz
        if dz.dtype != grads.hidden.dtype:
            narrow_dz = bf16_in(spare, dz.shape).copy_(dz)
        d_hidden = grads.hidden.new_empty(hidden.shape)
        matmul(narrow_dz, chunk.weight, d_hidden)
        grads.hidden[slice(None) if active is None else active] = d_hidden
    if grads.weight is not None:
        matmul(dz.T, hidden, grads.weight, narrow=head.narrow, accumulate=True)
    if grads.bias is not None:
        grads.bias.add_(dz.sum(0, dtype=grads.bias.dtype))


PLAIN = Chunked(Tile)
