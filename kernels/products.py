"""Matrix products of bf16 factors with fp32 sums, and sums by segment, on CPUs and GPUs."""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_PRECISION_LOCK = threading.Lock()


def matmul(
    a: Tensor,  # (M, K)
    b: Tensor,  # (K, N)
    out: Tensor,  # (M, N)
    *,
    narrow: bool = False,
    accumulate: bool = False,
) -> None:
    """Write a @ b to `out`, or add it to `out` with `accumulate`.

    `narrow` rounds the factors to bf16 and sums their products in fp32.
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
    """Make oneDNN multiply fp32 matrices in bf16 and sum in fp32.

    The setting applies to the process, so the block should be short.
    """
    mkldnn: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    with _PRECISION_LOCK:  # otherwise a thread could restore the setting of another thread
        before = mkldnn.fp32_precision
        mkldnn.fp32_precision = "bf16"
        try:
            yield
        finally:
            mkldnn.fp32_precision = before


def widened(weight: Tensor) -> Tensor:
    """Return the weight as the second factor of `wide_product`: in fp32 on a CPU, for oneDNN."""
    if weight.dtype == torch.bfloat16 and not weight.is_cuda:
        return weight.float()
    return weight


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a (N, D) @ b (D, V) with fp32 sums and results. b is the result of `widened`."""
    narrow = a.dtype == torch.bfloat16
    out = a.new_empty(len(a), b.shape[1], dtype=torch.promote_types(a.dtype, torch.float32))
    matmul(a, b, out, narrow=narrow)
    return out


def bf16_in(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a bf16 tensor of `shape` in the memory of an fp32 buffer, which is overwritten."""
    return buffer.view(torch.bfloat16).view(-1)[: math.prod(shape)].view(shape)


def segment_sum(x: Tensor, segments: Tensor, n: int) -> Tensor:
    """Return the (n,) sums of x (N,) by segment (N,), in a fixed order: they are deterministic."""
    out = x.new_zeros(n)
    if x.is_cuda:  # index_add_ uses atomic additions on a GPU, index_put_ sorts
        return out.index_put_((segments,), x, accumulate=True)
    return out.index_add_(0, segments, x)
