"""Triton: select the rows that an op computes, with one host sync.

PyTorch needs ten kernels and two host syncs to check the targets and to list the rows with a
target. During a host sync the GPU may run out of work.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (of Triton's functions, which it takes for Python's)

import torch
import triton
import triton.language as tl
from torch import Tensor

from expo_fast.kernels.head import IGNORE
from expo_fast.kernels.triton_common import launch_device

BLOCK = 1024  # rows per iteration


@triton.jit(do_not_specialize=["N", "V"])
def select_rows(
    targets, wanted,  # (N,) int; (N,) bool, or None: all
    rows, counts,  # (N,) out; (2,) out: rows written, and targets outside [0, V)
    N, V, IGNORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the indices of the wanted rows that have a target, in order. One program."""
    n_rows = tl.zeros([1], tl.int32)
    n_wrong = tl.zeros([1], tl.int32)
    for first in range(0, N, BLOCK):
        row = first + tl.arange(0, BLOCK)
        inside = row < N
        y = tl.load(targets + row, inside, IGNORE)
        has_target = y != IGNORE
        n_wrong += tl.sum((has_target & ((y < 0) | (y >= V))).to(tl.int32), 0)
        chosen = has_target.to(tl.int32)
        if wanted is not None:
            chosen = chosen * (tl.load(wanted + row, inside, 0).to(tl.int32) != 0).to(tl.int32)
        place = n_rows + tl.cumsum(chosen, 0) - 1
        tl.store(rows + place, row.to(tl.int64), chosen != 0)
        n_rows += tl.sum(chosen, 0)
    one = tl.arange(0, 1)
    tl.store(counts + one, n_rows)
    tl.store(counts + 1 + one, n_wrong)


def selected(targets: Tensor, wanted: Tensor | None, vocabulary: int) -> tuple[Tensor, bool]:
    """Return the indices of the wanted rows that have a target, and whether all targets are valid.

    targets: (N,) int32 or int64. wanted: (N,) bool; None: all.
    """
    n = len(targets)
    rows = torch.empty(n, dtype=torch.int64, device=targets.device)
    counts = torch.empty(2, dtype=torch.int32, device=targets.device)
    if wanted is not None:
        wanted = wanted.contiguous()
    with launch_device(targets):
        select_rows[(1,)](
            targets.contiguous(), wanted, rows, counts, n, vocabulary, IGNORE=IGNORE, BLOCK=BLOCK
        )
    n_rows, n_wrong = counts.tolist()
    return rows[:n_rows], n_wrong == 0
