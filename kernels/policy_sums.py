"""Triton: the policy loss and its statistics from the rows' terms, in one launch.

PyTorch launches about 40 small kernels for these sums, which takes a millisecond of host time on an
H100 machine.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# (Pyright checks Triton's functions as if they were Python.)

import triton
import triton.language as tl
from torch import Tensor

from expo_fast.kernels.objectives import (
    N_STATISTICS,
    PolicyLossOfRows,
    PolicyStatistics,
    PolicyTerms,
)
from expo_fast.kernels.triton_common import launch_device

BLOCK = 1024  # rows per iteration
WARPS = 8


def _place(field: str) -> tl.constexpr:
    return tl.constexpr(PolicyStatistics._fields.index(field))


# The places of the statistics in their tensor
_POLICY_LOSS: tl.constexpr = _place("policy_loss")
_ON_POLICY_LOSS: tl.constexpr = _place("on_policy_loss")
_KL: tl.constexpr = _place("kl")
_MEAN_ENTROPY: tl.constexpr = _place("mean_entropy")
_CLIP_LOW: tl.constexpr = _place("clip_low")
_CLIP_HIGH: tl.constexpr = _place("clip_high")
_RATIO_MEAN: tl.constexpr = _place("ratio_mean")
_RATIO_MAX: tl.constexpr = _place("ratio_max")


@triton.jit
def _put(out, at, x):
    """Write the sum of x to an element of `out`."""
    tl.store(out + at, tl.sum(x, 0))


@triton.jit(do_not_specialize=["N", "kl_coef", "entropy_coef"])
def sum_policy_terms(
    value, ratio, side, k3, entropy, weight, on_policy,  # (N,)
    loss, statistics,  # () and (N_STATISTICS,) out
    N, kl_coef, entropy_coef, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute PolicyLossOfRows.total and objectives.policy_statistics, in fp64. One program."""
    zero = tl.zeros([BLOCK], tl.float64)
    total, on_total, policy_total = zero, zero, zero
    all_weight, kl, entropies = zero, zero, zero
    count, low, high, ratios, nans = zero, zero, zero, zero, zero
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    for first in range(0, N, BLOCK):
        row = first + tl.arange(0, BLOCK)
        inside = row < N
        v = tl.load(value + row, inside, 0.0)
        r = tl.load(ratio + row, inside, 0.0)
        s = tl.load(side + row, inside, 0).to(tl.int32)
        k = tl.load(k3 + row, inside, 0.0)
        h = tl.load(entropy + row, inside, 0.0)
        w = tl.load(weight + row, inside, 0.0)
        on = tl.load(on_policy + row, inside, 0).to(tl.float32)
        policy = tl.where(inside, 1.0 - on, 0.0)
        x = w * (v + kl_coef * k - entropy_coef * tl.where(on != 0, 0.0, h))
        total += x.to(tl.float64)
        policy_total += (w * v * policy).to(tl.float64)
        on_total += (w * v * on).to(tl.float64)
        all_weight += (w * policy).to(tl.float64)
        kl += (w * policy * k).to(tl.float64)
        entropies += (w * policy * h).to(tl.float64)
        count += policy.to(tl.float64)
        low += (s < 0).to(tl.float64)
        high += (s > 0).to(tl.float64)
        r = r * policy
        ratios += r.to(tl.float64)
        nans += (r != r).to(tl.float64)
        largest = tl.maximum(largest, tl.where(inside, r, -float("inf")))
    of_weight = tl.sum(all_weight, 0)
    of_weight = tl.where(of_weight == 0, 1.0, of_weight)
    of_rows = tl.maximum(tl.sum(count, 0), 1.0)
    _put(loss, 0, total)
    _put(statistics, _POLICY_LOSS, policy_total)
    _put(statistics, _ON_POLICY_LOSS, on_total)
    _put(statistics, _KL, kl / of_weight)
    _put(statistics, _MEAN_ENTROPY, entropies / of_weight)
    _put(statistics, _CLIP_LOW, low / of_rows)
    _put(statistics, _CLIP_HIGH, high / of_rows)
    _put(statistics, _RATIO_MEAN, ratios / of_rows)
    top = tl.where(tl.sum(nans, 0) > 0, float("nan"), tl.max(largest, 0))
    tl.store(statistics + _RATIO_MAX, tl.where(N > 0, top, 0.0))


def policy_sums(
    loss: PolicyLossOfRows, terms: PolicyTerms, entropy: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the loss () and its PolicyStatistics (N_STATISTICS,)."""
    rows = loss.rows
    value = terms.value.contiguous()
    total = value.new_empty(())
    statistics = value.new_empty(N_STATISTICS)
    with launch_device(value):
        sum_policy_terms[(1,)](
            value,
            terms.ratio.contiguous(),
            terms.side.contiguous(),
            terms.k3.contiguous(),
            entropy.contiguous(),
            rows.weight.contiguous(),
            rows.on_policy.contiguous(),
            total,
            statistics,
            len(value),
            float(loss.kl_coef),
            float(loss.entropy_coef),
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return total, statistics
