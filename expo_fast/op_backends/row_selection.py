"""Select the rows that an op computes, and write their results back to all rows.

A selection is a tensor of row indices, or None for all rows. With None, nothing is copied.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from expo_fast.kernels.head import IGNORE, Head


def selected_head(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    row_temperature: Tensor | None,  # (N,)
    scalar_temperature: float,  # used if `row_temperature` is None
    wanted: Tensor | None = None,  # (N,) bool; None: all
    complete: bool = False,  # whether all rows are wanted and have a valid target
) -> tuple[Head, Tensor | None]:
    """Return the head of the wanted rows that have a target, and the selection.

    With `complete`, all rows are selected without a check or a host sync.

    Raise ValueError for a target outside the vocabulary, and for a selected row whose temperature
    is not positive and finite.
    """
    rows = None if complete else _selected(targets, wanted, len(weight))
    head = head_of_rows(
        rows,
        hidden=hidden,
        weight=weight,
        bias=bias,
        targets=targets,
        row_temperature=row_temperature,
        scalar_temperature=scalar_temperature,
    )
    if isinstance(head.temperature, Tensor):
        _check_temperatures(head.temperature)
    return head, rows


def head_of_rows(
    rows: Tensor | None,  # a selection
    *,
    hidden: Tensor,  # this and the others are as in `selected_head`
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_temperature: Tensor | None,
    scalar_temperature: float,
) -> Head:
    """Return the head of selected rows, without a check or a host sync."""
    temperature = scalar_temperature
    if row_temperature is not None:
        wide = torch.promote_types(row_temperature.dtype, torch.float32)
        temperature = take_rows(row_temperature, rows).to(wide)
    return Head(
        hidden=take_rows(hidden, rows),
        weight=weight,
        bias=bias,
        targets=take_rows(targets, rows).long().contiguous(),
        temperature=temperature,
    )


def _selected(targets: Tensor, wanted: Tensor | None, vocabulary: int) -> Tensor | None:
    """Return the indices of the wanted rows that have a target, or None for all rows."""
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
    """Return the kernel that selects rows with one host sync, or None if there is none."""
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


def _check_temperatures(temperatures: Tensor) -> None:
    wrong = temperatures[~((temperatures > 0) & temperatures.isfinite())]
    if len(wrong):
        raise ValueError(f"temperature has {float(wrong[0])}: must be positive and finite")


def take_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """Return the selected rows of x (N, ...)."""
    return x if rows is None else x[rows]


def take_optional_rows(
    x: Tensor | None, rows: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor | None:
    """Return the selected rows of x, cast to `dtype` if it is given. None stays None."""
    if x is None:
        return None
    x = take_rows(x, rows)
    return x if dtype is None else x.to(dtype)


def among_all_rows(x: Tensor, rows: Tensor | None, n: int) -> Tensor:
    """Return (n, ...) with the selected rows of x, and 0 in the other rows.

    It is contiguous and not a view, because the fake outputs of an op are contiguous.
    """
    if rows is not None:
        return x.new_zeros(n, *x.shape[1:]).index_copy_(0, rows, x)
    if x._base is None and x.is_contiguous():
        return x
    return x.clone(memory_format=torch.contiguous_format)
