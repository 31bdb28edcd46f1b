"""Registration of the ops as torch custom operators: one graph node each, with a derivative.

Each op has a kernel, a backward, and a fake implementation that gives the shapes of its results
during tracing. ops.py checks shapes. Values are checked here, because tensors have no values during
tracing. Rows without a target or weight are dropped before any GEMM. Their results and gradients
are 0.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from expo_fast.kernels import preferences
from expo_fast.kernels.head import IGNORE, Forward, Gradients, Head, LogProb, Needs, RowGrads
from expo_fast.kernels.objectives import (
    N_STATISTICS,
    LossWithCachedTerms,
    PolicyLossOfRows,
    PolicyRows,
    is_sequence_level,
)
from expo_fast.op_backends.dispatch import (
    advantage_kernel,
    choose,
    has_one_pass,
    policy_sums_kernel,
)
from expo_fast.op_backends.function_transforms import check_transforms, is_batched
from expo_fast.op_backends.objective_codes import decode, holder_of
from expo_fast.op_backends.row_selection import (
    among_all_rows,
    head_of_rows,
    selected_head,
    take_optional_rows,
    take_rows,
)

# Selecting rows waits for the GPU, so torch.compile must not capture these ops in a CUDA graph.
SYNCS = (torch.Tag.cudagraph_unsafe,)


def _differentiable_once(backward: Callable) -> Callable:
    """Make a second derivative raise an error. Without this it would silently be 0."""

    def checked(ctx: Any, *upstream):
        check_transforms(*upstream)
        creates_graph = torch.is_grad_enabled()
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        if not creates_graph:
            return grads
        # The node that raises is reached from all that the gradients depend on.
        sources = [x for x in (*ctx.saved_tensors, *upstream) if x is not None and x.requires_grad]
        autograd: Any = torch._C._functions  # pyright: ignore[reportAttributeAccessIssue]
        n_inputs = 1 + len(sources)
        refuse = autograd.DelayedError(
            b"expo_fast's ops are differentiable once, not twice", n_inputs
        )
        return tuple(g if g is None else refuse(g, *sources)[0] for g in grads)

    return checked


# linear_logprob


@torch.library.custom_op("expo_fast::linear_logprob", mutates_args=(), tags=SYNCS)
def logprob(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    row_temperature: Tensor | None,  # (N,)
    scalar_temperature: float,  # used if `row_temperature` is None
    backend: str | None,
    complete: bool,
    needs: list[bool],  # the fields of Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return logp, entropy and lse (N,), and three tensors for the backward, if there is one.

    These are (K, 4) fp64 with logp, entropy, lse and log_total of the K selected rows; their (K,)
    indices, which are empty if all rows are selected; and `Forward.kept`, which is empty if nothing
    is kept. The backward needs no selection of its own, which would be a host sync on a GPU.
    """
    head, rows = selected_head(
        hidden=hidden,
        weight=weight,
        bias=bias,
        targets=targets,
        row_temperature=row_temperature,
        scalar_temperature=scalar_temperature,
        complete=complete,
    )
    kernels = choose(backend, head)
    results, log_total, kept = kernels.log_probs(head, Needs(*needs))
    if log_total is None:
        log_total = torch.zeros_like(results.logp)
    if kept is None:
        kept = hidden.new_empty(0, dtype=torch.uint8)
    exact = hidden.new_empty(0, 4, dtype=torch.float64)
    indices = targets.new_empty(0, dtype=torch.int64)
    if any(needs):
        exact = torch.stack([*results, log_total]).double().T.contiguous()
        if rows is not None:
            indices = rows
    n = len(targets)
    results = results.to(head.dtype)
    return (
        among_all_rows(results.logp, rows, n),
        among_all_rows(results.entropy, rows, n),
        among_all_rows(results.lse, rows, n),
        exact,
        indices,
        kept,
    )


@logprob.register_fake
def _(hidden, weight, bias, targets, *others):
    *_, complete, needs = others
    new_size = torch.library.get_ctx().new_dynamic_size
    scalar = _fake_scalar(hidden, weight)
    n_selected = n_indices = n_kept = 0
    if any(needs):
        n_selected = targets.shape[0] if complete else new_size()
        n_indices = 0 if complete else new_size()
        n_kept = new_size()
    return (
        scalar.new_empty(targets.shape),
        scalar.new_empty(targets.shape),
        scalar.new_empty(targets.shape),
        targets.new_empty(n_selected, 4, dtype=torch.float64),
        targets.new_empty(n_indices, dtype=torch.int64),
        hidden.new_empty(n_kept, dtype=torch.uint8),
    )


def _fake_scalar(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return an uninitialized tensor, (), with the dtype of the results."""
    targets = hidden.new_empty(0, dtype=torch.int64)
    dtype = Head(hidden, weight, None, targets, 1.0).dtype
    return hidden.new_empty((), dtype=dtype)


def _save_logprob(ctx: Any, inputs, output) -> None:
    hidden, weight, bias, targets, row_temperature, *options = inputs
    scalar_temperature, backend, _, needs = options
    _, _, _, exact, rows, kept = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, row_temperature, exact, rows, kept)
    ctx.scalar_temperature = scalar_temperature
    ctx.backend = backend
    ctx.needs = needs
    ctx.n_inputs = len(inputs)


@_differentiable_once
def _logprob_backward(ctx: Any, *upstream):
    d_logp, d_entropy, d_lse, *_ = upstream
    if d_logp is None and d_entropy is None and d_lse is None:
        return (None,) * ctx.n_inputs
    hidden, weight, bias, targets, row_temperature, exact, rows, kept = ctx.saved_tensors
    grads = logprob_backward(
        hidden=hidden,
        weight=weight,
        bias=bias,
        targets=targets,
        exact=exact,
        rows=rows,
        kept=kept,
        d_logp=d_logp,
        d_entropy=d_entropy,
        d_lse=d_lse,
        row_temperature=row_temperature,
        scalar_temperature=ctx.scalar_temperature,
        backend=ctx.backend,
        needs=ctx.needs,
    )
    return *_if_needed(grads, ctx.needs), *(None,) * (ctx.n_inputs - len(grads))


def _if_needed(grads: Sequence[Tensor], needs: list[bool]) -> list[Tensor | None]:
    return [g if needed else None for g, needed in zip(grads, needs, strict=True)]


logprob.register_autograd(_logprob_backward, setup_context=_save_logprob)


@torch.library.custom_op("expo_fast::linear_logprob_backward", mutates_args=(), tags=SYNCS)
def logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    exact: Tensor,  # (K, 4)
    rows: Tensor,  # (K,), or empty for all rows
    kept: Tensor,
    d_logp: Tensor | None,  # (N,)
    d_entropy: Tensor | None,
    d_lse: Tensor | None,
    row_temperature: Tensor | None,
    scalar_temperature: float,
    backend: str | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias in their dtypes, empty if not needed."""
    selection = None if len(exact) == len(targets) else rows
    head = head_of_rows(
        selection,
        hidden=hidden,
        weight=weight,
        bias=bias,
        targets=targets,
        row_temperature=row_temperature,
        scalar_temperature=scalar_temperature,
    )
    *results, log_total = exact.T
    forward = Forward(LogProb(*results), log_total, kept)
    row_grads = RowGrads(
        logp=take_optional_rows(d_logp, selection),
        entropy=take_optional_rows(d_entropy, selection),
        lse=take_optional_rows(d_lse, selection),
    )
    kernels = choose(backend, head)
    grads = kernels.gradients(head, forward, row_grads, Needs(*needs))
    d_hidden, d_weight, d_bias = _as_outputs(grads, selection, hidden)
    d_hidden = d_hidden.to(hidden.dtype)
    d_weight = d_weight.to(weight.dtype)
    if bias is not None:
        d_bias = d_bias.to(bias.dtype)
    return d_hidden, d_weight, d_bias


@logprob_backward.register_fake
def _(hidden, weight, bias, *others):
    outputs = []
    for x, needed in zip((hidden, weight, bias), others[-1], strict=True):
        shape = x.shape if x is not None and needed else (0,)
        outputs.append(hidden.new_empty(0) if x is None else x.new_empty(shape))
    return tuple(outputs)


def _as_outputs(
    grads: Gradients, rows: Tensor | None, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of all rows. A gradient that is not needed is an empty tensor."""
    d_hidden, d_weight, d_bias = grads
    if d_hidden is not None:
        d_hidden = among_all_rows(d_hidden, rows, len(hidden))
    return (
        hidden.new_empty(0) if d_hidden is None else d_hidden,
        hidden.new_empty(0) if d_weight is None else d_weight,
        hidden.new_empty(0) if d_bias is None else d_bias,
    )


# Losses: the forward pass computes their gradients too


@torch.library.custom_op("expo_fast::linear_policy_loss", mutates_args=(), tags=SYNCS)
def policy_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    objective: str,  # the name in an objective_codes.ObjectiveCode; `values` are its values
    values: list[float],
    targets: Tensor,  # (N,), as all tensors below
    advantage: Tensor,
    row_weight: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    on_policy: Tensor | None,
    sequence_ids: Tensor | None,
    kl_coef: float,
    entropy_coef: float,
    row_temperature: Tensor | None,
    scalar_temperature: float,  # used if `row_temperature` is None
    backend: str | None,
    complete: bool,
    needs: list[bool],  # whether the gradients of hidden and weight are needed
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss (), logp and entropy (N,), PolicyStatistics (N_STATISTICS,), and gradients.

    The gradients are of hidden and weight. The backward scales them in place and passes them to
    autograd, so a caller must not read them. `ops.linear_policy_loss` does not return them.
    """
    head, rows = selected_head(
        hidden=hidden,
        weight=weight,
        bias=None,
        targets=targets,
        row_temperature=row_temperature,
        scalar_temperature=scalar_temperature,
        wanted=None if complete else row_weight != 0,
        complete=complete,
    )
    chosen = decode(objective, values)
    sequences = None
    if is_sequence_level(chosen):
        sequences = _sequences(sequence_ids, targets, rows, name=type(chosen).__name__)
    if on_policy is None:
        on_policy = torch.zeros_like(head.targets, dtype=torch.bool)
    else:
        on_policy = take_rows(on_policy, rows).bool()
    known = PolicyRows(
        advantage=take_rows(advantage, rows).to(head.dtype),
        weight=take_rows(row_weight, rows).to(head.dtype),
        old_logp=take_optional_rows(old_logp, rows, head.dtype),
        ref_logp=take_optional_rows(ref_logp, rows, head.dtype),
        on_policy=on_policy,
        sequences=sequences,
    )
    loss = PolicyLossOfRows(chosen, known, kl_coef, entropy_coef)
    kernels = choose(backend, head)
    wanted = Needs(needs[0], needs[1], bias=False)
    if sequences is None and any(needs) and has_one_pass(kernels):
        cached = LossWithCachedTerms(loss)
        results, grads = kernels.log_probs_and_gradients(head, cached, wanted)
        results = results.to(head.dtype)
        terms = cached.terms(results.logp)
    else:
        forward = kernels.log_probs(head, wanted)
        results = forward.results.to(head.dtype)
        terms = loss.terms(results.logp)
        grads = kernels.gradients(head, forward, terms.grads, wanted)
    n = len(targets)
    sum_terms = policy_sums_kernel(terms.value)
    total, statistics = sum_terms(loss, terms, results.entropy)
    return (
        total,
        among_all_rows(results.logp, rows, n),
        among_all_rows(results.entropy, rows, n),
        statistics,
        *_unscaled_gradients(grads, rows, hidden, weight),
    )


@policy_loss.register_fake
def _(hidden, weight, objective, values, targets, *others):
    needs = others[-1]
    scalar = _fake_scalar(hidden, weight)
    return (
        scalar,
        scalar.new_empty(targets.shape),
        scalar.new_empty(targets.shape),
        scalar.new_empty(N_STATISTICS),
        *_fake_gradients(hidden, weight, needs),
    )


def _sequences(ids: Tensor | None, targets: Tensor, rows: Tensor | None, name: str) -> Tensor:
    """Return the sequences of the selected rows, numbered from 0.

    Raise ValueError if there are no ids, or if only part of a sequence's targets is selected.
    """
    if ids is None:
        raise ValueError(f"{name} needs sequence_ids, the sequence of each row")
    selected_ids = take_rows(ids, rows)
    if rows is not None:
        dropped = (targets != IGNORE).index_fill(0, rows, False)
        torn = ids[dropped & torch.isin(ids, selected_ids)]
        if len(torn):
            raise ValueError(
                f"sequence {int(torn[0])} has targets with and without row_weight:"
                f" {name} needs all targets of a sequence or none"
            )
    return selected_ids.unique(return_inverse=True)[1]


@torch.library.custom_op("expo_fast::linear_preference_loss", mutates_args=(), tags=SYNCS)
def preference_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    objective: str,  # the name in an objective_codes.ObjectiveCode; `values` are its values
    values: list[float],
    targets: Tensor,  # (N,)
    sequence_ids: Tensor,  # (N,)
    ref_logp: Tensor | None,  # (2P,)
    pair_weight: Tensor | None,  # (P,)
    row_temperature: Tensor | None,  # (N,)
    scalar_temperature: float,  # used if `row_temperature` is None
    backend: str | None,
    needs: list[bool],  # whether the gradients of hidden and weight are needed
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, summed log-probs of chosen and rejected (P,), margin, accuracy and gradients.

    The gradients are of hidden and weight. A caller must not read them, as in `policy_loss`.
    """
    head, rows = selected_head(
        hidden=hidden,
        weight=weight,
        bias=None,
        targets=targets,
        row_temperature=row_temperature,
        scalar_temperature=scalar_temperature,
    )
    n_pairs = preferences.count_pairs(sequence_ids, ref_logp, pair_weight)
    ids = take_rows(sequence_ids.long(), rows)
    preferences.check_pair_ids(ids, n_pairs)
    kernels = choose(backend, head)
    wanted = Needs(needs[0], needs[1], bias=False)
    forward = kernels.log_probs(head, wanted)
    logp = forward.results.logp.to(head.dtype)
    pairs = preferences.sum_pairs(logp, ids, n_pairs, ref_logp)
    value, *pair_grads = decode(objective, values)(pairs)
    share = 1 / max(1, n_pairs)
    w = torch.full_like(value, share) if pair_weight is None else pair_weight.to(value)
    weighted_grads = w * torch.stack(pair_grads)  # (2, P)
    sequence_grads = weighted_grads.T.reshape(-1)  # (2P,)
    row_grads = RowGrads(sequence_grads[ids])
    grads = kernels.gradients(head, forward, row_grads, wanted)
    h = pairs.log_ratio
    return (
        (w * value).sum(),
        pairs.chosen.clone(),
        pairs.rejected.clone(),
        h.sum() * share,
        (h > 0).to(h.dtype).sum() * share,
        *_unscaled_gradients(grads, rows, hidden, weight),
    )


@preference_loss.register_fake
def _(hidden, weight, objective, values, targets, ids, ref_logp, pair_weight, *others):
    needs = others[-1]
    if ref_logp is not None:
        n_pairs = ref_logp.shape[0] // 2
    elif pair_weight is not None:
        n_pairs = pair_weight.shape[0]
    else:
        n_pairs = torch.library.get_ctx().new_dynamic_size()
    scalar = _fake_scalar(hidden, weight)
    return (
        scalar,
        scalar.new_empty(n_pairs),
        scalar.new_empty(n_pairs),
        scalar.new_empty(()),
        scalar.new_empty(()),
        *_fake_gradients(hidden, weight, needs),
    )


def _unscaled_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of x's gradient before it is scaled, when it might overflow in fp16."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def _unscaled_gradients(
    grads: Gradients, rows: Tensor | None, hidden: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    d_hidden, d_weight, _ = _as_outputs(grads, rows, hidden)
    return d_hidden.to(_unscaled_dtype(hidden)), d_weight.to(_unscaled_dtype(weight))


def _fake_gradients(hidden: Tensor, weight: Tensor, needs: list[bool]) -> list[Tensor]:
    outputs = []
    for x, needed in zip((hidden, weight), needs, strict=True):
        shape = x.shape if needed else (0,)
        outputs.append(x.new_empty(shape, dtype=_unscaled_dtype(x)))
    return outputs


@torch.library.custom_op("expo_fast::scaled_gradient", mutates_args=())
def scaled_gradient(grad: Tensor, upstream: Tensor, of: Tensor) -> Tensor:
    """Return grad * upstream.

    of: the input whose gradient it is. It is not read. But the graph of a compiled backward then
        depends on it, so that a second derivative is refused. Without it, it would silently be 0.
    """
    return grad * upstream


@scaled_gradient.register_fake
def _(grad, upstream, of):
    return grad * upstream


class _Saved:
    """Placeholder for an input that is a tensor, which autograd saves."""


def _register_scaling_backward(op: Any) -> None:
    """Register a backward that scales the gradients returned by the op.

    The first inputs of the op are (hidden, weight, objective), and the last one is `needs`. Its
    last two outputs are the gradients of hidden and weight. The backward keeps no copy of them, to
    save memory of (V, D). A second backward computes them again.
    """

    def save(ctx: Any, inputs, output) -> None:
        hidden, weight, objective, *_, needs = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.inputs = [_Saved if isinstance(x, Tensor) else x for x in inputs]
        ctx.needs = needs
        ctx.custom_objective = holder_of(objective)  # keeps its code valid for a second backward
        ctx.grads = [g.detach() for g in output[-2:]]
        ctx.dtypes = [hidden.dtype, weight.dtype]

    @_differentiable_once
    def scale(ctx: Any, upstream: Tensor | None, *_):
        others = (None,) * (len(ctx.inputs) - 2)
        if upstream is None:
            return None, None, *others
        if ctx.grads is None:
            tensors = iter(ctx.saved_tensors)
            inputs = [next(tensors) if x is _Saved else x for x in ctx.inputs]
            ctx.grads = op(*inputs)[-2:]
        grads = ctx.grads
        ctx.grads = None
        if type(upstream) is not Tensor:  # tracing: it has no value, and the graph owns its outputs
            inputs = ctx.saved_tensors[:2]  # hidden and weight
            pairs = zip(grads, inputs, strict=True)
            grads = [scaled_gradient(g, upstream, x) for g, x in pairs]
        elif is_batched(upstream):  # several at once, which have no one value
            grads = [g * upstream for g in grads]
        elif upstream.is_cuda or float(upstream) != 1:  # reading it would be a host sync on a GPU
            grads = [g.mul_(upstream) for g in grads]
        grads = [g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
        return *_if_needed(grads, ctx.needs), *others

    op.register_autograd(scale, setup_context=save)


_register_scaling_backward(policy_loss)
_register_scaling_backward(preference_loss)


# Advantages have no gradient


@torch.library.custom_op("expo_fast::group_advantage", mutates_args=())
def group_advantage(rewards: Tensor, group_ids: Tensor, scale: str, eps: float) -> Tensor:
    """Return (M,) fp32. See ops.group_advantage."""
    compute = advantage_kernel(rewards)
    return compute(rewards, group_ids, scale, eps)


@group_advantage.register_fake
def _(rewards, group_ids, scale, eps):
    return rewards.new_empty(rewards.shape, dtype=torch.float32)
