"""From hidden states to log-probs and losses without (N, V) logits: the front door to the kernels.

    linear_logprob          log-prob, entropy and log-sum-exp of each target
    linear_policy_loss      GRPO and its relatives, in one pass where rows are independent
    linear_preference_loss  DPO and its relatives, over pairs of packed sequences
    group_advantage         rewards -> advantages

Hidden states of rows without a target or weight are never read. Whatever the inputs' dtype,
logits, results and the weight gradient's sums are fp32 (fp64 where an input is fp64); each gradient
comes back in its input's dtype. On a CPU they run C++, compiled on first use (native.py).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expo_fast.backends import Kernels, choose
from expo_fast.kernels import advantage, preferences
from expo_fast.kernels import head as r
from expo_fast.kernels import objectives as o
from expo_fast.kernels.head import IGNORE, LogProb
from expo_fast.kernels.objectives import Cispo, Clipped, SequenceClipped, SoftAdaptive
from expo_fast.kernels.preferences import Cpo, Dpo, DpoPositive, Hinge, Ipo, Orpo, RDpo, SimPo

__all__ = [
    "IGNORE",
    "Cispo",
    "Clipped",
    "Cpo",
    "Dpo",
    "DpoPositive",
    "Hinge",
    "Ipo",
    "LogProb",
    "Orpo",
    "PolicyLoss",
    "PreferenceLoss",
    "RDpo",
    "SequenceClipped",
    "SimPo",
    "SoftAdaptive",
    "group_advantage",
    "linear_logprob",
    "linear_policy_loss",
    "linear_preference_loss",
]


def linear_logprob(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...) int32 or int64 in [0, V), or -100: no target
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # scalar, or one a row in targets' shape
    backend: str | None = None,  # None picks; "torch" | "native"
) -> LogProb:  # logp, entropy, lse: targets' shape, nats, 0 where there is no target
    """Log-prob of each target under softmax((hidden @ weight.T + bias) / temperature).

    Differentiable in hidden, weight and bias through all three results; backward recomputes the
    logits chunk by chunk. Relative accuracy of logp holds as the probability goes to 1.
    Raises ValueError for shapes that do not fit, a target outside [0, V), and a backend not built.
    """
    head, keep = _head(hidden, weight, targets, temperature, bias)
    k = choose(backend, head)
    needs = _needs(head.hidden, weight, bias)
    results = _LinearLogprob.apply(
        head.hidden, weight, bias, head.targets, head.temperature, k, needs
    )
    return LogProb(*(_spread(x, keep, targets) for x in results))


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, temperature, kernels, needs):
        ctx.set_materialize_grads(False)
        head = r.Head(hidden, weight, bias, targets, temperature)
        results, kept = kernels.log_probs(head, needs)
        per_row = temperature if isinstance(temperature, Tensor) else None
        ctx.save_for_backward(hidden, weight, bias, targets, per_row, *results, *kept)
        ctx.temperature, ctx.kernels = None if per_row is not None else temperature, kernels
        return tuple(x.to(head.dtype, copy=True) for x in results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes):
        if all(g is None for g in slopes):
            return (None,) * 7
        hidden, weight, bias, targets, per_row, *saved = ctx.saved_tensors
        forward = r.Forward(r.LogProb(*saved[:3]), tuple(saved[3:]))
        head = r.Head(
            hidden, weight, bias, targets, ctx.temperature if per_row is None else per_row
        )
        needs = r.Needs(*ctx.needs_input_grad[:3])
        grads = ctx.kernels.gradients(head, forward, r.Slopes(*slopes), needs)
        d_hidden, d_weight, d_bias = (
            g if g is None else g.to(x.dtype)
            for g, x in zip(grads, (hidden, weight, bias), strict=True)
        )
        return d_hidden, d_weight, d_bias, None, None, None, None


class PolicyLoss(NamedTuple):
    """`loss` supports backward(); the rest is detached. 0-dim fp32 unless shaped.

    Policy rows are those with a target and a weight that are not on policy; a mean over none is 0.
    """

    loss: Tensor
    logp: Tensor  # (N,) nats, 0 for dropped rows
    entropy: Tensor  # (N,) nats, 0 for dropped rows
    policy_loss: Tensor  # sum of row_weight * objective over policy rows
    on_policy_loss: Tensor  # sum of row_weight * -advantage * logp over on-policy rows
    kl: Tensor  # k3, mean over policy rows weighted by row_weight, nats; 0 without ref_logp
    mean_entropy: Tensor  # mean over policy rows weighted by row_weight, nats
    clip_low: Tensor  # share of policy rows whose ratio was clipped from below
    clip_high: Tensor  # ... from above, by Clipped's or Cispo's cap too
    ratio_mean: Tensor  # mean over policy rows
    ratio_max: Tensor  # over policy rows


def linear_policy_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,) int32 or int64 in [0, V), or -100: no target
    advantage: Tensor,  # (N,)
    row_weight: Tensor,  # (N,) carries every normalisation; a row of weight 0 is dropped
    *,
    objective: o.PolicyObjective = Clipped(0.2, 0.2),  # noqa: B008 (frozen)
    old_logp: Tensor | None = None,  # (N,) nats, of the policy that sampled; None: every ratio is 1
    ref_logp: Tensor | None = None,  # (N,) nats
    on_policy: Tensor | None = None,  # (N,) bool: rows that contribute -advantage * logp alone
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    temperature: float | Tensor = 1.0,  # scalar or (N,); old_logp and ref_logp are at the same
    sequence_ids: Tensor | None = None,  # (N,) int, for SequenceClipped
    backend: str | None = None,  # as in linear_logprob
) -> PolicyLoss:
    """sum_t row_weight_t * (objective_t + kl_coef * k3_t - entropy_coef * H_t).

    k3 = exp(x) - x - 1, x = ref_logp - logp (http://joschu.net/blog/kl-approx.html). Gradients come
    with the loss: 3 GEMM equivalents, or 4 on a CPU, which keeps no logits, and where
    SequenceClipped couples rows: its ratio is that of the sequence's rows of non-zero weight,
    on-policy rows left out, so only whole sequences may be dropped. Ratios stop growing at exp(20).
    Raises ValueError for shapes that do not fit, a target outside [0, V), a kl_coef without
    ref_logp, and SequenceClipped without whole sequences.
    """
    _check_same_shape(targets, advantage=advantage, row_weight=row_weight, old_logp=old_logp)
    _check_same_shape(targets, ref_logp=ref_logp, on_policy=on_policy, sequence_ids=sequence_ids)
    if kl_coef and ref_logp is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logp, the reference's log-probs")
    head, keep = _head(hidden, weight, targets, temperature, wanted=row_weight != 0)
    known = _policy_rows(head, keep, advantage, row_weight, old_logp, ref_logp, on_policy=on_policy)
    if isinstance(objective, SequenceClipped):
        known = replace(known, segments=_whole_sequences(sequence_ids, targets, keep))

    def terms(known: o.PolicyRows, logp: Tensor) -> o.PolicyTerms:
        return o.policy_terms(objective, known, logp, kl_coef, entropy_coef)

    kernels, needs = choose(backend, head), _needs(hidden, weight)
    results, grads = _policy_sweep(kernels, head, known, terms, needs)
    final = terms(known, results.logp)
    loss = final.value + kl_coef * final.k3
    if entropy_coef:
        loss = loss - entropy_coef * torch.where(known.on_policy, 0, results.entropy)
    loss = _StoredGradient.apply(head.hidden, weight, (known.weight * loss).sum(), *grads[:2])
    logp, entropy = (_spread(x, keep, targets) for x in results[:2])
    return PolicyLoss(loss, logp, entropy, *o.policy_statistics(known, final, results.entropy))


@torch.no_grad()
def _policy_sweep(
    kernels: Kernels,
    head: r.Head,
    known: o.PolicyRows,
    terms: Callable[[o.PolicyRows, Tensor], o.PolicyTerms],
    needs: r.Needs,
) -> tuple[LogProb, r.Gradients]:
    def slopes(known: o.PolicyRows, logp: Tensor) -> r.Slopes:
        row = terms(known, logp)
        return r.Slopes(row.slope_logp, row.slope_entropy)

    if known.segments is None and any(needs):
        results, grads = kernels.log_probs_and_gradients(
            head, lambda span, logp: slopes(known.take(span), logp), needs
        )
        return results.to(head.dtype), grads
    forward = kernels.log_probs(head, needs)
    results = forward.results.to(head.dtype)
    return results, kernels.gradients(head, forward, slopes(known, results.logp), needs)


def _policy_rows(
    head: r.Head,
    keep: Tensor | None,
    *floats: Tensor | None,  # advantage, row_weight, old_logp, ref_logp
    on_policy: Tensor | None,
) -> o.PolicyRows:
    def kept(x: Tensor | None) -> Any:
        return x if x is None else _take(x.detach().reshape(-1), keep).to(head.dtype)

    on = torch.zeros_like(head.targets) if on_policy is None else kept(on_policy)
    return o.PolicyRows(*map(kept, floats), on_policy=on.bool(), segments=None)


def _whole_sequences(ids: Tensor | None, targets: Tensor, keep: Tensor | None) -> Tensor:
    """The kept rows' sequences numbered from 0; a sequence is kept whole or not at all."""
    if ids is None:
        raise ValueError("SequenceClipped needs sequence_ids, the sequence of each row")
    ids = ids.reshape(-1)
    kept_ids = _take(ids, keep)
    if keep is not None:
        dropped = (targets.reshape(-1) != IGNORE).index_fill(0, keep, False)
        torn = ids[dropped & torch.isin(ids, kept_ids)]
        if len(torn):
            raise ValueError(
                f"sequence {int(torn[0])} has targets with and without row_weight:"
                " SequenceClipped needs whole sequences"
            )
    return kept_ids.unique(return_inverse=True)[1]


class _StoredGradient(torch.autograd.Function):
    """A loss whose gradients were computed beside it: backward only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, loss, d_hidden, d_weight):
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream):
        d_hidden, d_weight = ctx.saved_tensors
        dtype, weight_dtype = ctx.dtypes
        if d_hidden is not None:
            d_hidden = (upstream * d_hidden).to(dtype)
        # (V, D) is not copied for a factor of 1; to look at the factor would stall a GPU
        if d_weight is not None and (upstream.is_cuda or float(upstream) != 1):
            d_weight = upstream * d_weight
        d_weight = d_weight if d_weight is None else d_weight.to(weight_dtype)
        return d_hidden, d_weight, None, None, None


class PreferenceLoss(NamedTuple):
    """`loss` supports backward(); the rest is detached."""

    loss: Tensor  # 0-dim fp32
    chosen_logp: Tensor  # (P,) summed over targets, nats
    rejected_logp: Tensor  # (P,)
    margin: Tensor  # 0-dim, mean over pairs of the log-ratio h, nats; beta is not in it
    accuracy: Tensor  # 0-dim, share of pairs with h > 0


def linear_preference_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,) int32 or int64 in [0, V), or -100: no target
    sequence_ids: Tensor,  # (N,) int in [0, 2P): pair p's chosen is 2p, its rejected 2p + 1
    *,
    objective: preferences.PreferenceObjective = Dpo(beta=0.1),  # noqa: B008 (frozen)
    ref_logp: Tensor | None = None,  # (2P,) summed, nats; None: a uniform reference, 0
    pair_weight: Tensor | None = None,  # (P,); None: 1/P
    temperature: float | Tensor = 1.0,  # scalar or (N,)
    backend: str | None = None,  # as in linear_logprob
) -> PreferenceLoss:
    """sum_p pair_weight_p * objective_p, differentiable once; rows in any order.

    h = (chosen - its ref) - (rejected - its ref). P is half of ref_logp's length, or pair_weight's,
    or follows from the largest id. 4 GEMM equivalents. Raises ValueError for shapes that do not
    fit, a target outside [0, V) and an id outside [0, 2P).
    """
    _check_same_shape(targets, sequence_ids=sequence_ids)
    head, keep = _head(hidden, weight, targets, temperature)
    n_pairs = preferences.count_pairs(sequence_ids, ref_logp, pair_weight)
    ids = _take(sequence_ids.reshape(-1).long(), keep)
    preferences.check_pair_ids(ids, n_pairs)
    kernels, needs = choose(backend, head), _needs(hidden, weight)
    with torch.no_grad():
        forward = kernels.log_probs(head, needs)
        pairs = preferences.sum_pairs(forward.results.logp.to(head.dtype), ids, n_pairs, ref_logp)
        value, *slopes = objective(pairs)
        share = 1 / max(1, n_pairs)
        w = torch.full_like(value, share) if pair_weight is None else pair_weight.to(value)
        slope = (w * torch.stack(slopes)).T.reshape(-1)  # (2P,)
        grads = kernels.gradients(head, forward, r.Slopes(slope[ids]), needs)
        total, h = (w * value).sum(), pairs.log_ratio
    loss = _StoredGradient.apply(head.hidden, weight, total, *grads[:2])
    margin, accuracy = h.sum() * share, (h > 0).sum() * share
    return PreferenceLoss(loss, pairs.chosen, pairs.rejected, margin, accuracy)


def group_advantage(
    rewards: Tensor,  # (M,)
    group_ids: Tensor,  # (M,) int, in any order
    *,
    scale: str = "group",
    eps: float = 1e-4,  # added to the standard deviation, TRL's value
) -> Tensor:  # (M,) fp32
    """Reward minus its group's mean, over a standard deviation (unbiased, n - 1) plus eps.

    `scale` is whose: "group" (GRPO, arXiv:2402.03300), "batch" (all rewards, Lite-PPO,
    arXiv:2508.08221) or "none" (Dr.GRPO, arXiv:2503.20783). A NaN reward is left out of its group
    and gets 0. So does a group of one, and a group whose rewards differ by float noise alone.
    Raises ValueError for an unknown scale, shapes that do not fit and an infinite reward.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale={scale!r}: must be 'group', 'batch' or 'none'")
    _check_same_shape(rewards, group_ids=group_ids)
    if rewards.isinf().any():
        raise ValueError(f"rewards[{int(rewards.isinf().nonzero()[0])}] is infinite")
    return advantage.group_advantage(rewards.detach(), group_ids, scale, eps)


def _head(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...)
    temperature: float | Tensor,
    bias: Tensor | None = None,  # (V,)
    wanted: Tensor | None = None,  # (...) bool, None: all
) -> tuple[r.Head, Tensor | None]:
    """The rows that have a target and are wanted, and their indices: None where that is all."""
    _check_head(hidden, weight, targets, temperature, bias)
    has_target = targets != IGNORE
    mask = (has_target if wanted is None else has_target & wanted).reshape(-1)
    keep = mask.nonzero()[:, 0]
    keep = None if len(keep) == len(mask) else keep
    if isinstance(temperature, Tensor):
        t = _take(temperature.detach().reshape(-1), keep)
        t = temperature = t.to(torch.promote_types(t.dtype, torch.float32))
        if not t.is_cuda and not (t > 0).all():
            raise ValueError(f"temperature holds {float(t.min())}: must be positive")
    rows, y = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    return r.Head(_take(rows, keep), weight, bias, _take(y, keep), temperature), keep


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    bias: Tensor | None,
) -> None:
    if weight.ndim != 2 or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, weight {tuple(weight.shape)}:"
            " they must be (..., D) and (V, D)"
        )
    if targets.shape != hidden.shape[:-1] or targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"targets is {targets.dtype} of shape {tuple(targets.shape)},"
            f" hidden needs int32 or int64 of shape {tuple(hidden.shape[:-1])}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, weight needs ({len(weight)},)")
    _check_targets(targets.reshape(-1), len(weight))
    if isinstance(temperature, Tensor):
        _check_same_shape(targets, temperature=temperature)
    elif not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: must be positive and finite")


def _check_targets(y: Tensor, vocabulary: int) -> None:
    if y.is_cuda:  # a look at the values would stall the GPU; there an index assertion fires
        return
    wrong = (y != IGNORE) & ((y < 0) | (y >= vocabulary))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets[{row}] is {int(y[row])}: must lie in [0, {vocabulary}), or be {IGNORE}"
        )


def _check_same_shape(like: Tensor, **given: Tensor | None) -> None:
    for name, x in given.items():
        if x is not None and x.shape != like.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, needs {tuple(like.shape)}")


def _needs(*inputs: Tensor | None) -> r.Needs:  # hidden, weight, bias
    on = torch.is_grad_enabled()
    return r.Needs(*(on and x is not None and x.requires_grad for x in (*inputs, None)[:3]))


def _take(x: Any, keep: Tensor | None) -> Any:
    return x[keep] if isinstance(x, Tensor) and keep is not None else x


def _spread(x: Tensor, keep: Tensor | None, like: Tensor) -> Tensor:  # like's shape, 0 if dropped
    if keep is not None:
        x = x.new_zeros(like.numel()).index_put((keep,), x)
    return x.view(like.shape)
