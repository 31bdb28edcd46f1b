"""Refuse derivatives by torch.func and by forward mode.

Without this check they would be 0, or fail with an unclear error. The ops have a backward for
`loss.backward()` and `torch.autograd.grad`. A custom operator of torch has no forward-mode
derivative: its results have no tangent, and torch reads a missing tangent as a derivative of 0.
torch.func needs a form of backward that custom operators do not have.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FORWARD_MODE = (
    "expo_fast's ops have no forward-mode derivative (torch.func.jvp, jacfwd, hessian, "
    "torch.autograd.forward_ad): use torch.autograd.grad or backward()"
)
TORCH_FUNC = (
    "expo_fast's ops have no derivative under torch.func (grad, vjp, jacrev, or vmap of what "
    "requires a gradient): use torch.autograd.grad or backward(), without vmap"
)

functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def check_transforms(*inputs: Tensor | None) -> None:
    """Raise NotImplementedError if a transform differentiates the ops in one of the inputs."""
    forward_mode = forward_ad._current_level >= 0
    if torch.compiler.is_compiling():
        if forward_mode:
            raise NotImplementedError(FORWARD_MODE)
        return  # torch.compile refuses torch.func.grad of a custom operator itself
    in_torch_func = functorch.peek_interpreter_stack() is not None
    if not forward_mode and not in_torch_func:
        return
    for x in inputs:
        if x is None:
            continue
        for layer in _layers(x):
            if forward_mode and _has_tangent(layer):
                raise NotImplementedError(FORWARD_MODE)
            if in_torch_func and layer.requires_grad and torch.is_grad_enabled():
                raise NotImplementedError(TORCH_FUNC)


def is_transformed() -> bool:
    """Return whether torch.func or forward-mode differentiation is active."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or functorch.peek_interpreter_stack() is not None


def is_batched(x: Tensor) -> bool:
    """Return whether a tensor stands for several, under torch.func.vmap or is_grads_batched."""
    return functorch.is_batchedtensor(x) or functorch.is_legacy_batchedtensor(x)


def _has_tangent(layer: Tensor) -> bool:
    if is_batched(layer):  # the layer inside has the tangent
        return False
    return forward_ad.unpack_dual(layer).tangent is not None


def _layers(x: Tensor) -> Iterator[Tensor]:
    """Yield a tensor and the tensors inside its wrappers of torch.func, from outside to inside."""
    yield x
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
        yield x
