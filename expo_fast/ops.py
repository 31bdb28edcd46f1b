"""Losses and log-probs from hidden states, without (N, V) logits: the public interface of the ops.

    linear_logprob          log-prob, entropy and log-sum-exp of each row
    linear_policy_loss      GRPO and related losses, in one pass if rows are independent
    linear_preference_loss  DPO and related losses, over pairs of packed sequences
    group_advantage         advantages from rewards

Hidden states of rows without a target or weight are never read. Logits, results and the sums of the
weight gradient are fp32 for any dtype of the inputs (fp64 if an input is fp64). Each gradient has
the dtype of its input and cannot be differentiated again. Forward-mode derivatives, those of
torch.func, and vmap of an input that requires a gradient are refused. On a CPU the ops run C++ that
is compiled on first use (op_backends/cpu.py), on a GPU Triton (op_backends/triton_fused.py).
Autocast casts hidden states and weights as for a linear layer. torch.compile keeps each op as one
graph node (op_backends/custom_ops.py).
"""

from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from expo_fast.kernels import objectives, preferences
from expo_fast.kernels.head import IGNORE, LogProb
from expo_fast.kernels.objectives import *  # noqa: F403 (the classes in its __all__)
from expo_fast.kernels.objectives import Clipped, PolicyObjective, PolicyStatistics
from expo_fast.kernels.preferences import *  # noqa: F403
from expo_fast.kernels.preferences import Dpo, PreferenceObjective
from expo_fast.op_backends import custom_ops
from expo_fast.op_backends.function_transforms import check_transforms
from expo_fast.op_backends.objective_codes import encode

__all__ = [
    "IGNORE",
    "LogProb",
    "PolicyLoss",
    "PreferenceLoss",
    "group_advantage",
    "linear_logprob",
    "linear_policy_loss",
    "linear_preference_loss",
]
__all__ += objectives.__all__
__all__ += preferences.__all__

# The dtypes of hidden states, weights and biases
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def linear_logprob(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...) int32 or int64 in [0, V), or -100: no target
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # scalar, or one per row, in targets' shape
    backend: str | None = None,  # "torch" | "native" | "triton"; None: the fastest
    complete: bool = False,  # promise: every target lies in [0, V)
) -> LogProb:
    """Return the log-prob of each target under softmax((hidden @ weight.T + bias) / temperature).

    The results logp, entropy and lse have targets' shape, fp32 (fp64 if an input is fp64), in nats,
    and are 0 for rows without a target. All three are differentiable in hidden, weight and bias.
    The forward pass is one GEMM and the backward pass two more. A third GEMM recomputes the logits
    of rows whose exponentials were not kept: in C++ of fp32 inputs, for a gradient of the entropy,
    and of rows beyond 512 MB of exponentials; in Triton of rows that do not fit a fraction of the
    GPU's memory. logp keeps its relative accuracy as the probability goes to 1. With `complete`,
    targets are not checked, because a check makes the host wait for a GPU.
    Raise ValueError for shapes or devices that do not fit, a temperature that is not positive and
    finite, a target outside [0, V), and a backend that does not run these inputs.
    """
    _check_head(hidden, weight, targets, temperature, bias)
    hidden, weight, bias = _cast_as_autocast(hidden, weight, bias)
    row_temperature, scalar_temperature = _temperatures(temperature)
    logp, entropy, lse, *_ = custom_ops.logprob(
        hidden=_as_rows(hidden),
        weight=weight,
        bias=bias,
        targets=_flat(targets),
        row_temperature=row_temperature,
        scalar_temperature=scalar_temperature,
        backend=backend,
        complete=complete,
        needs=_need_gradients(hidden, weight, bias),
    )
    shape = targets.shape
    return LogProb(logp.view(shape), entropy.view(shape), lse.view(shape))


class PolicyLoss(NamedTuple):
    """Results of linear_policy_loss: 0-dim unless a shape is given, fp32 (fp64 for fp64 inputs).

    Only `loss` supports backward(); the others are detached. Policy rows are rows with a target and
    a non-zero weight that `on_policy` does not mark. A mean over no rows is 0.
    """

    loss: Tensor
    logp: Tensor  # (N,) nats, 0 for dropped rows
    entropy: Tensor  # (N,) nats, 0 for dropped rows
    policy_loss: Tensor  # sum of row_weight * objective over policy rows
    on_policy_loss: Tensor  # sum of row_weight * -advantage * logp over on-policy rows
    kl: Tensor  # k3, mean over policy rows weighted by row_weight, nats; 0 without ref_logp
    mean_entropy: Tensor  # mean over policy rows weighted by row_weight, nats
    clip_low: Tensor  # fraction of policy rows whose ratio was clipped from below
    clip_high: Tensor  # fraction clipped from above, also by the cap of Clipped or Cispo
    ratio_mean: Tensor  # mean over policy rows
    ratio_max: Tensor  # over policy rows


def linear_policy_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,) int32 or int64 in [0, V), or -100: no target
    advantage: Tensor,  # (N,)
    row_weight: Tensor,  # (N,) includes all normalisation; a row of weight 0 is dropped
    *,
    objective: PolicyObjective = Clipped(0.2, 0.2),  # noqa: B008 (frozen)
    old_logp: Tensor | None = None,  # (N,) nats, of the policy that sampled; None: every ratio is 1
    ref_logp: Tensor | None = None,  # (N,) nats
    on_policy: Tensor | None = None,  # (N,) bool: rows that contribute -advantage * logp alone
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    temperature: float | Tensor = 1.0,  # scalar or (N,), the same for old_logp and ref_logp
    sequence_ids: Tensor | None = None,  # (N,) int, for SequenceClipped
    backend: str | None = None,  # as in linear_logprob
    complete: bool = False,  # promise: every target lies in [0, V), and no row weight is 0
) -> PolicyLoss:
    """Return the loss sum_t row_weight_t * (objective_t + kl_coef * k3_t - entropy_coef * H_t).

    k3 = exp(x) - x - 1, x = ref_logp - logp (http://joschu.net/blog/kl-approx.html), and H is the
    entropy. An on-policy row contributes row_weight_t * -advantage_t * logp_t instead. Gradients
    are computed with the loss, in 3 GEMM equivalents. There are 4 in C++ for fp32 inputs and with
    entropy_coef, and with SequenceClipped for rows whose exponentials are not kept. SequenceClipped
    takes the ratio of a sequence over its policy rows, so a sequence must be dropped completely or
    not at all. Ratios are capped at exp(20). `complete` is as in linear_logprob.
    Raise ValueError for shapes or devices that do not fit, a target outside [0, V), a kl_coef
    without ref_logp, and SequenceClipped without sequence_ids or with part of a sequence.
    """
    _check_head(hidden, weight, targets, temperature)
    _check_same_shape(targets, advantage=advantage, row_weight=row_weight, old_logp=old_logp)
    _check_same_shape(targets, ref_logp=ref_logp, on_policy=on_policy, sequence_ids=sequence_ids)
    _check_integers(sequence_ids=sequence_ids)
    if kl_coef and ref_logp is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logp, the reference's log-probs")
    hidden, weight, _ = _cast_as_autocast(hidden, weight)
    row_temperature, scalar_temperature = _temperatures(temperature)
    code = encode(objective, "policy")
    loss, logp, entropy, statistics, *_ = custom_ops.policy_loss(
        hidden=_as_rows(hidden),
        weight=weight,
        objective=code.name,
        values=code.values,
        targets=_flat(targets),
        advantage=_flat(advantage),
        row_weight=_flat(row_weight),
        old_logp=_flat(old_logp),
        ref_logp=_flat(ref_logp),
        on_policy=_flat(on_policy),
        sequence_ids=_flat(sequence_ids),
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        row_temperature=row_temperature,
        scalar_temperature=scalar_temperature,
        backend=backend,
        complete=complete,
        needs=_need_gradients(hidden, weight),
    )
    found = PolicyStatistics(*statistics.detach().unbind())
    return PolicyLoss(
        loss=loss,
        logp=logp.detach().view(targets.shape),
        entropy=entropy.detach().view(targets.shape),
        policy_loss=found.policy_loss,
        on_policy_loss=found.on_policy_loss,
        kl=found.kl,
        mean_entropy=found.mean_entropy,
        clip_low=found.clip_low,
        clip_high=found.clip_high,
        ratio_mean=found.ratio_mean,
        ratio_max=found.ratio_max,
    )


class PreferenceLoss(NamedTuple):
    """Results of linear_preference_loss, fp32 (fp64 for fp64 inputs).

    Only `loss` supports backward(); the others are detached.
    """

    loss: Tensor  # 0-dim
    chosen_logp: Tensor  # (P,) summed over targets, nats
    rejected_logp: Tensor  # (P,) summed over targets, nats
    margin: Tensor  # 0-dim, mean over pairs of h, the difference of log-ratios without beta, nats
    accuracy: Tensor  # 0-dim, fraction of pairs with h > 0


def linear_preference_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,) int32 or int64 in [0, V), or -100: no target
    sequence_ids: Tensor,  # (N,) int in [0, 2P): 2p for the chosen text of pair p, else 2p + 1
    *,
    objective: PreferenceObjective = Dpo(beta=0.1),  # noqa: B008 (frozen)
    ref_logp: Tensor | None = None,  # (2P,) summed, nats; None: a uniform reference, 0
    pair_weight: Tensor | None = None,  # (P,); None: 1/P
    temperature: float | Tensor = 1.0,  # scalar or (N,)
    backend: str | None = None,  # as in linear_logprob
) -> PreferenceLoss:
    """Return the preference loss sum_p pair_weight_p * objective_p. Rows may be in any order.

    The objective reads the log-probs of both texts of a pair, summed over targets, and those of the
    reference. h = (chosen_logp - chosen_ref_logp) - (rejected_logp - rejected_ref_logp). P is half
    of ref_logp's length, or pair_weight's length, or follows from the largest id. The loss and its
    gradients take 3 to 4 GEMM equivalents, as in linear_logprob.
    Raise ValueError for shapes or devices that do not fit, a target outside [0, V) and an id
    outside [0, 2P).
    """
    _check_head(hidden, weight, targets, temperature)
    _check_same_shape(targets, sequence_ids=sequence_ids)
    _check_integers(sequence_ids=sequence_ids)
    check_transforms(ref_logp, pair_weight)
    hidden, weight, _ = _cast_as_autocast(hidden, weight)
    row_temperature, scalar_temperature = _temperatures(temperature)
    code = encode(objective, "preference")
    loss, chosen_logp, rejected_logp, margin, accuracy, *_ = custom_ops.preference_loss(
        hidden=_as_rows(hidden),
        weight=weight,
        objective=code.name,
        values=code.values,
        targets=_flat(targets),
        sequence_ids=_flat(sequence_ids),
        ref_logp=None if ref_logp is None else _constant(ref_logp),
        pair_weight=None if pair_weight is None else _constant(pair_weight),
        row_temperature=row_temperature,
        scalar_temperature=scalar_temperature,
        backend=backend,
        needs=_need_gradients(hidden, weight),
    )
    return PreferenceLoss(
        loss,
        chosen_logp.detach(),
        rejected_logp.detach(),
        margin.detach(),
        accuracy.detach(),
    )


def group_advantage(
    rewards: Tensor,  # (M,)
    group_ids: Tensor,  # (M,) int, in any order
    *,
    scale: str = "group",
    eps: float = 1e-4,  # added to the standard deviation, TRL's value
) -> Tensor:
    """Return (reward - mean of its group) / (standard deviation + eps): (M,) fp32.

    The result is a constant: it is detached from the rewards.
    `scale` selects the rewards of the unbiased (n - 1) standard deviation: "group" (GRPO,
    arXiv:2402.03300), "batch" (all rewards; Lite-PPO, arXiv:2508.08221) or "none" (no division;
    Dr.GRPO, arXiv:2503.20783). A NaN reward is left out of its group and gets 0. A group of one
    gets 0, and so does a group whose rewards differ only by rounding errors: by at most 2^-21 of
    the largest |reward| (2^-50 for rewards in fp64 and integers; kernels/advantage.py derives it).
    Raise ValueError for an unknown scale, shapes that do not fit and an infinite reward. On a GPU
    an infinite reward does not raise, because that would need a host sync. Instead, all known
    rewards of its group get NaN, and with scale "batch" those of all groups that are not constant.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale={scale!r}: must be 'group', 'batch' or 'none'")
    if not isinstance(rewards, Tensor):
        raise ValueError(f"rewards is a {type(rewards).__name__}: must be a tensor")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps={eps}: must be at least 0 and finite")
    _check_same_shape(rewards, group_ids=group_ids)
    _check_integers(group_ids=group_ids)
    check_transforms(rewards)
    return custom_ops.group_advantage(
        rewards=rewards.detach(), group_ids=group_ids, scale=scale, eps=eps
    )


# Arguments


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    bias: Tensor | None = None,
) -> None:
    """Raise ValueError for types, shapes and devices that do not fit."""
    if not isinstance(targets, Tensor):
        raise ValueError(f"targets is a {type(targets).__name__}: must be a tensor of token ids")
    _check_floats(hidden=hidden, weight=weight)
    if bias is not None:
        _check_floats(bias=bias)
    check_transforms(hidden, weight, bias)
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
    elif not isinstance(temperature, Real):
        kind = type(temperature).__name__
        raise ValueError(f"temperature is a {kind}: must be a number, or a tensor of one per row")
    elif not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: must be positive and finite")


def _check_floats(**given: Tensor) -> None:
    """Raise ValueError for what is no complete tensor of floating-point numbers."""
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise ValueError(
                f"{name} is a {type(x).__name__}: must be a tensor, such as a module's weight"
            )
        if x.dtype not in FLOATS:
            raise ValueError(f"{name} is {x.dtype}: must be fp16, bf16, fp32 or fp64")
        if hasattr(x, "full_tensor"):
            raise ValueError(
                f"{name} is a DTensor, which holds one shard of a tensor: with FSDP, leave the"
                " head in the root unit, whose weights stay gathered after its forward; elsewhere,"
                f" gather it with {name}.full_tensor(grad_placements=[Partial()]), which sums the"
                " gradients of the ranks' rows (divide by the world size where the other gradients"
                " are averages, as FSDP's are; use Replicate() if all ranks have the same rows)"
            )


def _check_same_shape(like: Tensor, **given: Tensor | None) -> None:
    """Raise ValueError for a tensor that does not have the shape and device of `like`."""
    for name, x in given.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}: must be a tensor")
        if x.shape != like.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, needs {tuple(like.shape)}")
        if x.device != like.device:
            raise ValueError(f"{name} is on {x.device}: must be on {like.device}")
        check_transforms(x)  # these are constants: they would have a derivative of 0


def _check_integers(**given: Tensor | None) -> None:
    """Raise ValueError for ids that are not integers, because they would be rounded down."""
    for name, x in given.items():
        if x is not None and (x.is_floating_point() or x.is_complex()):
            raise ValueError(f"{name} is {x.dtype}: must be integers")


def _cast_as_autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the inputs in autocast's dtype if autocast is on. It does not cast fp64."""
    device = hidden.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    if hidden.dtype != torch.float64:
        hidden = hidden.to(dtype)
    if weight.dtype != torch.float64:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype != torch.float64:
        bias = bias.to(dtype)
    return hidden, weight, bias


def _as_rows(hidden: Tensor) -> Tensor:
    """Return (N, D) hidden states: the tensor itself if it has this shape.

    The backward of a compiled function knows its own inputs, but no views of them, by their graph.
    """
    return hidden if hidden.ndim == 2 else hidden.reshape(-1, hidden.shape[-1])


def _need_gradients(*inputs: Tensor | None) -> list[bool]:
    enabled = torch.is_grad_enabled()
    return [enabled and x is not None and x.requires_grad for x in inputs]


def _temperatures(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    """Return the temperatures of the rows, and the scalar that is read if they are None."""
    if isinstance(temperature, Tensor):
        return _constant(temperature).reshape(-1), 1.0
    return None, float(temperature)


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else _constant(x).reshape(-1)


def _constant(x: Tensor) -> Tensor:
    """Return a tensor without a gradient, which autograd can save if x is from inference mode."""
    if torch.compiler.is_compiling():  # a compiled graph cannot ask for the mode
        return x.detach()
    if x.is_inference() and not torch.is_inference_mode_enabled():
        return x.clone()
    return x.detach()
