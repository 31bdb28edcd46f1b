"""The modules that a layer of the decoder consists of, and the kernels that compute them.

Plain modules on a CPU run in operations that keep less for the backward pass. Modules with adapters
or hooks are called.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expo_fast.kernels import fused
from expo_fast.modeling.hooks import ALL_HOOKS, has_hooks
from expo_fast.op_backends import native_layer, recomputing


class RMSNorm(nn.Module):
    """Root mean square normalization (arXiv:1910.07467), times offset + weight."""

    def __init__(self, size: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1 - offset))
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Return x / rms(x) * (offset + weight) over the last dimension, rounded once.

    Gemma's weights are differences from 1. Their sum would be rounded in bf16, so it is fp32.
    """
    if offset == 0:
        if x.shape[-1:] == weight.shape and native_layer.runs(x, weight):
            normed = native_layer.rms_norm(x.reshape(-1, len(weight)), weight, eps)[0]
            # FSDP warns of a view that a module returns.
            return normed if x.dim() == 2 else normed.view(x.shape)
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.rms_norm(x.to(wide), weight.shape, offset + weight.to(wide), eps)
    return normed.to(x.dtype)


class _WithoutMetaValues:
    """A module of torch that draws no initial values on the meta device.

    Random functions of the meta device import torch._dynamo, which takes half a second.
    """

    weight: Tensor

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()  # pyright: ignore[reportAttributeAccessIssue]


class Embedding(_WithoutMetaValues, nn.Embedding):
    """The (V, D) embedding of tokens."""


class Head(_WithoutMetaValues, nn.Linear):
    """The (V, D) LM head. The ops multiply by its weight."""


class Linear(_WithoutMetaValues, nn.Linear):
    """`nn.Linear`, with the product of csrc/layer.cpp where that is faster."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, in) to (N, out)."""
        return recomputing.linear_map(input, self.weight, self.bias)


def normed_maps(x: Tensor, norm: Any, maps: Sequence[Any]) -> Sequence[Tensor]:
    """Return the results of several modules for the norm of x. norm: None is x itself."""
    if recomputes_norm(x, norm, maps):
        weights = [each.weight for each in maps]
        biases = [each.bias for each in maps]
        return recomputing.normed_linear_maps(x, norm.weight, norm.eps, weights, biases)
    normed = x if norm is None else norm(x)
    return [each(normed) for each in maps]


def recomputes_norm(x: Tensor, norm: Any, maps: Sequence[nn.Module]) -> bool:
    """Return whether the backward pass computes the norm of x again instead of keeping it.

    Adapters, hooks and Gemma's norms need the modules themselves.
    """
    if type(norm) is not RMSNorm or norm.offset != 0 or not are_plain_linear(maps):
        return False
    if has_hooks([norm], ALL_HOOKS) or x.dim() != 2 or x.shape[1:] != norm.weight.shape:
        return False
    if not trains_weights(maps):
        return False
    return recomputing.runs(x, norm.weight, *parameters_of(maps))


def swiglu_map(gate: Tensor, up: Tensor, down: Any) -> Tensor:
    """Return the result of a module for silu(gate) * up."""
    if recomputes_swiglu(gate, up, down):
        return recomputing.swiglu_linear_map(gate, up, down.weight, down.bias)
    return down(swiglu(gate, up))


def recomputes_swiglu(gate: Tensor, up: Tensor, down: nn.Module) -> bool:
    """Return whether the backward pass computes silu(gate) * up again instead of keeping it."""
    if not are_plain_linear([down]) or gate.dim() != 2 or gate.shape != up.shape:
        return False
    if fused.runs(gate, up) or not trains_weights([down]):
        return False
    return recomputing.runs(gate, up, *parameters_of([down]))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    if fused.runs(gate, up):
        return fused.swiglu(gate, up)
    if gate.shape == up.shape and native_layer.runs(gate, up):
        return native_layer.swiglu(gate, up)
    return F.silu(gate) * up


def geglu_map(gate: Tensor, up: Tensor, down: nn.Module) -> Tensor:
    """Return the result of a module for gelu(gate) * up, with the approximation of GELU by tanh."""
    return down(F.gelu(gate, approximate="tanh") * up)


def are_plain_linear(maps: Sequence[nn.Module]) -> bool:
    return all(type(each) is Linear for each in maps) and not has_hooks(maps, ALL_HOOKS)


def trains_weights(maps: Sequence[Any]) -> bool:
    """Return whether the backward pass needs the input of some linear map."""
    return any(each.weight.requires_grad for each in maps)


def parameters_of(maps: Sequence[nn.Module]) -> list[Tensor]:
    return [parameter for each in maps for parameter in each.parameters()]
