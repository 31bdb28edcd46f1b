"""Advantages: each reward minus its group's mean, divided by a standard deviation.

A step has at most a few thousand rewards. They are computed in fp64 on the CPU, where sums have a
fixed order.

Rewards that are equal in exact arithmetic can differ by rounding. Consider a reward that is a
weighted sum of terms with equal signs. Each term, weight, product and sum is rounded once, with a
relative error of at most u (2^-24 in fp32). So the error of a reward is at most 4 u |reward|, and
two equal rewards differ by at most 8 u |reward|. A group with a larger spread has unequal rewards.
"""

import torch
from torch import Tensor

from expo_fast.kernels.products import segment_sum

ROUNDINGS = 8  # 4 roundings for each of two rewards that are equal in exact arithmetic


def rounding_noise(dtype: torch.dtype) -> float:
    """Return the largest spread that rounding causes, relative to the largest |reward|.

    For fp64 and integer rewards, this is the noise of fp64. For all others it is the noise of fp32,
    because adjacent numbers in fp16 and bf16 are further apart than the noise of fp32.
    """
    exact = dtype == torch.float64 or not dtype.is_floating_point
    epsilon = torch.finfo(torch.float64 if exact else torch.float32).eps
    return ROUNDINGS * epsilon / 2


def are_unequal(rewards: list[float]) -> bool:
    """Return whether the rewards of one group differ by more than the rounding noise of fp32."""
    if not rewards:
        return False
    values = torch.tensor(rewards).double()
    return not bool(_is_noise(values.min(), values.max(), rounding_noise(torch.float32)))


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
    advantage = _centred(reward, ids, rounding_noise(rewards.dtype))
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


def _centred(reward: Tensor, ids: Tensor, noise: float) -> Tensor:
    """Return (M,) rewards minus their group's mean, which is exactly 0 in constant groups.

    A group is constant if its rewards differ by no more than noise.
    """
    n = int(ids.max()) + 1 if len(ids) else 0
    top = reward.new_zeros(n).scatter_reduce(0, ids, reward, "amax", include_self=False)
    bottom = reward.new_zeros(n).scatter_reduce(0, ids, reward, "amin", include_self=False)
    # Far from 0, a mean of differences has a smaller rounding error than a mean of rewards.
    above = reward - bottom[ids]
    mean_above = segment_sum(above, ids, n) / ids.bincount(minlength=n)
    constant = _is_noise(bottom, top, noise)
    return torch.where(constant[ids], 0, above - mean_above[ids])


def _is_noise(bottom: Tensor, top: Tensor, noise: float) -> Tensor:
    """Return whether the rewards between these extremes differ by no more than rounding noise."""
    size = torch.maximum(top.abs(), bottom.abs())
    return top - bottom <= noise * size


def _group_std(centred: Tensor, ids: Tensor) -> Tensor:
    """Return the unbiased standard deviation of each reward's group, (M,)."""
    count = ids.bincount()
    variance = segment_sum(centred**2, ids, len(count)) / (count - 1).clamp(min=1)
    return variance.sqrt()[ids]


def _batch_std(reward: Tensor) -> Tensor:
    """Return the unbiased standard deviation of all rewards, (). It is 0 for one reward."""
    return reward.std() if len(reward) > 1 else reward.new_zeros(())
