"""Exact norms of large tensors, and batches of tensors for multi-tensor operations.

In a loop over the 290 parameters of a 0.5B model, a GPU waits for launches. PyTorch's `_foreach`
operations launch once for many tensors. On a CPU they run the same loop.
"""

# pyright: reportPrivateImportUsage=false
# (torch documents its multi-tensor operations but does not export their names)

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from expo_fast.distributed.world import ALONE, World

T = TypeVar("T", bound=Sequence[object])

# Number of elements of a piece and of a batch. The temporaries of a batch are 1 MB on a CPU, which
# fits its cache, and 256 MB on a GPU.
CPU_PIECE = 1 << 18
CPU_BATCH = 1 << 18
GPU_PIECE = 1 << 24
GPU_BATCH = 1 << 26


class L2Norm:
    """The L2 norm of tensors that are added list by list, reduced in fp64.

    The square of an fp32 gradient neither overflows nor underflows in fp64. On a CPU, the fp32 norm
    of 28M numbers had an error of 0.16%. On 2 cores, fp64 copies of complete tensors took 84 ms,
    and fp64 copies of pieces 11 ms.
    """

    def __init__(self) -> None:
        self._norms: list[Tensor] = []  # 0-dim fp64, on the tensors' device

    def add(self, tensors: Iterable[Tensor]) -> None:
        parts = [piece for tensor in tensors for piece in pieces(tensor)]
        if parts:
            self._norms += torch._foreach_norm(parts, 2, dtype=torch.float64)

    def value(self, world: World = ALONE) -> float:
        """Return the norm of all tensors added so far, 0 if there are none. It is a host sync.

        world: if its ranks have parts of the tensors, the norm is that of all parts.
        """
        if world.size > 1:
            own = torch.stack(self._norms).square().sum().item() if self._norms else 0.0
            return math.sqrt(world.sums(own)[0])
        if not self._norms:
            return 0.0
        return torch.stack(self._norms).square().sum().sqrt().item()


def l2_norm(tensors: Iterable[Tensor], world: World = ALONE) -> float:
    """Return the L2 norm of all values, reduced in fp64. world: as for `L2Norm.value`."""
    norm = L2Norm()
    norm.add(tensors)
    return norm.value(world)


def pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Split a tensor into flat views of at most CPU_PIECE or GPU_PIECE elements."""
    most = CPU_PIECE if tensor.device.type == "cpu" else GPU_PIECE
    flat = tensor.flatten()
    return (flat,) if flat.numel() <= most else flat.split(most)


def batches(rows: Iterable[T]) -> Iterator[list[T]]:
    """Group rows, in their order, into batches whose first tensors have a bounded size in total.

    A row is a tuple that starts with a tensor. A tensor larger than the bound gets its own batch.
    """
    batch: list[T] = []
    elements = 0
    for row in rows:
        tensor = row[0]
        assert isinstance(tensor, Tensor)
        most = CPU_BATCH if tensor.device.type == "cpu" else GPU_BATCH
        if batch and elements + tensor.numel() > most:
            yield batch
            batch = []
            elements = 0
        batch.append(row)
        elements += tensor.numel()
    if batch:
        yield batch
