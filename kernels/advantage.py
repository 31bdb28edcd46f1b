"""Rewards -> advantages: each reward minus its group's mean, over a standard deviation.

A few thousand numbers a step, so in fp64 on the CPU, whose sums have a fixed order.
"""

import torch
from torch import Tensor

from expo_fast.kernels.products import segment_sum

SAME_REWARD = 1e-6  # of max(1, |reward|): a smaller spread within a group is float noise


def group_advantage(rewards: Tensor, group_ids: Tensor, scale: str, eps: float) -> Tensor:  # (M,)
    known = ~rewards.isnan()
    reward = rewards[known].to("cpu", torch.float64)
    ids = group_ids[known].cpu().unique(return_inverse=True)[1]
    advantage = _centred(reward, ids)
    deviation = {"group": _group_std, "batch": _batch_std, "none": None}[scale]
    if deviation:
        scaled = advantage / (deviation(reward, advantage, ids) + eps)
        advantage = torch.where(advantage == 0, 0, scaled)
    out = torch.zeros(rewards.shape, dtype=torch.float32, device=rewards.device)
    out[known] = advantage.to(out)
    return out


def _centred(reward: Tensor, ids: Tensor) -> Tensor:
    """Rewards minus their group's mean; exact zeros in a group that is constant up to noise."""
    n = int(ids.max()) + 1 if len(ids) else 0
    mean = segment_sum(reward, ids, n) / ids.bincount(minlength=n)
    top = reward.new_zeros(n).scatter_reduce(0, ids, reward, "amax", include_self=False)
    bottom = reward.new_zeros(n).scatter_reduce(0, ids, reward, "amin", include_self=False)
    size = torch.maximum(top.abs(), bottom.abs()).clamp(min=1)
    constant = top - bottom <= SAME_REWARD * size
    return torch.where(constant[ids], 0, reward - mean[ids])


def _group_std(reward: Tensor, centred: Tensor, ids: Tensor) -> Tensor:  # (M,)
    count = ids.bincount()
    variance = segment_sum(centred**2, ids, len(count)) / (count - 1).clamp(min=1)
    return variance.sqrt()[ids]


def _batch_std(reward: Tensor, centred: Tensor, ids: Tensor) -> Tensor:  # (), 0 for one reward
    return reward.std() if len(reward) > 1 else reward.new_zeros(())
