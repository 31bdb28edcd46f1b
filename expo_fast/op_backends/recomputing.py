"""Linear maps on a CPU that keep less for the backward pass.

    normed_linear_maps   RMSNorm, and the linear maps that read its result
    swiglu_linear_map    silu(gate) * up, and the linear map that reads it

The weight gradient of a linear map needs its input. Here the backward pass computes that input
again from what the operation before keeps anyway. Forward results are bit-identical to those of the
separate operations. So are the gradients: sums have the order in which autograd adds them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from expo_fast.op_backends import native_layer

# A backward pass under autocast has the products of forward, which runs without it.
_without_autocast = torch.amp.custom_fwd(device_type="cpu")
_as_in_forward = torch.amp.custom_bwd(device_type="cpu")


def runs(*tensors: Tensor | None) -> bool:
    """Return whether the functions of this module run on these tensors.

    Autocast would change the dtype of the products.
    """
    if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return native_layer.runs(*[x for x in tensors if x is not None])


def linear_map(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x @ weight.T + bias, with the product of csrc/layer.cpp where that is faster."""
    if native_layer.multiplies(x, weight, bias):
        return native_layer.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def normed_linear_maps(
    x: Tensor,  # (N, D)
    norm_weight: Tensor,  # (D,)
    eps: float,
    weights: Sequence[Tensor],  # (out, D) each
    biases: Sequence[Tensor | None],  # (out,) each
) -> tuple[Tensor, ...]:
    """Return each linear map of `rms_norm(x)`, (N, out) each. For the backward pass, x is kept."""
    return _NormedLinearMaps.apply(x, norm_weight, eps, *weights, *biases)  # pyright: ignore[reportReturnType]


class _NormedLinearMaps(torch.autograd.Function):
    @staticmethod
    @_without_autocast
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, eps: float, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        n_maps = len(parameters) // 2
        weights: Any = parameters[:n_maps]
        biases = parameters[n_maps:]
        ctx.eps = eps
        ctx.save_for_backward(x, norm_weight, *weights)
        normed, _ = native_layer.rms_norm(x, norm_weight, eps)
        pairs = zip(weights, biases, strict=True)
        return tuple(linear_map(normed, weight, bias) for weight, bias in pairs)

    @staticmethod
    @once_differentiable
    @_as_in_forward
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, *weights = ctx.saved_tensors
        n_maps = len(weights)
        needs_x, needs_norm, _, *needs_parameters = ctx.needs_input_grad
        needs_weights = needs_parameters[:n_maps]
        needs_biases = needs_parameters[n_maps:]
        needs_normed = needs_x or needs_norm
        normed, scale = native_layer.rms_norm(x, norm_weight, ctx.eps)
        d_normed: Tensor | None = None
        d_weights: list[Tensor | None] = [None] * n_maps
        d_biases: list[Tensor | None] = [None] * n_maps
        for i in reversed(range(n_maps)):  # the order in which autograd adds gradients
            needs = [needs_normed, needs_weights[i], needs_biases[i]]
            grads = _linear_map_gradients(normed, weights[i], d_outputs[i], needs)
            d_each, d_weights[i], d_biases[i] = grads
            d_normed = _added(d_normed, d_each)
        if d_normed is None:
            return None, None, None, *d_weights, *d_biases
        grads = native_layer.rms_norm_gradients(x, norm_weight, scale, d_normed, needs_norm)
        d_x, d_norm = grads
        return d_x, d_norm if needs_norm else None, None, *d_weights, *d_biases


def swiglu_linear_map(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the linear map of silu(gate) * up, (N, out). For the backward pass, both are kept.

    gate, up: (N, M). weight: (out, M). bias: (out,).
    """
    return _SwigluLinearMap.apply(gate, up, weight, bias)  # pyright: ignore[reportReturnType]


class _SwigluLinearMap(torch.autograd.Function):
    @staticmethod
    @_without_autocast
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return linear_map(native_layer.swiglu(gate, up), weight, bias)

    @staticmethod
    @once_differentiable
    @_as_in_forward
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        needs_gate, needs_up, needs_weight, needs_bias = ctx.needs_input_grad
        needs = [True, False, False]
        d_activated, _, _ = _linear_map_gradients(None, weight, d_y, needs)
        assert d_activated is not None
        grads = native_layer.swiglu_gradients(gate, up, d_activated, needs_weight)
        d_gate, d_up, activated = grads
        needs = [False, needs_weight, needs_bias]
        _, d_weight, d_bias = _linear_map_gradients(activated, weight, d_y, needs)
        return d_gate if needs_gate else None, d_up if needs_up else None, d_weight, d_bias


def _added(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    return term if total is None or term is None else total + term


def _linear_map_gradients(
    x: Tensor | None, weight: Tensor, d_y: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias; None for one that is not needed.

    x: None if the gradient of the weight is not needed. The products are those of the backward pass
    of `linear_map`.
    """
    if native_layer.multiplies(d_y, weight.T, None):
        grads = native_layer.linear_gradients(x if needs[1] else None, weight, d_y, needs)
        d_x, d_weight, d_bias = (g if n else None for g, n in zip(grads, needs, strict=True))
        return d_x, d_weight, d_bias
    d_x = d_y @ weight if needs[0] else None
    d_weight = None
    if needs[1]:
        assert x is not None
        d_weight = d_y.T @ x
    d_bias = d_y.sum(0) if needs[2] else None
    return d_x, d_weight, d_bias
