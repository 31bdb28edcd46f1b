"""Advantages: each reward minus its group's mean, divided by a standard deviation.

A step has at most a few thousand rewards. They are computed in fp64 on the CPU, where sums have a
fixed order.
"""

import torch
from torch import Tensor

from expo_fast.kernels.products import segment_sum

SAME_REWARD = 1e-6  # times max(1, |reward|): a smaller range within a group is rounding error


def group_advantage(
    rewards: Tensor,  # (M,); NaN: unknown
    group_ids: Tensor,  # (M,) int, in any order
    scale: str,
    eps: float,
) -> Tensor:
    """Return the advantages of `ops.group_advantage`: (M,) fp32 on the rewards' device.

    Raise ValueError for an infinite reward.
    """
    known = ~rewards.isnan()
    reward = rewards[known].to("cpu", torch.float64)
    _check_finite(rewards, reward)
    ids = group_ids[known].cpu().unique(return_inverse=True)[1]
    advantage = _centred(reward, ids)
    if scale != "none":
        deviation = _group_std(advantage, ids) if scale == "group" else _batch_std(reward)
        scaled = advantage / (deviation + eps)
        advantage = torch.where(advantage == 0, 0, scaled)
    out = torch.zeros(rewards.shape, dtype=torch.float32, device=rewards.device)
    out[known] = advantage.to(out)
    return out


def _check_finite(rewards: Tensor, known: Tensor) -> None:
    if known.isinf().any():
        index = int(rewards.isinf().nonzero()[0])
        raise ValueError(f"rewards[{index}] is infinite: must be finite, or NaN if it is unknown")


def _centred(reward: Tensor, ids: Tensor) -> Tensor:
    """Return (M,) rewards minus their group's mean, exactly 0 in groups of equal rewards."""
    n = int(ids.max()) + 1 if len(ids) else 0
    mean = segment_sum(reward, ids, n) / ids.bincount(minlength=n)
    top = reward.new_zeros(n).scatter_reduce(0, ids, reward, "amax", include_self=False)
    bottom = reward.new_zeros(n).scatter_reduce(0, ids, reward, "amin", include_self=False)
    size = torch.maximum(top.abs(), bottom.abs()).clamp(min=1)
    constant = top - bottom <= SAME_REWARD * size
    return torch.where(constant[ids], 0, reward - mean[ids])


def _group_std(centred: Tensor, ids: Tensor) -> Tensor:
    """Return the unbiased standard deviation of each reward's group, (M,)."""
    count = ids.bincount()
    variance = segment_sum(centred**2, ids, len(count)) / (count - 1).clamp(min=1)
    return variance.sqrt()[ids]


def _batch_std(reward: Tensor) -> Tensor:
    """Return the unbiased standard deviation of all rewards, (), which is 0 for one reward."""
    return reward.std() if len(reward) > 1 else reward.new_zeros(())
