"""The ops as torch's dispatcher has them: whole under torch.compile, with fakes and gradients.

Rows that have no target or no weight are dropped before any product; their results and gradients
are 0. ops.py checks shapes; values are checked here, for while a program is traced there are none.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from expo_fast.kernels import objectives as o
from expo_fast.kernels import preferences as p
from expo_fast.kernels.head import IGNORE, Forward, Gradients, Head, LogProb, Needs, Slopes
from expo_fast.op_backends.dispatch import advantages, choose
from expo_fast.op_backends.objective_codes import objective_of


def _once(backward: Callable) -> Callable:
    """A derivative of what it returns raises, and is not silently 0."""

    def checked(ctx: Any, *upstream):
        again = torch.is_grad_enabled()  # create_graph=True
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        if not again:
            return grads
        autograd: Any = torch._C._functions  # pyright: ignore[reportAttributeAccessIssue]
        refuse = autograd.DelayedError(b"expo_fast's ops are differentiable once, not twice", 1)
        return tuple(g if g is None else refuse(g.requires_grad_()) for g in grads)

    return checked


# linear_logprob


@torch.library.custom_op("expo_fast::linear_logprob", mutates_args=())
def logprob(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    temperatures: Tensor | None,  # (N,)
    temperature: float,  # where there are none
    backend: str | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, lse), and for backward the same and log_total in fp64, and Forward.kept."""
    head, keep = _head(hidden, weight, bias, targets, temperatures, temperature)
    results, kept, log_total = choose(backend, head).log_probs(head, Needs(*needs))
    zero = torch.zeros_like(results.logp)
    if log_total is not None:
        zero[: len(log_total)] = log_total
    exact = torch.stack([*results, zero]).double()
    logp, entropy, lse = (_spread(x.to(head.dtype), keep, targets) for x in results)
    room = hidden.new_empty(0, dtype=_kept_dtype(needs)) if kept is None else kept.view(-1)
    return logp, entropy, lse, _spread(exact.T, keep, targets), room


def _kept_dtype(needs: list[bool]) -> torch.dtype:
    return torch.bfloat16 if any(needs[1:]) else torch.float32


@logprob.register_fake
def _(hidden, weight, bias, targets, temperatures, temperature, backend, needs):
    dtype = Head(hidden, weight, bias, targets, temperature).dtype
    results = (targets.new_empty(targets.shape, dtype=dtype) for _ in range(3))
    exact = targets.new_empty(*targets.shape, 4, dtype=torch.float64)
    keeps = any(needs) and (hidden.is_cuda or backend == "triton")
    size = torch.library.get_ctx().new_dynamic_size() if keeps else 0
    return *results, exact, hidden.new_empty(size, dtype=_kept_dtype(needs))


def _save_logprob(ctx: Any, inputs, output) -> None:
    *tensors, ctx.temperature, ctx.backend, ctx.needs = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[3:])


@_once
def _logprob_backward(ctx: Any, *upstream):
    nothing = (None,) * 8
    if all(g is None for g in upstream[:3]):
        return nothing
    given = ctx.temperature, ctx.backend, ctx.needs
    grads = logprob_backward(*ctx.saved_tensors, *upstream[:3], *given)
    wanted = (g if needed else None for g, needed in zip(grads, ctx.needs, strict=True))
    return *wanted, *nothing[3:]


logprob.register_autograd(_logprob_backward, setup_context=_save_logprob)


@torch.library.custom_op("expo_fast::linear_logprob_backward", mutates_args=())
def logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    exact: Tensor,  # (N, 4)
    kept: Tensor,
    d_logp: Tensor | None,  # (N,)
    d_entropy: Tensor | None,
    d_lse: Tensor | None,
    temperature: float,
    backend: str | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # empty where not needed
    head, keep = _head(hidden, weight, bias, targets, temperatures, temperature)
    *results, log_total = _take(exact, keep).T
    forward = Forward(LogProb(*results))
    if kept.numel() and any(needs[1:]):
        e = kept.view(-1, -(-len(weight) // 8) * 8)
        forward = Forward(LogProb(*results), e, log_total[: len(e)])
    elif kept.numel():
        forward = Forward(LogProb(*results), kept.view(-1, hidden.shape[1]))
    slopes = Slopes(*(_take(g, keep) for g in (d_logp, d_entropy, d_lse)))
    grads = choose(backend, head).gradients(head, forward, slopes, Needs(*needs))
    inputs = hidden, weight, bias
    d_hidden, d_weight, d_bias = (
        g if x is None else g.to(x.dtype)
        for g, x in zip(_whole(grads, keep, hidden), inputs, strict=True)
    )
    return d_hidden, d_weight, d_bias


@logprob_backward.register_fake
def _(hidden, weight, bias, *given):
    return tuple(
        hidden.new_empty(0) if x is None or not needed else x.new_empty(x.shape)
        for x, needed in zip((hidden, weight, bias), given[-1], strict=True)
    )


def _whole(grads: Gradients, keep: Tensor | None, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dropped rows included; empty where there are none."""
    if grads.hidden is not None:
        grads = grads._replace(hidden=_spread(grads.hidden, keep, hidden))
    d_hidden, d_weight, d_bias = (hidden.new_empty(0) if g is None else g for g in grads)
    return d_hidden, d_weight, d_bias


def _before_scaling(x: Tensor) -> torch.dtype:
    """Of a gradient that waits for its upstream factor: fp16 could not hold it yet."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


# losses, whose gradients come with them


@torch.library.custom_op("expo_fast::linear_policy_loss", mutates_args=())
def policy_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,), like all that follow
    advantage: Tensor,
    row_weight: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    on_policy: Tensor | None,
    sequence_ids: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    backend: str | None,
    needs: list[bool],
    objective: str,
    fields: list[float],
    kl_coef: float,
    entropy_coef: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss; logp and entropy (N,); statistics (8,); gradients of hidden and weight."""
    given = targets, temperatures, temperature
    head, keep = _head(hidden, weight, None, *given, wanted=row_weight != 0)

    def kept(x: Tensor | None) -> Any:
        return x if x is None else _take(x, keep).to(head.dtype)

    on = torch.zeros_like(head.targets) if on_policy is None else kept(on_policy)
    floats = map(kept, (advantage, row_weight, old_logp, ref_logp))
    known = o.PolicyRows(*floats, on_policy=on.bool(), segments=None)
    chosen = objective_of(objective, fields)
    if isinstance(chosen, o.SequenceClipped):
        known = replace(known, segments=_whole_sequences(sequence_ids, targets, keep))

    def terms(known: o.PolicyRows, logp: Tensor) -> o.PolicyTerms:
        return o.policy_terms(chosen, known, logp, kl_coef, entropy_coef)

    def slopes(known: o.PolicyRows, logp: Tensor) -> Slopes:
        row = terms(known, logp)
        return Slopes(row.slope_logp, row.slope_entropy)

    kernels, wanted = choose(backend, head), Needs(needs[0], needs[1], False)
    if known.segments is None and any(needs):
        results, grads = kernels.log_probs_and_gradients(
            head, lambda span, logp: slopes(known.take(span), logp), wanted
        )
        results = results.to(head.dtype)
    else:
        forward = kernels.log_probs(head, wanted)
        results = forward.results.to(head.dtype)
        grads = kernels.gradients(head, forward, slopes(known, results.logp), wanted)
    final = terms(known, results.logp)
    loss = final.value + kl_coef * final.k3 if kl_coef else final.value
    if entropy_coef:
        loss = loss - entropy_coef * torch.where(known.on_policy, 0, results.entropy)
    logp, entropy = (_spread(x, keep, targets) for x in results[:2])
    statistics = torch.stack(o.policy_statistics(known, final, results.entropy))
    d_hidden, d_weight, _ = _whole(grads, keep, hidden)
    gradients = d_hidden.to(_before_scaling(hidden)), d_weight.to(_before_scaling(weight))
    return (known.weight * loss).sum(), logp, entropy, statistics, *gradients


@policy_loss.register_fake
def _(hidden, weight, targets, *given):
    x = hidden.new_empty((), dtype=Head(hidden, weight, None, targets, 1.0).dtype)
    rows = x.new_empty(targets.shape), x.new_empty(targets.shape)
    return x, *rows, x.new_empty(8), *_fake_gradients(hidden, weight, given[9])


def _whole_sequences(ids: Tensor | None, targets: Tensor, keep: Tensor | None) -> Tensor:
    """The kept rows' sequences numbered from 0; a sequence is kept whole or not at all."""
    if ids is None:
        raise ValueError("SequenceClipped needs sequence_ids, the sequence of each row")
    kept_ids = _take(ids, keep)
    if keep is not None:
        dropped = (targets != IGNORE).index_fill(0, keep, False)
        torn = ids[dropped & torch.isin(ids, kept_ids)]
        if len(torn):
            raise ValueError(
                f"sequence {int(torn[0])} has targets with and without row_weight:"
                " SequenceClipped needs whole sequences"
            )
    return kept_ids.unique(return_inverse=True)[1]


@torch.library.custom_op("expo_fast::linear_preference_loss", mutates_args=())
def preference_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    sequence_ids: Tensor,  # (N,)
    ref_logp: Tensor | None,  # (2P,)
    pair_weight: Tensor | None,  # (P,)
    temperatures: Tensor | None,  # (N,)
    temperature: float,
    backend: str | None,
    needs: list[bool],
    objective: str,
    fields: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss; summed log-probs of chosen and rejected (P,); margin; accuracy; gradients."""
    head, keep = _head(hidden, weight, None, targets, temperatures, temperature)
    n_pairs = p.count_pairs(sequence_ids, ref_logp, pair_weight)
    ids = _take(sequence_ids.long(), keep)
    p.check_pair_ids(ids, n_pairs)
    kernels, wanted = choose(backend, head), Needs(needs[0], needs[1], False)
    forward = kernels.log_probs(head, wanted)
    pairs = p.sum_pairs(forward.results.logp.to(head.dtype), ids, n_pairs, ref_logp)
    value, *slopes = objective_of(objective, fields)(pairs)
    share = 1 / max(1, n_pairs)
    w = torch.full_like(value, share) if pair_weight is None else pair_weight.to(value)
    slope = (w * torch.stack(slopes)).T.reshape(-1)  # (2P,)
    grads = kernels.gradients(head, forward, Slopes(slope[ids]), wanted)
    h = pairs.log_ratio
    summed = (w * value).sum(), pairs.chosen.clone(), pairs.rejected.clone()
    d_hidden, d_weight, _ = _whole(grads, keep, hidden)
    gradients = d_hidden.to(_before_scaling(hidden)), d_weight.to(_before_scaling(weight))
    return *summed, h.sum() * share, (h > 0).to(h.dtype).sum() * share, *gradients


@preference_loss.register_fake
def _(hidden, weight, targets, sequence_ids, ref_logp, pair_weight, *given):
    if ref_logp is not None:
        n_pairs = ref_logp.shape[0] // 2
    elif pair_weight is not None:
        n_pairs = pair_weight.shape[0]
    else:
        n_pairs = torch.library.get_ctx().new_dynamic_size()
    x = hidden.new_empty(0, dtype=Head(hidden, weight, None, targets, 1.0).dtype)
    pairs = x.new_empty(n_pairs), x.new_empty(n_pairs)
    numbers = x.new_empty(()), x.new_empty(())
    return x.new_empty(()), *pairs, *numbers, *_fake_gradients(hidden, weight, given[3])


def _fake_gradients(hidden: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    d_hidden, d_weight = (
        x.new_empty(x.shape if needed else (0,), dtype=_before_scaling(x))
        for x, needed in zip((hidden, weight), needs, strict=True)
    )
    return d_hidden, d_weight


def _comes_with_gradients(op: Any) -> None:
    """Backward of an op whose last outputs are the gradients of its first inputs: to scale them.

    They are given away, for (V, D) is not to be held twice; a second backward makes them again.
    """

    def save(ctx: Any, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]
        ctx.needs = next(x for x in inputs if isinstance(x, list))
        ctx.grads, ctx.dtypes = [g.detach() for g in output[-2:]], [x.dtype for x in inputs[:2]]

    @_once
    def scale(ctx: Any, upstream: Tensor | None, *_):
        nothing = (None,) * len(ctx.others)
        if upstream is None:
            return nothing
        if ctx.grads is None:
            tensors = iter(ctx.saved_tensors)
            ctx.grads = op(*(next(tensors) if x is None else x[0] for x in ctx.others))[-2:]
        grads, ctx.grads = ctx.grads, None
        if type(upstream) is not Tensor:  # traced: it has no value, and a graph owns its outputs
            grads = [g * upstream for g in grads]
        elif upstream.is_cuda or float(upstream) != 1:  # to look at it would stall a GPU
            grads = [g.mul_(upstream) for g in grads]
        wanted = zip(grads, ctx.dtypes, ctx.needs, strict=True)
        return *(g.to(dtype) if needed else None for g, dtype, needed in wanted), *nothing[2:]

    op.register_autograd(scale, setup_context=save)


_comes_with_gradients(policy_loss)
_comes_with_gradients(preference_loss)


# advantages, which have no gradient


@torch.library.custom_op("expo_fast::group_advantage", mutates_args=())
def group_advantage(rewards: Tensor, group_ids: Tensor, scale: str, eps: float) -> Tensor:
    if rewards.isinf().any():
        raise ValueError(f"rewards[{int(rewards.isinf().nonzero()[0])}] is infinite")
    return advantages(rewards)(rewards, group_ids, scale, eps)


@group_advantage.register_fake
def _(rewards, group_ids, scale, eps):
    return rewards.new_empty(rewards.shape, dtype=torch.float32)


# rows


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    wanted: Tensor | None = None,  # (N,) bool
) -> tuple[Head, Tensor | None]:
    """The head of the rows that count, and their indices; None: all of them."""
    _check_targets(targets, len(weight))
    has_target = targets != IGNORE
    mask = has_target if wanted is None else has_target & wanted
    keep = mask.nonzero()[:, 0]
    keep = None if len(keep) == len(mask) else keep
    t: float | Tensor = temperature
    if temperatures is not None:
        dtype = torch.promote_types(temperatures.dtype, torch.float32)
        t = per_row = _take(temperatures, keep).to(dtype)
        wrong = per_row[~((per_row > 0) & per_row.isfinite())]
        if len(wrong):
            raise ValueError(f"temperature holds {float(wrong[0])}: must be positive and finite")
    y = _take(targets, keep).long().contiguous()
    return Head(_take(hidden, keep), weight, bias, y, t), keep


def _check_targets(y: Tensor, vocabulary: int) -> None:
    wrong = (y != IGNORE) & ((y < 0) | (y >= vocabulary))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets[{row}] is {int(y[row])}: must lie in [0, {vocabulary}), or be {IGNORE}"
        )


def _take(x: Any, keep: Tensor | None) -> Any:
    return x[keep] if isinstance(x, Tensor) and keep is not None else x


def _spread(x: Tensor, keep: Tensor | None, like: Tensor) -> Tensor:  # (len(like), ...), 0 dropped
    """A tensor of its own and contiguous, as an op's outputs must be, and their fakes are."""
    if keep is None:
        own = x._base is None and x.is_contiguous()
        return x if own else x.clone(memory_format=torch.contiguous_format)
    return x.new_zeros(len(like), *x.shape[1:]).index_copy_(0, keep, x)
