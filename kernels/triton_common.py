"""Helpers of the Triton kernels: launches, roundings, and loads and stores of 16-bit numbers."""

# Pyright checks Triton's functions as if they were Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))


@triton.jit
def to_bf16(x):
    """Round fp32 to bf16, to nearest, ties to even. The interpreter's own cast truncates."""
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


# TRITON_INTERPRET=1: the kernels run in Triton's interpreter, on a CPU
INTERPRETED: tl.constexpr = tl.constexpr(not isinstance(to_bf16, triton.JITFunction))


@triton.jit
def load_fp32(at, inside):
    """Load as fp32. Elements outside the mask are 0."""
    return tl.load(at, inside, 0.0).to(tl.float32)


@triton.jit
def rounded_like(x, like):
    """Round to the type that `like` points to. Return fp32."""
    if like.dtype.element_ty == tl.bfloat16:
        y = to_bf16(x).to(tl.float32)
    else:
        y = x.to(like.dtype.element_ty).to(tl.float32)
    return y


@triton.jit
def store_rounded(at, x, inside):
    """Store fp32 numbers in the type that `at` points to."""
    if at.dtype.element_ty == tl.bfloat16:
        tl.store(at, to_bf16(x), inside)
    else:
        tl.store(at, x, inside)


def launch_device(x: Tensor) -> AbstractContextManager:
    """Return a context in which Triton launches on the tensor's device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
