"""From hidden states to log-probs and losses without (N, V) logits: the front door to the kernels.

    linear_logprob          log-prob, entropy and log-sum-exp of each target
    linear_policy_loss      GRPO and its relatives, in one pass where rows are independent
    linear_preference_loss  DPO and its relatives, over pairs of packed sequences
    group_advantage         rewards -> advantages

Hidden states of rows without a target or weight are never read. Whatever the inputs' dtype,
logits, results and the weight gradient's sums are fp32 (fp64 where an input is fp64); each gradient
comes back in its input's dtype, to be differentiated no further. On a CPU they run C++, compiled on
first use (native.py), on a GPU Triton (fused.py). Under autocast hidden states and weights are cast
as a linear layer's are. torch.compile keeps each op whole (custom_ops.py).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from expo_fast.kernels import objectives as o
from expo_fast.kernels import preferences as p
from expo_fast.kernels.head import IGNORE, LogProb
from expo_fast.kernels.objectives import Cispo, Clipped, SequenceClipped, SoftAdaptive
from expo_fast.kernels.preferences import Cpo, Dpo, DpoPositive, Hinge, Ipo, Orpo, RDpo, SimPo
from expo_fast.op_backends import custom_ops
from expo_fast.op_backends.objective_codes import described

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
    backend: str | None = None,  # None picks; "torch" | "native" | "triton"
) -> LogProb:  # logp, entropy, lse: targets' shape, nats, 0 where there is no target
    """Log-prob of each target under softmax((hidden @ weight.T + bias) / temperature).

    Differentiable in hidden, weight and bias through all three results. Forward is one GEMM; a
    backward two more and, for rows whose exponentials were not kept, one to recompute their logits:
    in C++ all, in Triton those beyond a share of the GPU's memory. Relative accuracy of logp holds
    as the probability goes to 1.
    Raises ValueError for shapes that do not fit, a target outside [0, V), and a backend not built.
    """
    _check_head(hidden, weight, targets, temperature, bias)
    (hidden, weight, bias), needs = _inputs(hidden, weight, bias)
    rows, d = hidden.reshape(-1, hidden.shape[-1]), targets.shape
    given = targets.reshape(-1), *_temperatures(temperature), backend, needs
    logp, entropy, lse, *_ = custom_ops.logprob(rows, weight, bias, *given)
    return LogProb(logp.view(d), entropy.view(d), lse.view(d))


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
    with the loss: 3 GEMM equivalents, or 4 in C++, which keeps no logits, and where SequenceClipped
    couples rows that do not fit into a GPU's budget. Its ratio is that of the sequence's rows of
    non-zero weight, on-policy rows left out, so only whole sequences may be dropped. Ratios stop
    growing at exp(20).
    Raises ValueError for shapes that do not fit, a target outside [0, V), a kl_coef without
    ref_logp, and SequenceClipped without whole sequences.
    """
    _check_head(hidden, weight, targets, temperature)
    _check_same_shape(targets, advantage=advantage, row_weight=row_weight, old_logp=old_logp)
    _check_same_shape(targets, ref_logp=ref_logp, on_policy=on_policy, sequence_ids=sequence_ids)
    if kl_coef and ref_logp is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logp, the reference's log-probs")
    (hidden, weight), needs = _inputs(hidden, weight)
    floats = (_flat(x) for x in (targets, advantage, row_weight, old_logp, ref_logp, on_policy))
    loss, logp, entropy, statistics, *_ = custom_ops.policy_loss(
        hidden.reshape(-1, hidden.shape[-1]), weight, *floats, _flat(sequence_ids),
        *_temperatures(temperature), backend, needs,
        *described(objective), kl_coef, entropy_coef,
    )  # fmt: skip
    logp, entropy = logp.detach().view(targets.shape), entropy.detach().view(targets.shape)
    return PolicyLoss(loss, logp, entropy, *statistics.detach().unbind())


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
    objective: p.PreferenceObjective = Dpo(beta=0.1),  # noqa: B008 (frozen)
    ref_logp: Tensor | None = None,  # (2P,) summed, nats; None: a uniform reference, 0
    pair_weight: Tensor | None = None,  # (P,); None: 1/P
    temperature: float | Tensor = 1.0,  # scalar or (N,)
    backend: str | None = None,  # as in linear_logprob
) -> PreferenceLoss:
    """sum_p pair_weight_p * objective_p, differentiable once; rows in any order.

    h = (chosen - its ref) - (rejected - its ref). P is half of ref_logp's length, or pair_weight's,
    or follows from the largest id. 3 to 4 GEMM equivalents, as in linear_logprob. Raises ValueError
    for shapes that do not fit, a target outside [0, V) and an id outside [0, 2P).
    """
    _check_head(hidden, weight, targets, temperature)
    _check_same_shape(targets, sequence_ids=sequence_ids)
    (hidden, weight), needs = _inputs(hidden, weight)
    loss, *rest = custom_ops.preference_loss(
        hidden.reshape(-1, hidden.shape[-1]), weight, _flat(targets), _flat(sequence_ids),
        _detached(ref_logp), _detached(pair_weight), *_temperatures(temperature), backend, needs,
        *described(objective),
    )  # fmt: skip
    return PreferenceLoss(loss, *(x.detach() for x in rest[:4]))


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
    return custom_ops.group_advantage(rewards.detach(), group_ids, scale, eps)


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    bias: Tensor | None = None,
) -> None:
    for name, x in (("hidden", hidden), ("weight", weight)):
        if not isinstance(x, Tensor):
            raise ValueError(
                f"{name} is a {type(x).__name__}: must be a tensor, such as its weight"
            )
        if hasattr(x, "full_tensor"):
            raise ValueError(
                f"{name} is a DTensor, a share of a tensor: gather it with"
                f" {name}.full_tensor(grad_placements=[Partial()]), whose gradient is the sum of"
                " what the ranks' rows give (Replicate() where all ranks have the same rows)"
            )
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
    for name, x in (("weight", weight), ("targets", targets), ("bias", bias)):
        if x is not None and x.device != hidden.device:
            raise ValueError(
                f"{name} is on {x.device}, hidden on {hidden.device}: move one of them"
            )
    if isinstance(temperature, Tensor):
        _check_same_shape(targets, temperature=temperature)
    elif not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: must be positive and finite")


def _check_same_shape(like: Tensor, **given: Tensor | None) -> None:
    for name, x in given.items():
        if x is None:
            continue
        if x.shape != like.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, needs {tuple(like.shape)}")
        if x.device != like.device:
            raise ValueError(f"{name} is on {x.device}: must be on {like.device}")


def _inputs(*inputs: Tensor | None) -> tuple[list, list[bool]]:
    """Cast as autocast has it, and which of them need a gradient."""
    assert inputs[0] is not None
    device = inputs[0].device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        inputs = tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in inputs)
    on = torch.is_grad_enabled()
    return list(inputs), [on and x is not None and x.requires_grad for x in inputs]


def _temperatures(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    if isinstance(temperature, Tensor):
        return temperature.detach().reshape(-1), 1.0
    return None, float(temperature)


def _flat(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.detach().reshape(-1)


def _detached(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.detach()
