"""Differentiable functions of a decoder layer that run as Triton kernels.

`runs` decides whether they run. If not, the model computes the same functions in PyTorch. For the
backward pass they save only their inputs, no intermediate values.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Triton may be missing, so its kernels are imported in the functions that launch them.


def runs(*tensors: Tensor) -> bool:
    """Return whether the kernels run on these tensors: one 16-bit dtype, on a GPU."""
    first = tensors[0]
    if not first.is_cuda or first.dtype not in (torch.bfloat16, torch.float16):
        return False
    return all(x.dtype == first.dtype for x in tensors) and _has_triton()


@cache
def _has_triton() -> bool:
    try:
        from expo_fast.kernels import training_layer  # noqa: F401
    except ImportError:
        return False
    return True


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up. Both are (N, M)."""
    out = _Swiglu.apply(gate, up)
    assert isinstance(out, Tensor)
    return out


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        from expo_fast.kernels import training_layer

        gate = gate.contiguous()
        up = up.contiguous()
        ctx.save_for_backward(gate, up)
        return training_layer.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        from expo_fast.kernels import training_layer

        gate, up = ctx.saved_tensors
        return training_layer.swiglu_gradients(gate, up, d_out.contiguous())


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return RoPE of q (N, H, Dh) and k (N, Hkv, Dh).

    cos, sin: (N, 1, Dh/2). They get no gradient.
    """
    q_out, k_out = _Rotate.apply(q, k, cos, sin)  # pyright: ignore[reportGeneralTypeIssues]
    return q_out, k_out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        from expo_fast.kernels import training_layer

        cos = cos.contiguous()
        sin = sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return training_layer.rotate(q.contiguous(), k.contiguous(), cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        from expo_fast.kernels import training_layer

        cos, sin = ctx.saved_tensors
        grads = training_layer.rotate(d_q.contiguous(), d_k.contiguous(), cos, sin, inverse=True)
        return *grads, None, None


@dataclass(frozen=True)
class Copies:
    """Copies of N tokens in S segments. Each segment is copied completely, at least once.

    The copies of segment s begin at rows begins[first[s]:first[s + 1]], in ascending order.
    """

    rows: Tensor  # (Nk,) int32, the token that is copied to each row
    segments: Tensor  # (N,) int32, the segment of each token
    cu_seqlens: Tensor  # (S+1,) int32, the boundaries of the segments
    first: Tensor  # (S+1,) int32, the range of each segment in `begins`
    begins: Tensor  # (P,) int32, the first row of each copy, by segment


def copy_keys(k: Tensor, v: Tensor, copies: Copies) -> tuple[Tensor, Tensor]:
    """Return k[copies.rows] and v[copies.rows]. k, v: (N, Hkv, Dh).

    The gradient of a token is the fp32 sum over its copies, in their order.
    """
    k_out, v_out = _CopyKeys.apply(k, v, copies)  # pyright: ignore[reportGeneralTypeIssues]
    return k_out, v_out


class _CopyKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, copies: Copies) -> tuple[Tensor, Tensor]:
        from expo_fast.kernels import training_layer

        ctx.copies = copies  # all layers share these tensors, which need no gradient
        return training_layer.copy_keys(k.contiguous(), v.contiguous(), copies.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_k: Tensor, d_v: Tensor) -> tuple[Tensor, Tensor, None]:
        from expo_fast.kernels import training_layer

        c = ctx.copies
        grads = training_layer.sum_copies(
            d_k.contiguous(),
            d_v.contiguous(),
            c.segments,
            c.cu_seqlens,
            c.first,
            c.begins,
        )
        return *grads, None
