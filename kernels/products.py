"""Matrix products of bf16 factors summed in fp32, and sums by segment, on either kind of device."""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_ONE_AT_A_TIME = threading.Lock()


def matmul(a: Tensor, b: Tensor, out: Tensor, *, narrow: bool = False, accumulate: bool = False):
    """out (+)= a @ b; `narrow` rounds the factors to bf16 and sums their products in fp32.

    Zen 5, (682, 576) @ (576, 49152): narrow 430 GFLOP/s, fp32 170, bf16 with bf16 results 620.
    """
    beta = 1 if accumulate else 0
    if not narrow:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)
    elif out.is_cuda:
        torch.addmm(out, a.bfloat16(), b.bfloat16(), out.dtype, beta=beta, out=out)
    else:
        with _bf16_products():
            torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


@contextmanager
def _bf16_products() -> Iterator[None]:
    """oneDNN multiplies fp32 matrices as bf16 inside, sums in fp32; process-wide, so kept short."""
    mkldnn: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    with _ONE_AT_A_TIME:  # or one thread would restore what another had set
        before = mkldnn.fp32_precision
        mkldnn.fp32_precision = "bf16"
        try:
            yield
        finally:
            mkldnn.fp32_precision = before


def widened(weight: Tensor) -> Tensor:
    """What `wide_product` takes as its second factor: on a CPU, oneDNN wants it in fp32."""
    return weight.float() if weight.dtype == torch.bfloat16 and not weight.is_cuda else weight


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a (N, D) @ b (D, V), b `widened`: products of bf16 factors summed and kept in fp32."""
    narrow = a.dtype == torch.bfloat16
    out = a.new_empty(len(a), b.shape[1], dtype=torch.promote_types(a.dtype, torch.float32))
    matmul(a, b, out, narrow=narrow)
    return out


def bf16_in(room: Tensor, shape: Sequence[int]) -> Tensor:
    """Of that shape, in memory of fp32 that is done with."""
    return room.view(torch.bfloat16).view(-1)[: math.prod(shape)].view(shape)


def segment_sum(x: Tensor, segments: Tensor, n: int) -> Tensor:  # (N,), (N,) -> (n,)
    """Sums by segment in a fixed order: same input, same bits."""
    out = x.new_zeros(n)
    if x.is_cuda:  # index_add_ is atomic there, while an accumulating index_put_ sorts
        return out.index_put_((segments,), x, accumulate=True)
    return out.index_add_(0, segments, x)
