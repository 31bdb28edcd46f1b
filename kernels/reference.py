"""Plain PyTorch: a linear head's log-prob, by definition and in sweeps that never hold (N, V).

    z = (hidden @ weight.T + bias) / temperature      y the target, u_j = z_j - z_y - shift
    other = sum_{j != y} exp(u_j)    moment = sum_{j != y} exp(u_j) u_j    own = exp(-shift)
    log_total = log1p(other + expm1(-shift))    logp = -shift - log_total    lse = z_y - logp
    H = log_total - (moment - own shift) / (own + other)
    dz_j = p_j (g_lse - g_logp - g_H (z_j - lse + H))    p_j = exp(z_j - lse)    for j != y
    dz_y = -g_logp expm1(logp) + p_y (g_lse - g_H (logp + H))

Anchored at the target (shift = 0) nothing cancels as p_y -> 1. A row whose largest logit exceeds
the target's by over SAFE_GAP is anchored at that logit instead: shift is the gap.
Chunk of C rows: two (C, V) buffers, 1 GEMM forward, 2 more for the gradients of hidden and weight.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE = -100  # target of a row that has none
SAFE_GAP = 60.0  # nats; V * exp(60) is far from fp32's exp(88) for any vocabulary
# Logits of a chunk. Each chunk reads and writes all of dW, whose GEMM ran at 380 GFLOP/s with
# 128 MiB and 230 with 64 (bf16, D 576, V 49152, 2 Zen 5 cores).
CHUNK_BYTES = 128 << 20


class LogProb(NamedTuple):
    """Per row, in nats; zero where there is no target."""

    logp: Tensor  # log-prob of the target
    entropy: Tensor  # of the whole distribution
    lse: Tensor  # log-sum-exp of the logits

    def take(self, rows: Tensor | slice) -> "LogProb":
        return LogProb(*(x[rows] for x in self))

    def to(self, dtype: torch.dtype) -> "LogProb":
        return LogProb(*(x.to(dtype) for x in self))


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


class Gradients(NamedTuple):
    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D) in the accumulators' dtype
    bias: Tensor | None  # (V,) in the accumulators' dtype

    def at(self, rows: slice) -> "Gradients":
        return self._replace(hidden=self.hidden if self.hidden is None else self.hidden[rows])


def log_probs(head: Head) -> LogProb:
    """Forward only."""
    return _sweep(head, True, None, NOTHING)[0]


def log_probs_and_gradients(
    head: Head,
    slopes: Callable[[slice, Tensor], Slopes],  # of (rows, their logp)
    needs: Needs,
) -> tuple[LogProb, Gradients]:
    """One pass, 3 GEMMs: for losses whose slope in a row depends on that row alone."""
    return _sweep(head, True, slopes, needs)


def gradients(head: Head, results: LogProb, slopes: Slopes, needs: Needs) -> Gradients:
    """From a forward's results: its logits are recomputed, its sums are not."""
    return of_live_rows(_gradients, head, results, slopes, needs)


def _gradients(head: Head, results: LogProb, slopes: Slopes, needs: Needs) -> Gradients:
    entropy = slopes.entropy is not None
    return _sweep(head, entropy, lambda rows, _: slopes.take(rows), needs, results)[1]


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


def _sweep(
    head: Head,
    entropy: bool,
    slopes: Callable[[slice, Tensor], Slopes] | None,
    needs: Needs,
    known: LogProb | None = None,
) -> tuple[LogProb, Gradients]:
    n, vocabulary = len(head.targets), head.weight.shape[0]
    results = known or LogProb(*(head.hidden.new_zeros(n, dtype=head.dtype) for _ in range(3)))
    grads = _zero_gradients(head, needs)
    spans = list(_chunks(n, vocabulary * head.dtype.itemsize))
    if not spans:
        return results, grads
    buffers = head.hidden.new_empty(2, spans[0].stop, vocabulary, dtype=head.dtype)
    # bf16 products on a CPU take operands already widened: once here, not once a chunk
    widen = head.dtype if head.hidden.device.type == "cpu" else head.weight.dtype
    operand = head.weight.to(widen if head.narrow else head.dtype).T  # (D, V)
    weight = head.weight if head.narrow else operand.T
    for span in spans:
        z, e = buffers[:, : span.stop - span.start]
        rows = head.take(span)
        _write_logits(rows, operand, z)
        if known:
            tile = _known_tile(rows, known.take(span), z, e)
        else:
            tile = _softmax_tile(rows, z, e, entropy)
            for result, chunk in zip(results, tile.results, strict=True):
                result[span] = chunk
        if slopes:
            tile_slopes = slopes(span, tile.results.logp)
            _add_gradients(rows, weight, tile, tile_slopes, grads.at(span))
    return results, grads


def _chunks(n: int, row_bytes: int) -> Iterator[slice]:
    """Equal chunks within CHUNK_BYTES: a ragged last one would waste its GEMMs."""
    count = -(-n // max(1, CHUNK_BYTES // row_bytes))
    size = -(-n // max(1, count))
    return (slice(start, min(start + size, n)) for start in range(0, n, max(1, size)))


def _zero_gradients(head: Head, needs: Needs) -> Gradients:
    hidden_dtype = torch.bfloat16 if head.narrow else head.dtype  # rows are written once
    wide = {"dtype": head.dtype, "device": head.hidden.device}
    return Gradients(
        torch.zeros_like(head.hidden, dtype=hidden_dtype) if needs.hidden else None,
        torch.zeros(head.weight.shape, **wide) if needs.weight else None,
        torch.zeros(head.weight.shape[0], **wide) if needs.bias else None,
    )


@dataclass(frozen=True)
class _Tile:
    """C rows between forward and backward, named as in the module's docstring."""

    results: LogProb  # (C,) each
    e: Tensor  # (C, V) exp(u_j), 0 at the target
    eu: Tensor  # (C, V) exp(u_j) u_j where entropy was asked for, else scratch
    log_total: Tensor  # (C,)


def _softmax_tile(head: Head, z: Tensor, e: Tensor, entropy: bool) -> _Tile:
    target = head.targets[:, None]
    anchor = z.gather(1, target)[:, 0]
    gap = z.amax(1) - anchor
    shift = torch.where(gap > SAFE_GAP, gap, 0)
    u = z.sub_((anchor + shift)[:, None])
    torch.exp(u, out=e).scatter_(1, target, 0)
    other, moment = e.sum(1), u.mul_(e).sum(1) if entropy else None
    results, log_total = from_sums(anchor, other, moment, shift)
    return _Tile(results, e, u, log_total)


def from_sums(
    anchor: Tensor,  # (N,) the target's logit over temperature
    other: Tensor,  # (N,)
    moment: Tensor | None,  # (N,); None: entropy is not asked for, and 0
    shift: Tensor,  # (N,)
) -> tuple[LogProb, Tensor]:  # and log_total
    own = (-shift).exp()
    log_total = torch.log1p(other + torch.expm1(-shift))
    logp, h = -shift - log_total, torch.zeros_like(log_total)
    if moment is not None:
        h = log_total - (moment - own * shift) / (own + other)
    return LogProb(logp, h, anchor - logp), log_total


def _known_tile(head: Head, results: LogProb, z: Tensor, e: Tensor) -> _Tile:
    """Anchored at lse, so that exp(u_j) is p_j."""
    u = z.sub_(results.lse[:, None])
    torch.exp(u, out=e).scatter_(1, head.targets[:, None], 0)
    return _Tile(results, e, u.mul_(e), torch.zeros_like(results.lse))


def _write_logits(head: Head, operand: Tensor, z: Tensor) -> None:
    _matmul(head.hidden, operand, z, narrow=head.narrow)
    if head.bias is not None:
        # a bias of -inf forbids a token: there exp(u) u must be 0, not 0 * inf
        z.add_(head.bias.clamp(min=-1e30))
    if isinstance(head.temperature, Tensor):
        z.div_(head.temperature[:, None])
    elif head.temperature != 1:
        z.div_(head.temperature)


def _add_gradients(
    head: Head, weight: Tensor, tile: _Tile, slopes: Slopes, grads: Gradients
) -> None:
    dz, spare, hidden = _logit_gradients(head, tile, slopes), tile.eu, head.hidden
    live = slopes.live()
    if live is not None:
        dz, spare = torch.index_select(dz, 0, live, out=spare[: len(live)]), dz
        hidden = hidden[live]
    if grads.hidden is not None:
        narrow_dz = _copy_into(spare, dz, grads.hidden.dtype) if head.narrow else dz
        d_hidden = grads.hidden.new_empty(hidden.shape)
        _matmul(narrow_dz, weight, d_hidden)
        grads.hidden[slice(None) if live is None else live] = d_hidden
    if grads.weight is not None:
        _matmul(dz.T, hidden, grads.weight, narrow=head.narrow, accumulate=True)
    if grads.bias is not None:
        grads.bias.add_(dz.sum(0))


def _logit_gradients(head: Head, tile: _Tile, slopes: Slopes) -> Tensor:  # (C, V), over tile.e
    c0, c1, at_target = logit_slopes(tile.results, slopes, head.temperature, tile.log_total)
    dz = tile.e.mul_(c0[:, None])
    if slopes.entropy is not None:
        dz.addcmul_(tile.eu, c1[:, None])
    return dz.scatter_(1, head.targets[:, None], at_target[:, None])


def logit_slopes(
    results: LogProb, slopes: Slopes, temperature: float | Tensor, log_total: Tensor | float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:  # (N,) each
    """(c0, c1, dz_y), with dz_j = exp(u_j) (c0 + c1 u_j) and u_j = z_j - lse + log_total.

    dz is the derivative in the logits before the temperature.
    """
    logp, entropy, _ = results
    zero = torch.zeros_like(logp)
    g_logp, g_entropy, g_lse = (zero if g is None else g for g in slopes)
    per_z = (zero + 1 / temperature).to(logp.dtype)  # a temperature in fp64 widens nothing else
    at_target = -g_logp * logp.expm1() + logp.exp() * (g_lse - g_entropy * (logp + entropy))
    c0 = g_lse - g_logp + g_entropy * (log_total - entropy)
    per_e = per_z * (zero - log_total).exp()
    return c0 * per_e, -g_entropy * per_e, at_target * per_z


def _copy_into(room: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` cast to a narrower dtype, in memory that is done with."""
    return room.view(dtype).view(-1)[: x.numel()].view(x.shape).copy_(x)


def widened(weight: Tensor) -> Tensor:
    """What `wide_product` takes as its second factor: on a CPU, oneDNN wants it in fp32."""
    return weight.float() if weight.dtype == torch.bfloat16 and not weight.is_cuda else weight


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a (N, D) @ b (D, V), b `widened`: products of bf16 factors summed and kept in fp32."""
    narrow = a.dtype == torch.bfloat16
    out = a.new_empty(len(a), b.shape[1], dtype=torch.promote_types(a.dtype, torch.float32))
    _matmul(a, b, out, narrow=narrow)
    return out


def _matmul(a: Tensor, b: Tensor, out: Tensor, *, narrow: bool = False, accumulate: bool = False):
    """out (+)= a @ b; `narrow` rounds the factors to bf16 and sums their products in fp32.

    Zen 5, (682, 576) @ (576, 49152): narrow 430 GFLOP/s, fp32 170, bf16 with bf16 results 620.
    """
    beta = 1 if accumulate else 0
    if not narrow:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)
    elif out.is_cuda:
        torch.addmm(out, a.bfloat16(), b.bfloat16(), out.dtype, beta=beta, out=out)
    else:
        with _bf16_products():
            torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


@contextmanager
def _bf16_products() -> Iterator[None]:
    """oneDNN multiplies fp32 matrices as bf16 inside, sums in fp32; process-wide, so kept short."""
    matmul: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def segment_sum(x: Tensor, segments: Tensor, n: int) -> Tensor:  # (N,), (N,) -> (n,)
    """Sums by segment in a fixed order: same input, same bits."""
    out = x.new_zeros(n)
    if x.is_cuda:  # index_add_ is atomic there, while an accumulating index_put_ sorts
        return out.index_put_((segments,), x, accumulate=True)
    return out.index_add_(0, segments, x)
