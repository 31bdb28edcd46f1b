"""Triton kernel for advantages: ragged groups in any order, one launch, no host sync.

A program computes BLOCK advantages and reads all M rewards twice: first for the count, sum and
extremes of each group, then for the squared deviations. M^2 comparisons are negligible compared to
a step's GEMMs, and sums have a fixed order. Values are fp64, as in advantage.py, which defines the
result.

advantage.py raises ValueError for an infinite reward, which would need a host sync here. Instead,
all known rewards of the group get NaN, and with scale "batch" those of all groups that are not
constant.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Pyright checks Triton's functions as if they were Python.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from expo_fast.kernels.advantage import rounding_noise
from expo_fast.kernels.triton_common import launch_device

BLOCK = 16  # with 32, the fp64 sums need more registers than a thread has


@triton.jit
def centre_and_scale(
    rewards, ids,  # (M,) fp64, NaN: unknown; (M,) int64
    out,  # (M,) fp32
    M, eps,
    NOISE: tl.constexpr, GROUP: tl.constexpr, BATCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    reward = tl.load(rewards + row, row < M, 0.0)
    group = tl.load(ids + row, row < M, 0)
    count = reward * 0
    total = reward * 0  # of the group, above this row's own reward: exact where rewards are close
    count_of_all = reward * 0
    total_of_all = reward * 0
    top = reward * 0 - float("inf")
    bottom = reward * 0 + float("inf")
    for first in range(0, M, BLOCK):
        r, known, mate = _others(rewards, ids, group, first, M, BLOCK)
        above = r - reward[:, None]
        count += tl.sum(mate.to(tl.float64), 1)
        total += tl.sum(tl.where(mate, above, 0.0), 1)
        top = tl.maximum(top, tl.max(tl.where(mate, r, -float("inf")), 1))
        bottom = tl.minimum(bottom, tl.min(tl.where(mate, r, float("inf")), 1))
        count_of_all += tl.sum(known.to(tl.float64), 1)
        total_of_all += tl.sum(tl.where(known, above, 0.0), 1)
    mean_above = total / count
    size = tl.maximum(tl.abs(top), tl.abs(bottom))
    advantage = tl.where(top - bottom <= NOISE * size, 0.0, -mean_above)
    # An infinite reward makes `size` infinite, so its group would count as constant.
    advantage = tl.where(size < float("inf"), advantage, float("nan"))
    if GROUP or BATCH:
        centre = mean_above if GROUP else total_of_all / count_of_all
        squares = reward * 0
        for first in range(0, M, BLOCK):
            r, known, mate = _others(rewards, ids, group, first, M, BLOCK)
            above = r - reward[:, None]
            deviation = tl.where(mate if GROUP else known, above - centre[:, None], 0.0)
            squares += tl.sum(deviation * deviation, 1)
        freedom = tl.maximum((count if GROUP else count_of_all) - 1, 1.0)
        scaled = advantage / (tl.sqrt(squares / freedom) + eps)
        advantage = tl.where(advantage == 0, 0.0, scaled)
    advantage = tl.where(reward == reward, advantage, 0.0)
    tl.store(out + row, advantage.to(tl.float32), row < M)


@triton.jit
def _others(rewards, ids, group, first, M, BLOCK: tl.constexpr):
    """Return BLOCK rewards, and (BLOCK, BLOCK) masks: known rewards, and those of the same group.

    Rewards are (1, BLOCK).
    """
    other = first + tl.arange(0, BLOCK)
    r = tl.load(rewards + other, other < M, float("nan"))[None, :]
    known = (r == r) & (group == group)[:, None]
    return r, known, known & (tl.load(ids + other, other < M, 0)[None, :] == group[:, None])


def group_advantage(
    rewards: Tensor,  # (M,); NaN: unknown
    group_ids: Tensor,  # (M,) int, in any order
    scale: str,
    eps: float,
) -> Tensor:
    """Return the (M,) fp32 advantages of `ops.group_advantage`. An infinite reward gives NaN."""
    m = len(rewards)
    out = torch.empty(m, dtype=torch.float32, device=rewards.device)
    if not m:
        return out
    with launch_device(rewards):
        centre_and_scale[(triton.cdiv(m, BLOCK),)](
            rewards.double().contiguous(),
            group_ids.long().contiguous(),
            out,
            m,
            eps,
            NOISE=rounding_noise(rewards.dtype),
            GROUP=scale == "group",
            BATCH=scale == "batch",
            BLOCK=BLOCK,
        )
    return out
