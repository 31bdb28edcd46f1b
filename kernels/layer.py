"""Triton: the work between a decoder layer's GEMMs when one token per row is decoded.

    add_norm    x' = x + d, rms_norm(x') w            8 D bytes per row, 16-bit: 2 in, 2 out
    place       q', k' = rope(norm(q)), rope(norm(k)); k' and v to their page
    swiglu      silu(gate) up
    rotation    cos, sin of position inv_freq, once for all layers

Each is one launch. PyTorch makes 2, 20, 2 and 8. At 256 rows none moves more than a few MB. A
launch in a CUDA graph takes 2 us, the time in which an H200 moves 8 MB. Numbers are rounded where
the model rounds them, so that log-probs equal the trainer's.
"""

# Pyright checks Triton's functions as if they were Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from expo_fast.kernels.decode import Paged, key_of_token
from expo_fast.kernels.triton_common import launch_device, load_fp32, rounded_like, store_rounded

ELEMENTS = 1024  # per program of an elementwise kernel


@triton.jit
def add_norm_rows(
    x, d, w, total, out,  # (B, D), (B, D) or None, (D,), (B, D) out or None, (B, D) out
    D, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add two vectors and normalize the sum. One program per row."""
    at = tl.program_id(0).to(tl.int64) * D
    i = tl.arange(0, BLOCK)
    inside = i < D
    a = load_fp32(x + at + i, inside)
    if d is not None:
        a = rounded_like(a + load_fp32(d + at + i, inside), x)
        store_rounded(total + at + i, a, inside)
    scale = tl.rsqrt(tl.sum(a * a, 0) / D + eps)
    store_rounded(out + at + i, a * scale * load_fp32(w + i, inside), inside)


@triton.jit
def swiglu_elements(
    gate, up, out,  # (B, M) each
    width, gate_row, up_row,  # M, strides of rows
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write silu(gate) * up. One program per row and BLOCK columns."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    g = load_fp32(gate + row * gate_row + i, inside)
    silu = rounded_like(g / (1 + tl.exp(-g)), gate)
    store_rounded(out + row * width + i, silu * load_fp32(up + row * up_row + i, inside), inside)


@triton.jit
def _normed_and_rotated(
    x, w, cos, sin,  # (Dh,), (Dh,), (Dh/2,) twice
    eps, DH, i,
    NORM: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Return the two halves of one head of one row, (BLOCK,) fp32 each."""
    half = DH // 2
    inside = i < half
    a = load_fp32(x + i, inside)
    b = load_fp32(x + half + i, inside)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / DH + eps)
        a = rounded_like(a * scale * load_fp32(w + i, inside), x)
        b = rounded_like(b * scale * load_fp32(w + half + i, inside), x)
    if ROPE:
        c = load_fp32(cos + i, inside)
        s = load_fp32(sin + i, inside)
        ac = rounded_like(a * c, x)
        bs = rounded_like(b * s, x)
        bc = rounded_like(b * c, x)
        as_ = rounded_like(a * s, x)
        a = ac - bs
        b = bc + as_
    return a, b


@triton.jit
def place_heads(
    q, k, v, q_norm, k_norm, cos, sin, out,  # (B, heads, Dh) x 3, (Dh,) x 2, (B, Dh/2) x 2, q' out
    address, tables, positions,  # as in `decode.append_tokens`
    layer, W, eps, H, q_row, k_row, v_row,  # *_row: strides of rows
    STRIDE: tl.constexpr, PAGE: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr,
    BLOCK: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Norm, rotate and place heads. One program per row and head: first of q, then of k and v."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    i = tl.arange(0, BLOCK)
    half = DH // 2
    inside = i < half
    cos += row * half
    sin += row * half
    if head < H:
        q += row * q_row + head * DH
        a, b = _normed_and_rotated(q, q_norm, cos, sin, eps, DH, i, NORM, ROPE)
        at = (row * H + head) * DH
        store_rounded(out + at + i, a, inside)
        store_rounded(out + at + half + i, b, inside)
    else:
        k += row * k_row + (head - H) * DH
        v += row * v_row + (head - H) * DH
        a, b = _normed_and_rotated(k, k_norm, cos, sin, eps, DH, i, NORM, ROPE)
        key = key_of_token(address, tables, positions, row, layer, W, k, STRIDE, PAGE, HKV, DH)
        key += (head - H) * DH
        store_rounded(key + i, a, inside)
        store_rounded(key + half + i, b, inside)
        value = key + PAGE * HKV * DH
        tl.store(value + i, tl.load(v + i, inside), inside)
        tl.store(value + half + i, tl.load(v + half + i, inside), inside)


@triton.jit
def rotation_rows(
    positions, inv_freq, cos, sin,  # (B,), (half,) fp32, (B, half) twice, out
    half, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write cos and sin of a row's angles. One program per row.

    fp64 reduces the angle to a value near 0, where the series are exact to 1e-13. `tl.cos` of a
    large fp32 angle would need local memory for each thread.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < half
    angle = tl.load(positions + row).to(tl.float32) * tl.load(inv_freq + i, inside, 0.0)
    x = angle.to(tl.float64)
    quarter = tl.floor(x * 0.6366197723675814 + 0.5)  # the nearest multiple of pi / 2
    x -= quarter * 1.5707963267948966
    y = x * x
    s = x * (1 - y / 6 * (1 - y / 20 * (1 - y / 42 * (1 - y / 72 * (1 - y / 110 * (1 - y / 156))))))
    c = 1 - y / 2 * (1 - y / 12 * (1 - y / 30 * (1 - y / 56 * (1 - y / 90 * (1 - y / 132)))))
    turn = quarter.to(tl.int64) & 3
    odd = (turn & 1) == 1
    cosine = tl.where((turn == 1) | (turn == 2), -1.0, 1.0) * tl.where(odd, s, c)
    sine = tl.where(turn >= 2, -1.0, 1.0) * tl.where(odd, c, s)
    at = row * half + i
    store_rounded(cos + at, cosine.to(tl.float32) * scale, inside)
    store_rounded(sin + at, sine.to(tl.float32) * scale, inside)


def add_norm(x: Tensor, d: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + d and its RMS norm, (B, D) each.

    x, d: (B, D). d: None means 0.
    weight: (D,), the weight of the norm.
    """
    n_rows, width = x.shape
    out = torch.empty_like(x)
    total = None if d is None else torch.empty_like(x)
    with launch_device(x):
        add_norm_rows[(n_rows,)](
            x,
            d,
            weight,
            total,
            out,
            width,
            eps,
            BLOCK=triton.next_power_of_2(width),
        )
    return x if total is None else total, out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, elementwise.

    gate, up: (B, M). They may be column slices of one tensor.
    """
    n_rows, width = gate.shape
    assert gate.stride(1) == up.stride(1) == 1
    out = gate.new_empty(n_rows, width)
    with launch_device(gate):
        swiglu_elements[(n_rows, triton.cdiv(width, ELEMENTS))](
            gate,
            up,
            out,
            width,
            gate.stride(0),
            up.stride(0),
            BLOCK=ELEMENTS,
        )
    return out


def rotation(
    positions: Tensor, inv_freq: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return RoPE's cos and sin times `scale`, (B, 1, Dh/2) each.

    `Decoder.rotations` returns the same for each set of frequencies.

    positions: (B,) int64.
    inv_freq: (Dh/2,) fp32.
    """
    n_rows = len(positions)
    half = len(inv_freq)
    cos = inv_freq.new_empty(n_rows, 1, half, dtype=dtype)
    sin = torch.empty_like(cos)
    with launch_device(positions):
        rotation_rows[(n_rows,)](
            positions,
            inv_freq,
            cos,
            sin,
            half,
            scale,
            BLOCK=triton.next_power_of_2(half),
            num_warps=1,
        )
    return cos, sin


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of the query and the key heads."""

    q: Tensor  # (Dh,) weight
    k: Tensor  # (Dh,) weight
    eps: float


def place(
    cache: Paged,
    layer: int,
    q: Tensor,  # (B, H, Dh)
    k: Tensor,  # (B, Hkv, Dh)
    v: Tensor,  # (B, Hkv, Dh)
    *,
    norms: HeadNorms | None,
    rotation: tuple[Tensor, Tensor] | None,  # cos and sin, (B, 1, Dh/2)
    tables: Tensor,  # (B, W) int32
    positions: Tensor,  # (B,) int
) -> Tensor:
    """Norm and rotate queries and keys, and write a layer's keys and values to their pages.

    q, k and v may be column slices of one tensor. Only their rows must be contiguous.

    Return the (B, H, Dh) queries for attention.
    """
    n_rows, heads, head_dim = q.shape
    for x in (q, k, v):
        assert x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == head_dim)
    out = q.new_empty(q.shape)
    unused = q  # a pointer that the kernel does not read
    q_norm = k_norm = cos = sin = unused
    eps = 0.0
    if norms is not None:
        q_norm = norms.q
        k_norm = norms.k
        eps = norms.eps
    if rotation is not None:
        cos, sin = rotation
    with launch_device(q):
        place_heads[(n_rows, heads + cache.kv_heads)](
            q,
            k,
            v,
            q_norm,
            k_norm,
            cos,
            sin,
            out,
            cache.address,
            tables,
            positions,
            cache.layer(layer),
            tables.stride(0),
            eps,
            heads,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            **cache.constants,
            BLOCK=triton.next_power_of_2(head_dim // 2),
            NORM=norms is not None,
            ROPE=rotation is not None,
            num_warps=1,
            enable_fp_fusion=False,  # because RoPE's products are rounded before they are added
        )
    return out
