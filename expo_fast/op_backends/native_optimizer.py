"""Call the kernels of csrc/optimizer.cpp: norms of gradients, and AdamW, over lists of tensors."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from expo_fast.op_backends.native_library import Part, address, struct_fields


class _GradTerms(ctypes.Structure):
    """struct GradTerms of csrc/optimizer.cpp, where its fields are documented, as below."""

    _fields_: Sequence = [
        *struct_fields(ctypes.c_void_p, "first second"),
        ("size", ctypes.c_int64),
    ]


class _Squares(ctypes.Structure):
    _fields_: Sequence = [
        ("tensors", ctypes.POINTER(_GradTerms)),
        ("n", ctypes.c_int64),
        ("sums", ctypes.POINTER(ctypes.c_double)),
        ("threads", ctypes.c_int32),
    ]


class _Parameter(ctypes.Structure):
    _fields_: Sequence = [
        *struct_fields(ctypes.c_void_p, "weight exp_avg exp_avg_sq first second copy"),
        ("size", ctypes.c_int64),
        *struct_fields(ctypes.c_float, "decay kept step_size root"),
    ]


class _AdamW(ctypes.Structure):
    _fields_: Sequence = [
        ("parameters", ctypes.POINTER(_Parameter)),
        ("n", ctypes.c_int64),
        ("squared_change", ctypes.POINTER(ctypes.c_double)),
        *struct_fields(ctypes.c_float, "clip grad_share beta2 square_share eps"),
        ("threads", ctypes.c_int32),
    ]


OPTIMIZER = Part(
    "optimizer",
    structs={
        "grad_terms": _GradTerms,
        "squares": _Squares,
        "parameter": _Parameter,
        "adamw": _AdamW,
    },
)


def runs(tensors: Sequence[Tensor]) -> bool:
    """Return whether the kernels run on these tensors, and on tensors of the same layout.

    They read and write memory in its order, so each tensor must fill its memory without gaps.
    """
    if not all(x.device.type == "cpu" and _has_no_gaps(x) for x in tensors):
        return False
    return OPTIMIZER.is_available()


def _has_no_gaps(x: Tensor) -> bool:
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


class GradTerms(NamedTuple):
    """The two terms of the gradient of a parameter, in fp32. None: 0. Both have one layout."""

    first: Tensor | None
    second: Tensor | None


class Squares(NamedTuple):
    """Sums of squares in fp64."""

    first: float
    second: float
    both: float
    """Of the fp32 sums of both terms."""


def squares(terms: Sequence[GradTerms]) -> Squares:
    """Return the sums of the squares of the gradients, in one pass over them.

    The order of the sums depends on neither the number of threads nor the instruction set.
    """
    tensors = (_GradTerms * len(terms))()
    for fields, (first, second) in zip(tensors, terms, strict=True):
        known = first if first is not None else second
        fields.first = address(first)
        fields.second = address(second)
        fields.size = 0 if known is None else known.numel()
    sums = (ctypes.c_double * 3)()
    arguments = _Squares(tensors, len(terms), sums, torch.get_num_threads())
    OPTIMIZER.call("squares", ctypes.byref(arguments))
    return Squares(*sums)


@dataclass(frozen=True)
class AdamWParameter:
    """A parameter that `adamw` updates in place. All tensors have one layout."""

    weight: Tensor  # fp32
    exp_avg: Tensor  # fp32
    exp_avg_sq: Tensor  # fp32
    terms: GradTerms  # not both None
    copy: Tensor | None  # bf16, gets the rounded weight
    t: int  # number of this update, from 1
    decay: float


def adamw(
    parameters: Sequence[AdamWParameter],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    clip: float,
) -> float:
    """Update the parameters with their gradients times `clip`, in one pass.

    Return the sum of the squared changes of the weights, before the weights are rounded to fp32.
    The new weights and moments have the bits of PyTorch's fused AdamW on a CPU with AVX2 and FMA.
    """
    beta1, beta2 = betas
    structs = (_Parameter * len(parameters))()
    for fields, p in zip(structs, parameters, strict=True):
        first, second = p.terms
        if first is None:
            first = second
            second = None
        fields.weight = address(p.weight)
        fields.exp_avg = address(p.exp_avg)
        fields.exp_avg_sq = address(p.exp_avg_sq)
        fields.first = address(first)
        fields.second = address(second)
        fields.copy = address(p.copy)
        fields.size = p.weight.numel()
        fields.decay = lr * p.decay
        fields.kept = 1 - lr * p.decay
        fields.step_size = lr / (1 - beta1**p.t)
        fields.root = math.sqrt(1 - beta2**p.t)
    squared_change = ctypes.c_double()
    arguments = _AdamW(
        parameters=structs,
        n=len(parameters),
        squared_change=ctypes.pointer(squared_change),
        clip=clip,
        grad_share=1 - beta1,
        beta2=beta2,
        square_share=1 - beta2,
        eps=eps,
        threads=torch.get_num_threads(),
    )
    OPTIMIZER.call("adamw", ctypes.byref(arguments))
    return squared_change.value
