"""Advantages: each reward minus its group's mean, divided by a standard deviation.

A step has at most a few thousand rewards. They are computed in fp64 on the CPU, where sums have a
fixed order.

Rewards that are equal in exact arithmetic can differ by rounding. Take a reward that is a weighted
sum of terms with one sign: each term, each weight, each product and each sum is rounded once, by a
relative error of at most u (2^-24 in fp32). So a reward is wrong by at most 4 u |reward|, and two
equal ones differ by at most 8 u |reward|. A group with a larger spread has unequal rewards.
"""

import torch
from torch import Tensor

from expo_fast.kernels.products import segment_sum

ROUNDINGS = 8  # of two rewards that are equal in exact arithmetic: 4 each


def rounding_noise(dtype: torch.dtype) -> float:
    """Return the largest spread of equal rewards by rounding, relative to the largest |reward|.

    Rewards in fp64, and integers, are rounded as fp64 rounds. All others are rounded as fp32
    rounds: neighbours in fp16 and bf16 are further apart than its noise.
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
    """Return (M,) rewards minus their group's mean, exactly 0 in groups that differ by noise."""
    n = int(ids.max()) + 1 if len(ids) else 0
    top = reward.new_zeros(n).scatter_reduce(0, ids, reward, "amax", include_self=False)
    bottom = reward.new_zeros(n).scatter_reduce(0, ids, reward, "amin", include_self=False)
    above = reward - bottom[ids]  # a mean of these is rounded less, far from 0, than one of rewards
    mean_above = segment_sum(above, ids, n) / ids.bincount(minlength=n)
    constant = _is_noise(bottom, top, noise)
    return torch.where(constant[ids], 0, above - mean_above[ids])


def _is_noise(bottom: Tensor, top: Tensor, noise: float) -> Tensor:
    """Return whether groups with these extremes differ by no more than rounding noise."""
    size = torch.maximum(top.abs(), bottom.abs())
    return top - bottom <= noise * size


def _group_std(centred: Tensor, ids: Tensor) -> Tensor:
    """Return the unbiased standard deviation of each reward's group, (M,)."""
    count = ids.bincount()
    variance = segment_sum(centred**2, ids, len(count)) / (count - 1).clamp(min=1)
    return variance.sqrt()[ids]


def _batch_std(reward: Tensor) -> Tensor:
    """Return the unbiased standard deviation of all rewards, (), which is 0 for one reward."""
    return reward.std() if len(reward) > 1 else reward.new_zeros(())
