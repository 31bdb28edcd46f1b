"""Triton: what lies between a decoder layer's products while one token a row is decoded.

    add_norm    x' = x + d, rms_norm(x') w            8 D bytes a row, 16-bit: 2 in, 2 out
    place       q', k' = rope(norm(q)), rope(norm(k)); k' and v to their page
    swiglu      silu(gate) up

Each is one launch where PyTorch makes 2, 20 and 2: at 256 rows none moves more than some MB, and a
launch in a CUDA graph takes 2 us, as long as it takes an H200 to move 8 MB. Every number is rounded
where `model` rounds it, so that log-probs stay those of the trainer.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# (of Triton's functions, which it takes for Python's)

import torch
import triton
import triton.language as tl
from torch import Tensor

from expo_fast.kernels.decode import Paged
from expo_fast.kernels.rowwise import INTERPRETED, launch_device, to_bf16

ELEMENTS = 1024  # to a program that works element by element


@triton.jit
def _rounded(x, like, WIDE: tl.constexpr):
    """To the type of what `like` points to, and back to fp32."""
    if like.dtype.element_ty == tl.bfloat16:
        y = to_bf16(x, WIDE).to(tl.float32)
    else:
        y = x.to(like.dtype.element_ty).to(tl.float32)
    return y


@triton.jit
def _stored(at, x, inside, WIDE: tl.constexpr):
    if at.dtype.element_ty == tl.bfloat16:
        tl.store(at, to_bf16(x, WIDE), inside)
    else:
        tl.store(at, x, inside)


@triton.jit
def add_norm_rows(
    x, d, w, total, out,  # (B, D), (B, D) or None, (D,), (B, D) out or None, (B, D) out
    D, eps, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * D
    i = tl.arange(0, BLOCK)
    inside = i < D
    a = tl.load(x + at + i, inside, 0.0).to(tl.float32)
    if d is not None:
        a = _rounded(a + tl.load(d + at + i, inside, 0.0).to(tl.float32), x, WIDE)
        _stored(total + at + i, a, inside, WIDE)
    scale = tl.rsqrt(tl.sum(a * a, 0) / D + eps)
    _stored(out + at + i, a * scale * tl.load(w + i, inside, 0.0).to(tl.float32), inside, WIDE)


@triton.jit
def swiglu_elements(gate, up, out, n, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    g = tl.load(gate + i, inside, 0.0).to(tl.float32)
    g = _rounded(g / (1 + tl.exp(-g)), gate, WIDE)
    _stored(out + i, g * tl.load(up + i, inside, 0.0).to(tl.float32), inside, WIDE)


@triton.jit
def _turned(x, w, cos, sin, eps, DH, i, WIDE: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr):
    """The two halves of one head of one row, (BLOCK,) fp32 each."""
    half = DH // 2
    inside = i < half
    a = tl.load(x + i, inside, 0.0).to(tl.float32)
    b = tl.load(x + half + i, inside, 0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / DH + eps)
        a = _rounded(a * scale * tl.load(w + i, inside, 0.0).to(tl.float32), x, WIDE)
        b = _rounded(b * scale * tl.load(w + half + i, inside, 0.0).to(tl.float32), x, WIDE)
    if ROPE:
        c = tl.load(cos + i, inside, 0.0).to(tl.float32)
        s = tl.load(sin + i, inside, 0.0).to(tl.float32)
        ac, bs = _rounded(a * c, x, WIDE), _rounded(b * s, x, WIDE)
        bc, at = _rounded(b * c, x, WIDE), _rounded(a * s, x, WIDE)
        a, b = ac - bs, bc + at
    return a, b


@triton.jit
def place_heads(
    q, k, v, q_norm, k_norm, cos, sin, out,  # (B, heads, Dh) thrice, (Dh,), (B, Dh/2); q' out
    address, tables, positions,  # as in `decode`
    layer, W, eps, H,
    STRIDE: tl.constexpr, PAGE: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr,
    BLOCK: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program a row and head: first those of q, then those of k with v's beside it."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, half = tl.arange(0, BLOCK), DH // 2
    inside = i < half
    cos += row * half
    sin += row * half
    if head < H:
        at = (row * H + head) * DH
        a, b = _turned(q + at, q_norm, cos, sin, eps, DH, i, WIDE, NORM, ROPE)
        _stored(out + at + i, a, inside, WIDE)
        _stored(out + at + half + i, b, inside, WIDE)
    else:
        at = (row * HKV + head - H) * DH
        position = tl.load(positions + row)
        column = tl.minimum(position // PAGE, W - 1)  # as in `decode.append_tokens`
        page = tl.load(tables + row * W + column).to(tl.int64)
        slab = tl.multiple_of(tl.load(address).to(k.dtype), 16)
        key = slab + page * STRIDE + layer + position % PAGE * (HKV * DH) + (head - H) * DH
        a, b = _turned(k + at, k_norm, cos, sin, eps, DH, i, WIDE, NORM, ROPE)
        _stored(key + i, a, inside, WIDE)
        _stored(key + half + i, b, inside, WIDE)
        value = key + PAGE * HKV * DH
        tl.store(value + i, tl.load(v + at + i, inside), inside)
        tl.store(value + half + i, tl.load(v + at + half + i, inside), inside)


def add_norm(x: Tensor, d: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (B, D) + d, and that normalised."""
    total, out = x if d is None else torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    given = x, d, weight, None if d is None else total, out, x.shape[1], eps, block, INTERPRETED
    with launch_device(x):
        add_norm_rows[(len(x),)](*given)
    return total, out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out, n = torch.empty_like(gate), gate.numel()
    with launch_device(gate):
        swiglu_elements[(triton.cdiv(n, ELEMENTS),)](gate, up, out, n, ELEMENTS, INTERPRETED)
    return out


def place(
    cache: Paged,
    layer: int,
    q: Tensor,  # (B, H, Dh), contiguous like all here
    k: Tensor,  # (B, Hkv, Dh)
    v: Tensor,  # (B, Hkv, Dh)
    norms: tuple[Tensor, Tensor, float] | None,  # weights for q and k, (Dh,), and their eps
    rotation: tuple[Tensor, Tensor] | None,  # cos and sin, (B, 1, Dh/2)
    tables: Tensor,  # (B, W) int32
    positions: Tensor,  # (B,) int
) -> Tensor:  # (B, H, Dh), q as attention takes it
    """Keys and values of a layer go to their pages."""
    out, (n, heads, dim) = torch.empty_like(q), q.shape
    q_norm, k_norm, eps = norms or (q, k, 0.0)
    cos, sin = rotation or (q, q)
    with launch_device(q):
        place_heads[(n, heads + cache.kv_heads)](
            q, k, v, q_norm, k_norm, cos, sin, out, cache.address, tables, positions,
            cache.layer(layer), tables.stride(0), eps, heads, **cache.constants,
            BLOCK=triton.next_power_of_2(dim // 2), NORM=norms is not None,
            ROPE=rotation is not None, WIDE=INTERPRETED, num_warps=1,
        )  # fmt: skip
    return out
