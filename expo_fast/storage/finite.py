"""Whether the values of tensors are finite."""

from collections.abc import Iterable

import torch
from torch import Tensor

from expo_fast.distributed.world import local_part


@torch.no_grad()
def is_finite(tensor: Tensor) -> bool:
    """Return whether all values of a floating-point tensor are finite.

    NaN and infinities show in the extremes. This reads a tensor once. torch.isfinite writes another
    one, which takes ten times as long.
    """
    if not tensor.numel():
        return True
    smallest, largest = torch.aminmax(tensor)
    return bool(torch.isfinite(smallest)) and bool(torch.isfinite(largest))


def first_non_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor with a NaN or an infinity, or None if there is none.

    Of a sharded tensor, this rank's part is read.
    """
    for name, complete in named:
        tensor = local_part(complete)
        if tensor.is_floating_point() and not is_finite(tensor):
            return name
    return None
