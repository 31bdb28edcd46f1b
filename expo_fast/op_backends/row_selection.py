"""Select the rows that an op computes, and put their results back among all rows.

A selection is a tensor of row indices, or None for all rows: then nothing is copied.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from expo_fast.kernels.head import IGNORE, Head


def selected_head(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    temperatures: Tensor | None,  # (N,)
    temperature: float,  # where there are no temperatures
    wanted: Tensor | None = None,  # (N,) bool; None: all
    complete: bool = False,  # whether all rows are wanted and have a valid target
) -> tuple[Head, Tensor | None]:
    """Return the head of the wanted rows that have a target, and which rows these are.

    With `complete` there is nothing to find out, and no host sync.

    Raise ValueError for a target outside the vocabulary and for a selected row whose temperature is
    not positive and finite.
    """
    rows = None if complete else _selected(targets, wanted, len(weight))
    head = Head(
        hidden=take_rows(hidden, rows),
        weight=weight,
        bias=bias,
        targets=take_rows(targets, rows).long().contiguous(),
        temperature=temperature,
    )
    if temperatures is not None:
        head = replace(head, temperature=_checked_temperatures(take_rows(temperatures, rows)))
    return head, rows


def _selected(targets: Tensor, wanted: Tensor | None, vocabulary: int) -> Tensor | None:
    """Return the indices of the wanted rows that have a target; None: all rows."""
    select = _selection_kernel(targets)
    if select is None:
        _check_targets(targets, vocabulary)
        mask = targets != IGNORE
        if wanted is not None:
            mask = mask & wanted
        rows = mask.nonzero()[:, 0]
    else:
        rows, valid = select(targets, wanted, vocabulary)
        if not valid:
            _check_targets(targets, vocabulary)
    return None if len(rows) == len(targets) else rows


def _selection_kernel(targets: Tensor) -> Callable[..., tuple[Tensor, bool]] | None:
    """Return the kernel that selects rows with one host sync; None: there is none."""
    if not targets.is_cuda:
        return None
    try:
        from expo_fast.kernels import selection
    except ImportError:
        return None
    return selection.selected


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    wrong = (targets != IGNORE) & ((targets < 0) | (targets >= vocabulary))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets[{row}] is {int(targets[row])}: must lie in [0, {vocabulary}), or be {IGNORE}"
        )


def _checked_temperatures(temperatures: Tensor) -> Tensor:
    """Return them as fp32 or wider."""
    temperatures = temperatures.to(torch.promote_types(temperatures.dtype, torch.float32))
    wrong = temperatures[~((temperatures > 0) & temperatures.isfinite())]
    if len(wrong):
        raise ValueError(f"temperature holds {float(wrong[0])}: must be positive and finite")
    return temperatures


def take_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """Return the selected rows of x (N, ...)."""
    return x if rows is None else x[rows]


def take_optional_rows(
    x: Tensor | None, rows: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor | None:
    """Return the selected rows of x, cast to the dtype where one is given; None for None."""
    if x is None:
        return None
    x = take_rows(x, rows)
    return x if dtype is None else x.to(dtype)


def among_all_rows(x: Tensor, rows: Tensor | None, n: int) -> Tensor:
    """Return (n, ...) with the selected rows of x, and 0 in the others.

    It is contiguous and a view of nothing, as an op's outputs must be, because their fakes are.
    """
    if rows is not None:
        return x.new_zeros(n, *x.shape[1:]).index_copy_(0, rows, x)
    if x._base is None and x.is_contiguous():
        return x
    return x.clone(memory_format=torch.contiguous_format)
