"""Call the kernels of csrc/layer.cpp and csrc/attention.cpp on torch tensors."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expo_fast.op_backends import native_library
from expo_fast.op_backends.function_transforms import is_transformed
from expo_fast.op_backends.native_head import empty
from expo_fast.op_backends.native_library import DTYPE_CODES, Part, address, struct_fields


class _Linear(ctypes.Structure):
    """struct Linear of csrc/layer.cpp, where its fields are documented, as below."""

    _fields_: Sequence = [
        *struct_fields(ctypes.c_void_p, "x weight bias d_y y d_x d_weight d_bias"),
        ("n", ctypes.c_int64),
        ("in", ctypes.c_int64),
        ("out", ctypes.c_int64),
        *struct_fields(ctypes.c_int32, "dtype threads"),
    ]


class _Norm(ctypes.Structure):
    _fields_: Sequence = [
        *struct_fields(ctypes.c_void_p, "x weight d_y y scale d_x d_weight"),
        *struct_fields(ctypes.c_int64, "n d"),
        ("eps", ctypes.c_float),
        *struct_fields(ctypes.c_int32, "dtype threads"),
    ]


class _Rotation(ctypes.Structure):
    _fields_: Sequence = [
        *struct_fields(ctypes.c_void_p, "x cos sin y"),
        *struct_fields(ctypes.c_int64, "n heads head_dim"),
        *struct_fields(ctypes.c_int32, "inverse dtype threads"),
    ]


class _Swiglu(ctypes.Structure):
    _fields_: Sequence = [
        *struct_fields(ctypes.c_void_p, "gate up d_y y d_gate d_up"),
        *struct_fields(ctypes.c_int64, "size"),
        *struct_fields(ctypes.c_int32, "dtype threads"),
    ]


class _Attention(ctypes.Structure):
    """struct Attention of csrc/attention.cpp."""

    _fields_: Sequence = [
        *struct_fields(ctypes.c_void_p, "q k v boundaries parents out log_sum d_out d_q d_k d_v"),
        *struct_fields(ctypes.c_int64, "n segments heads kv_heads head_dim window"),
        ("scale", ctypes.c_float),
        *struct_fields(ctypes.c_int32, "dtype threads"),
    ]


LAYER = Part(
    "layer",
    structs={
        "linear": _Linear,
        "norm": _Norm,
        "rotation": _Rotation,
        "swiglu": _Swiglu,
        "attention": _Attention,
    },
)


def _run(name: str, struct: type[ctypes.Structure], dtype: torch.dtype, **fields: Any) -> None:
    """Call expo_fast_NAME of csrc. Raise RuntimeError if it fails.

    fields: the fields of the struct; a tensor stands for its address. Others are 0 or null.
    """
    values = {}
    for field, value in fields.items():
        values[field] = address(value) if isinstance(value, Tensor) else value
    arguments = struct(dtype=DTYPE_CODES[dtype], threads=torch.get_num_threads(), **values)
    LAYER.call(name, ctypes.byref(arguments))


def runs(*tensors: Tensor) -> bool:
    """Return whether the kernels run on these tensors: one dtype, fp32 or bf16, on a CPU."""
    first = tensors[0]
    if first.device.type != "cpu" or first.dtype not in (torch.float32, torch.bfloat16):
        return False
    if any(x.dtype != first.dtype or x.device != first.device for x in tensors):
        return False
    if is_transformed():
        return False
    return LAYER.is_available()


# Tokens from which on a linear map is worth the copies of its weight.
LEAST_TOKENS = 64


def multiplies(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether `linear` runs on these tensors and is faster than PyTorch's product.

    It is for bf16 on CPUs on which csrc multiplies fp32 copies. x: (N, in).
    """
    if x.dtype != torch.bfloat16 or x.dim() != 2 or len(x) < LEAST_TOKENS:
        return False
    if x.shape[1] != weight.shape[1]:
        return False
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return runs(*tensors) and native_library.isa() in ("avx512", "avx2")


def _like(x: Tensor) -> Tensor:
    return empty(x.shape, x.dtype)


def _check_gradient(d_y: Tensor, y: Tensor) -> None:
    """Raise ValueError if d_y, whose memory a kernel reads, is not like y."""
    if d_y.dtype != y.dtype or d_y.shape != y.shape:
        raise ValueError(
            f"a gradient has the shape {tuple(d_y.shape)} and the dtype {d_y.dtype}, "
            f"need {tuple(y.shape)} and {y.dtype}"
        )


# Linear maps


@torch.library.custom_op("expo_fast::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x @ weight.T + bias, (N, out), rounded once.

    x: (N, in). weight: (out, in). bias: (out,). All have one dtype: fp32 or bf16.
    """
    n, n_in = x.shape
    y = empty((n, len(weight)), x.dtype)
    x = x.contiguous()
    weight = weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    sizes = {"n": n, "in": n_in, "out": len(weight)}
    _run("linear", _Linear, x.dtype, x=x, weight=weight, bias=bias, y=y, **sizes)
    return y


@linear.register_fake
def _(x, weight, bias):
    return x.new_empty(len(x), len(weight))


@torch.library.custom_op("expo_fast::linear_gradients", mutates_args=())
def linear_gradients(
    x: Tensor | None, weight: Tensor, d_y: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias. A gradient that is not needed is empty.

    x: None if the gradient of the weight is not needed.
    """
    dtype = weight.dtype
    n = len(d_y)
    n_out, n_in = weight.shape
    shapes = [(n, n_in), (n_out, n_in), (n_out,)]
    pairs = zip(shapes, needs, strict=True)
    d_x, d_weight, d_bias = (empty(shape if needed else (0,), dtype) for shape, needed in pairs)
    if x is not None:
        x = x.contiguous()
    weight = weight.contiguous()
    d_y = d_y.contiguous()
    outputs = {"d_x": d_x, "d_weight": d_weight, "d_bias": d_bias}
    wanted = {name: y for (name, y), needed in zip(outputs.items(), needs, strict=True) if needed}
    sizes = {"n": n, "in": n_in, "out": n_out}
    _run("linear_gradients", _Linear, dtype, x=x, weight=weight, d_y=d_y, **wanted, **sizes)
    return d_x, d_weight, d_bias


@linear_gradients.register_fake
def _(x, weight, d_y, needs):
    n_out, n_in = weight.shape
    shapes = [(len(d_y), n_in), (n_out, n_in), (n_out,)]
    return tuple(
        weight.new_empty(s if needed else (0,)) for s, needed in zip(shapes, needs, strict=True)
    )


def _save_linear(ctx: Any, inputs, output) -> None:
    x, weight, bias = inputs
    ctx.has_bias = bias is not None
    trains_weight = ctx.needs_input_grad[1]
    ctx.save_for_backward(x if trains_weight else None, weight)


def _linear_backward(ctx: Any, d_y: Tensor):
    needs = list(ctx.needs_input_grad)
    needs[2] = needs[2] and ctx.has_bias
    grads = linear_gradients(*ctx.saved_tensors, d_y, needs)
    return tuple(g if needed else None for g, needed in zip(grads, needs, strict=True))


linear.register_autograd(_linear_backward, setup_context=_save_linear)


# Norms


@torch.library.custom_op("expo_fast::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x / rms(x) * weight for each row of x (N, D), rounded once, and 1 / rms(x).

    The latter is (N,) fp32. weight: (D,).
    """
    x = x.contiguous()
    weight = weight.contiguous()
    y = _like(x)
    scale = empty((len(x),), torch.float32)
    n, d = x.shape
    _run("norm", _Norm, x.dtype, x=x, weight=weight, y=y, scale=scale, n=n, d=d, eps=eps)
    return y, scale


@rms_norm.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(len(x), dtype=torch.float32)


@torch.library.custom_op("expo_fast::rms_norm_gradients", mutates_args=())
def rms_norm_gradients(
    x: Tensor,  # (N, D)
    weight: Tensor,  # (D,)
    scale: Tensor,  # (N,) fp32
    d_y: Tensor,  # (N, D)
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight. The latter is empty if it is not needed."""
    _check_gradient(d_y, x)
    x = x.contiguous()
    weight = weight.contiguous()
    scale = scale.contiguous()
    d_y = d_y.contiguous()
    d_x = _like(x)
    d_weight = empty(weight.shape if needs_weight else (0,), weight.dtype)
    n, d = x.shape
    fields = {"x": x, "weight": weight, "scale": scale, "d_y": d_y, "d_x": d_x}
    if needs_weight:
        fields["d_weight"] = d_weight
    _run("norm_gradients", _Norm, x.dtype, **fields, n=n, d=d)
    return d_x, d_weight


@rms_norm_gradients.register_fake
def _(x, weight, scale, d_y, needs_weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape if needs_weight else (0,))


def _save_rms_norm(ctx: Any, inputs, output) -> None:
    x, weight, _ = inputs
    _, scale = output
    ctx.mark_non_differentiable(scale)
    ctx.save_for_backward(x, weight, scale)


def _rms_norm_backward(ctx: Any, d_y: Tensor, _):
    needs_weight = ctx.needs_input_grad[1]
    d_x, d_weight = rms_norm_gradients(*ctx.saved_tensors, d_y, needs_weight)
    return d_x, d_weight if needs_weight else None, None


rms_norm.register_autograd(_rms_norm_backward, setup_context=_save_rms_norm)


# RoPE


@torch.library.custom_op("expo_fast::rotate", mutates_args=())
def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """Return x (N, heads, Dh) rotated by its positions, with the roundings of PyTorch.

    cos, sin: (N, 1, Dh/2). They get no gradient.
    inverse: rotate by the negative angles.
    """
    x = x.contiguous()
    cos = cos.contiguous()
    sin = sin.contiguous()
    y = _like(x)
    n, heads, head_dim = x.shape
    sizes = {"n": n, "heads": heads, "head_dim": head_dim}
    _run("rotate", _Rotation, x.dtype, x=x, cos=cos, sin=sin, y=y, inverse=inverse, **sizes)
    return y


@rotate.register_fake
def _(x, cos, sin, inverse):
    return x.new_empty(x.shape)


def _save_rotate(ctx: Any, inputs, output) -> None:
    _, cos, sin, inverse = inputs
    ctx.inverse = inverse
    ctx.save_for_backward(cos, sin)


def _rotate_backward(ctx: Any, d_y: Tensor):
    cos, sin = ctx.saved_tensors
    return rotate(d_y, cos, sin, not ctx.inverse), None, None, None


rotate.register_autograd(_rotate_backward, setup_context=_save_rotate)


# The gated activation


@torch.library.custom_op("expo_fast::swiglu", mutates_args=())
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up. Both are (N, M)."""
    gate = gate.contiguous()
    up = up.contiguous()
    y = _like(gate)
    _run("swiglu", _Swiglu, gate.dtype, gate=gate, up=up, y=y, size=gate.numel())
    return y


@swiglu.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.custom_op("expo_fast::swiglu_gradients", mutates_args=())
def swiglu_gradients(
    gate: Tensor, up: Tensor, d_y: Tensor, needs_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of gate and up, and the result of `swiglu`.

    The latter is empty if it is not needed.
    """
    _check_gradient(d_y, gate)
    gate = gate.contiguous()
    up = up.contiguous()
    d_y = d_y.contiguous()
    d_gate = _like(gate)
    d_up = _like(gate)
    y = empty(gate.shape if needs_y else (0,), gate.dtype)
    fields = {"gate": gate, "up": up, "d_y": d_y, "d_gate": d_gate, "d_up": d_up}
    if needs_y:
        fields["y"] = y
    _run("swiglu_gradients", _Swiglu, gate.dtype, **fields, size=gate.numel())
    return d_gate, d_up, y


@swiglu_gradients.register_fake
def _(gate, up, d_y, needs_y):
    y = gate.new_empty(gate.shape if needs_y else (0,))
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape), y


def _save_swiglu(ctx: Any, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, d_y: Tensor):
    d_gate, d_up, _ = swiglu_gradients(*ctx.saved_tensors, d_y, needs_y=False)
    return d_gate, d_up


swiglu.register_autograd(_swiglu_backward, setup_context=_save_swiglu)


# Attention


@torch.library.custom_op("expo_fast::tree_attention", mutates_args=())
def tree_attention(
    q: Tensor,  # (N, H, Dh)
    k: Tensor,  # (N, Hkv, Dh)
    v: Tensor,  # (N, Hkv, Dh)
    boundaries: Tensor,  # (S+1,) int32, of the segments
    parents: Tensor,  # (S,) int32, the segment that each one continues, or -1
    window: int,  # tokens that a token sees, including itself; 0: all
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the attention (N, H, Dh), and the (N, H) fp32 log2 of the softmax's denominators.

    A token sees the earlier tokens of its segment and of the segment's ancestors.
    """
    q = q.contiguous()
    k = k.contiguous()
    v = v.contiguous()
    out = _like(q)
    log_sum = empty(q.shape[:2], torch.float32)
    fields = {"q": q, "k": k, "v": v, "boundaries": boundaries, "parents": parents}
    sizes = _attention_sizes(q, k, parents)
    _run(
        "attention", _Attention, q.dtype, **fields, **sizes,
        out=out, log_sum=log_sum, window=window, scale=scale,
    )  # fmt: skip
    return out, log_sum


def _attention_sizes(q: Tensor, k: Tensor, parents: Tensor) -> dict[str, int]:
    n, heads, head_dim = q.shape
    return {
        "n": n,
        "segments": len(parents),
        "heads": heads,
        "kv_heads": k.shape[1],
        "head_dim": head_dim,
    }


@tree_attention.register_fake
def _(q, k, v, boundaries, parents, window, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("expo_fast::tree_attention_gradients", mutates_args=())
def tree_attention_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: Tensor,
    parents: Tensor,
    out: Tensor,
    log_sum: Tensor,
    d_out: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, log_sum, d_out = out.contiguous(), log_sum.contiguous(), d_out.contiguous()
    d_q = _like(q)
    d_k = _like(k)
    d_v = _like(v)
    fields = {"q": q, "k": k, "v": v, "boundaries": boundaries, "parents": parents}
    results = {"out": out, "log_sum": log_sum, "d_out": d_out}
    grads = {"d_q": d_q, "d_k": d_k, "d_v": d_v}
    sizes = _attention_sizes(q, k, parents)
    _run(
        "attention_gradients", _Attention, q.dtype, **fields, **results, **grads, **sizes,
        window=window, scale=scale,
    )  # fmt: skip
    return d_q, d_k, d_v


@tree_attention_gradients.register_fake
def _(q, k, v, boundaries, parents, out, log_sum, d_out, window, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_attention(ctx: Any, inputs, output) -> None:
    q, k, v, boundaries, parents, window, scale = inputs
    out, log_sum = output
    ctx.window = window
    ctx.scale = scale
    ctx.mark_non_differentiable(log_sum)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    ctx.save_for_backward(q, k, v, boundaries, parents, out, log_sum)


def _attention_backward(ctx: Any, d_out: Tensor, _):
    grads = tree_attention_gradients(*ctx.saved_tensors, d_out, ctx.window, ctx.scale)
    return *grads, None, None, None, None


tree_attention.register_autograd(_attention_backward, setup_context=_save_attention)
