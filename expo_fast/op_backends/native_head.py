"""Call the kernels of csrc/linear_logprob.cpp on torch tensors."""

import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expo_fast.kernels.head import Gradients, Head, LogitGrads, LogProb, from_sums
from expo_fast.kernels.integers import ceil_div, round_up
from expo_fast.op_backends.native_library import DTYPE_CODES, Part, address, struct_fields

ROW_MULTIPLE = 16  # rows of kept exponentials are padded to a multiple of it


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return CPU memory that csrc can write, independent of torch's default dtype and device."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def as_kernels_read(head: Head) -> Head:
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
        temperature = empty(head.targets.shape, torch.float32).fill_(temperature)
    return Head(
        hidden=head.hidden.contiguous(),
        weight=weight,
        bias=bias,
        targets=head.targets.contiguous(),
        temperature=temperature,
    )


class KeptExponentials(NamedTuple):
    """Exponentials of n rows in bf16, and the bases that they are relative to.

    The forward kernel writes them. With them, the backward kernel needs no logits.
    """

    memory: Tensor  # (B,) uint8
    n: int

    @classmethod
    def empty(cls, head: Head, n: int) -> "KeptExponentials":
        """Return memory for n rows, without values."""
        v = len(head.weight)
        n_tiles = ceil_div(v, OPS.library().expo_fast_tile_rows())
        bytes_per_row = 2 * v + 4 * n_tiles  # exponentials in bf16, and bases in fp32
        size = bytes_per_row * round_up(n, ROW_MULTIPLE)
        return cls(empty((size,), torch.uint8), n)

    @property
    def stride(self) -> int:
        """The number of rows, with padding."""
        return round_up(self.n, ROW_MULTIPLE)


def can_keep(head: Head) -> bool:
    """Return whether the kernels keep exponentials. They have bf16's digits, as bf16 inputs do."""
    return head.hidden.dtype == head.weight.dtype == torch.bfloat16


def forward(head: Head, kept: KeptExponentials | None = None) -> LogProb:
    """Return the results in fp64, from one GEMM.

    head: from `as_kernels_read`, as below.
    kept: where the exponentials of all rows are written, if not None.
    """
    n = len(head.targets)
    target_logit = empty((n,), torch.float32)
    base = empty((n,), torch.float32)
    other = empty((n,), torch.float64)
    moment = empty((n,), torch.float64)
    _run("anchor", head, target_logit, target_logit)
    _run("forward", head, target_logit, _kept_struct(head, kept), other, moment, base)
    t = head.temperature
    shift = (base.double() - target_logit) / t
    results, _ = from_sums(base.double() / t, other, moment / t, shift)
    return results


def backward(
    head: Head,
    base: Tensor,  # (N,) fp32 logits, that `coefficients` are relative to
    coefficients: LogitGrads,  # (N,) fp32, contiguous
    grads: Gradients,  # out, contiguous
    *,
    kept: KeptExponentials | None = None,
    columns: Tensor | None = None,  # (N,) int32 ascending
    accumulate: bool = False,
) -> None:
    """Write the gradients that are not None.

    Each takes one GEMM. One more recomputes the logits if `kept` is None.

    kept: from `forward`. The coefficients c1 must be 0.
    columns: the place of each row among the kept ones; None: they are the same rows.
    accumulate: add to the gradients of weight and bias, which are fp32.
    """
    outputs = _Gradients(
        c0=address(coefficients.c0),
        c1=address(coefficients.c1),
        at_target=address(coefficients.at_target),
        d_hidden=address(grads.hidden),
        d_weight=address(grads.weight),
        d_bias=address(grads.bias),
        d_hidden_dtype=0 if grads.hidden is None else DTYPE_CODES[grads.hidden.dtype],
        d_weight_dtype=0 if grads.weight is None else DTYPE_CODES[grads.weight.dtype],
        accumulate=accumulate,
    )
    _run("backward", head, base, _kept_struct(head, kept, columns), outputs)


# The structs of csrc/linear_logprob.cpp, where their fields are documented


class _Head(ctypes.Structure):
    _fields_: Sequence = [
        *struct_fields(ctypes.c_void_p, "hidden weight bias targets base exponent"),
        *struct_fields(ctypes.c_int64, "n v d weight_stride"),
        *struct_fields(ctypes.c_int32, "hidden_dtype weight_dtype threads"),
    ]


class _Kept(ctypes.Structure):
    _fields_: Sequence = [
        *struct_fields(ctypes.c_void_p, "exponentials base columns"),
        *struct_fields(ctypes.c_int64, "stride"),
    ]


class _Gradients(ctypes.Structure):
    _fields_: Sequence = [
        *struct_fields(ctypes.c_void_p, "c0 c1 at_target d_hidden d_weight d_bias"),
        *struct_fields(ctypes.c_int32, "d_hidden_dtype d_weight_dtype accumulate"),
    ]


OPS = Part("ops", structs={"head": _Head, "kept": _Kept, "gradients": _Gradients})


def _kept_struct(
    head: Head, kept: KeptExponentials | None, columns: Tensor | None = None
) -> _Kept | None:
    if kept is None:
        return None
    start = kept.memory.data_ptr()
    return _Kept(
        exponentials=start,
        base=start + 2 * len(head.weight) * kept.stride,  # after the exponentials, in bf16
        columns=address(columns),
        stride=kept.stride,
    )


def _run(
    name: str, head: Head, base: Tensor, *arguments: Tensor | _Kept | _Gradients | None
) -> None:
    """Call expo_fast_NAME(head, *arguments) of csrc. Raise RuntimeError if it fails.

    base: (N,) fp32, the field of that name.
    """
    assert isinstance(head.temperature, Tensor)
    exponent = math.log2(math.e) / head.temperature
    base = base.contiguous()
    struct = _Head(
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
    pointers = [_pointer(argument) for argument in arguments]
    OPS.call(name, ctypes.byref(struct), *pointers)


def _pointer(argument: Tensor | _Kept | _Gradients | None) -> Any:
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p(address(argument))
    return ctypes.byref(argument)
