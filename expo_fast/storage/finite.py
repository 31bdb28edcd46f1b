"""Whether the values of tensors are finite."""

from collections.abc import Iterable

import torch
from torch import Tensor

from expo_fast.distributed.world import local_part


@torch.no_grad()
def first_non_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor with a NaN or an infinity, or None if there is none.

    Of a sharded tensor, this rank's part is read.
    """
    for name, complete in named:
        tensor = local_part(complete)
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # One pass without a tensor of booleans. The extremes of values with a NaN are NaN.
        smallest, largest = torch.aminmax(tensor.detach())
        if not torch.isfinite(smallest) or not torch.isfinite(largest):
            return name
    return None
