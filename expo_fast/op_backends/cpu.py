"""C++ backend: call the kernels of csrc/linear_logprob.cpp on torch tensors.

native_library.py compiles and loads them. Nothing of size (N, V) is kept, so the backward pass
recomputes the logits.
"""

import ctypes
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from expo_fast.kernels.head import (
    NOTHING,
    Forward,
    Gradients,
    Head,
    Needs,
    RowGrads,
    from_sums,
    logit_grads_about_lse,
)
from expo_fast.op_backends import native_library
from expo_fast.op_backends.native_library import DTYPE_CODES, address, struct_fields

SPAN = 1024  # rows, csrc's kSpan: the weight gradient of more rows is summed in fp32 memory


def log_probs(head: Head, needs: Needs = NOTHING) -> Forward:
    """Return the results in fp64, from one GEMM.

    Raise native_library.Unavailable if the kernels cannot be compiled or loaded.
    """
    head = _as_kernels_read(head)
    n = len(head.targets)
    target_logit = _empty((n,), torch.float32)
    base = _empty((n,), torch.float32)
    other = _empty((n,), torch.float64)
    moment = _empty((n,), torch.float64)
    _run("anchor", head, target_logit, outputs=[target_logit])
    _run("forward", head, target_logit, outputs=[other, moment, base])
    t = head.temperature
    shift = (base.double() - target_logit) / t
    results, _ = from_sums(base.double() / t, other, moment / t, shift)
    return Forward(results)


def gradients(head: Head, forward: Forward, row_grads: RowGrads, needs: Needs) -> Gradients:
    """Return gradients from the forward results.

    One GEMM recomputes the logits, and each gradient takes one more. Rows without a derivative are
    not computed.
    """
    if not any(needs):
        return Gradients(None, None, None)
    n = len(head.targets)
    active = row_grads.active_rows()
    head = _as_kernels_read(head.take(active))
    results = forward.results.take(active)
    t = head.temperature
    # csrc's logits are before temperature
    base, coefficients = logit_grads_about_lse(results, row_grads.take(active), t, per_nat=t)
    grads = _empty_gradients(head, needs)
    outputs = _Gradients(
        c0=address(coefficients.c0),
        c1=address(coefficients.c1),
        at_target=address(coefficients.at_target),
        d_hidden=address(grads.hidden),
        d_weight=address(grads.weight),
        d_bias=address(grads.bias),
        d_hidden_dtype=0 if grads.hidden is None else DTYPE_CODES[grads.hidden.dtype],
        d_weight_dtype=0 if grads.weight is None else DTYPE_CODES[grads.weight.dtype],
    )
    _run("backward", head, base, outputs=[outputs])
    return grads.with_all_rows(active, n)


def _empty_gradients(head: Head, needs: Needs) -> Gradients:
    """Return memory for the gradients. It is 0 if there is no row to write it."""
    n = len(head.targets)
    make = _empty if n else _zeros
    d_hidden = d_weight = d_bias = None
    if needs.hidden:
        keeps_bf16 = head.hidden.dtype == torch.bfloat16
        d_hidden = make(head.hidden.shape, torch.bfloat16 if keeps_bf16 else torch.float32)
    if needs.weight:
        keeps_bf16 = head.weight.dtype == torch.bfloat16 and n <= SPAN
        d_weight = make(head.weight.shape, torch.bfloat16 if keeps_bf16 else torch.float32)
    if needs.bias:
        d_bias = make((len(head.weight),), torch.float32)
    return Gradients(d_hidden, d_weight, d_bias)


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return CPU memory that csrc can write, independent of torch's default dtype and device."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="cpu")


class _Head(ctypes.Structure):
    """struct Head of csrc/linear_logprob.cpp, where its fields are documented."""

    _fields_: Sequence = [
        *struct_fields(ctypes.c_void_p, "hidden weight bias targets base exponent"),
        *struct_fields(ctypes.c_int64, "n v d weight_stride"),
        *struct_fields(ctypes.c_int32, "hidden_dtype weight_dtype threads"),
    ]


class _Gradients(ctypes.Structure):
    """struct Gradients of csrc/linear_logprob.cpp, where its fields are documented."""

    _fields_: Sequence = [
        *struct_fields(ctypes.c_void_p, "c0 c1 at_target d_hidden d_weight d_bias"),
        *struct_fields(ctypes.c_int32, "d_hidden_dtype d_weight_dtype"),
    ]


def _as_kernels_read(head: Head) -> Head:
    """Return the head with contiguous rows. All fields except hidden and weight are fp32."""
    weight = head.weight
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    bias = head.bias
    if bias is not None:
        bias = bias.float().contiguous()
    temperature = head.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature.float().contiguous()
    else:
        temperature = _empty(head.targets.shape, torch.float32).fill_(temperature)
    return Head(
        hidden=head.hidden.contiguous(),
        weight=weight,
        bias=bias,
        targets=head.targets.contiguous(),
        temperature=temperature,
    )


def _run(name: str, head: Head, base: Tensor, outputs: Sequence[Tensor | _Gradients]) -> None:
    """Call expo_fast_NAME(head, *outputs) of csrc. Raise RuntimeError if it fails."""
    assert isinstance(head.temperature, Tensor)
    exponent = math.log2(math.e) / head.temperature
    base = base.contiguous()
    arguments = _Head(
        hidden=address(head.hidden),
        weight=address(head.weight),
        bias=address(head.bias),
        targets=address(head.targets),
        base=address(base),
        exponent=address(exponent),
        n=len(head.hidden),
        v=head.weight.shape[0],
        d=head.weight.shape[1],
        weight_stride=head.weight.stride(0),
        hidden_dtype=DTYPE_CODES[head.hidden.dtype],
        weight_dtype=DTYPE_CODES[head.weight.dtype],
        threads=torch.get_num_threads(),
    )
    pointers = []
    for output in outputs:
        is_tensor = isinstance(output, Tensor)
        pointers.append(ctypes.c_void_p(address(output)) if is_tensor else ctypes.byref(output))
    kernels = _kernels(native_library.isa())
    if getattr(kernels, f"expo_fast_{name}")(ctypes.byref(arguments), *pointers):
        kernels.expo_fast_error.restype = ctypes.c_char_p
        reason = kernels.expo_fast_error().decode()
        raise RuntimeError(f"the CPU kernel {name} failed: {reason}")


@cache
def _kernels(isa: str) -> ctypes.CDLL:
    kernels = native_library.library(isa, "ops")
    return native_library.check_struct_sizes(kernels, {"head": _Head, "gradients": _Gradients})
