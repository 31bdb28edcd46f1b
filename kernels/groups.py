"""Triton: advantages of ragged groups in any order, in one launch and with no look at the values.

A program takes BLOCK rewards and meets all M of them twice: first count, sum and extremes of each
one's group, then its squared deviations. M^2 comparisons are nothing beside one step's GEMMs, and
sums have a fixed order. fp64 throughout, as in advantage.py, which defines what is computed.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (of Triton's functions, which it takes for Python's)

import torch
import triton
import triton.language as tl
from torch import Tensor

from expo_fast.kernels.advantage import SAME_REWARD
from expo_fast.kernels.rowwise import launch_device

BLOCK = 32


@triton.jit
def centre_and_scale(
    rewards, ids,  # (M,) fp64, NaN: unknown; (M,) int64
    out,  # (M,) fp32
    M, eps,
    SAME_REWARD: tl.constexpr, GROUP: tl.constexpr, BATCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    reward, group = tl.load(rewards + row, row < M, 0.0), tl.load(ids + row, row < M, 0)
    count, total, everyone, sum_of_all = reward * 0, reward * 0, reward * 0, reward * 0
    top, bottom = reward * 0 - float("inf"), reward * 0 + float("inf")
    for first in range(0, M, BLOCK):
        r, known, mate = _others(rewards, ids, group, first, M, BLOCK)
        count += tl.sum(mate.to(tl.float64), 1)
        total += tl.sum(tl.where(mate, r, 0.0), 1)
        top = tl.maximum(top, tl.max(tl.where(mate, r, -float("inf")), 1))
        bottom = tl.minimum(bottom, tl.min(tl.where(mate, r, float("inf")), 1))
        everyone += tl.sum(known.to(tl.float64), 1)
        sum_of_all += tl.sum(tl.where(known, r, 0.0), 1)
    mean = total / count
    size = tl.maximum(tl.maximum(tl.abs(top), tl.abs(bottom)), 1.0)
    advantage = tl.where(top - bottom <= SAME_REWARD * size, 0.0, reward - mean)
    if GROUP or BATCH:
        around, squares = mean if GROUP else sum_of_all / everyone, reward * 0
        for first in range(0, M, BLOCK):
            r, known, mate = _others(rewards, ids, group, first, M, BLOCK)
            apart = tl.where(mate if GROUP else known, r - around[:, None], 0.0)
            squares += tl.sum(apart * apart, 1)
        free = tl.maximum((count if GROUP else everyone) - 1, 1.0)
        advantage = tl.where(advantage == 0, 0.0, advantage / (tl.sqrt(squares / free) + eps))
    advantage = tl.where(reward == reward, advantage, 0.0)
    tl.store(out + row, advantage.to(tl.float32), row < M)


@triton.jit
def _others(rewards, ids, group, first, M, BLOCK: tl.constexpr):
    """(1, BLOCK) rewards, which of them are known, and which (BLOCK, BLOCK) of one's own group."""
    other = first + tl.arange(0, BLOCK)
    r = tl.load(rewards + other, other < M, float("nan"))[None, :]
    known = (r == r) & (group == group)[:, None]
    return r, known, known & (tl.load(ids + other, other < M, 0)[None, :] == group[:, None])


def group_advantage(rewards: Tensor, group_ids: Tensor, scale: str, eps: float) -> Tensor:  # (M,)
    out = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    given = rewards.double().contiguous(), group_ids.long().contiguous(), out, len(out), eps
    programs = triton.cdiv(len(out), BLOCK)
    if programs:
        how = {"GROUP": scale == "group", "BATCH": scale == "batch", "BLOCK": BLOCK}
        with launch_device(rewards):
            centre_and_scale[(programs,)](*given, SAME_REWARD, **how)
    return out
