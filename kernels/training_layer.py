"""Triton: the work between a decoder layer's GEMMs in training, forward and backward.

Bytes moved per 16-bit number of the result, in place of those of PyTorch's elementwise kernels:

    swiglu       silu(gate) up                  6, not 10    backward 10, not 18, for both inputs
    rotate       rope(q), rope(k)               4, not 18    backward  4, not 20
    copy_keys    the keys that segments share   4            backward: each copy is read once

Each is one launch. Forward passes round where the model rounds. Backward passes compute in fp32 and
round once. RoPE's backward pass is a rotation by the negative angle, and rounds like its forward
pass. There are no atomic additions, so results do not depend on the order of programs.
"""

# Pyright checks Triton's functions as if they were Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor

from expo_fast.kernels.layer import swiglu
from expo_fast.kernels.triton_common import (
    launch_device,
    load_fp32,
    rounded_like,
    store_rounded,
)

__all__ = ["copy_keys", "rotate", "sum_copies", "swiglu", "swiglu_gradients"]

ELEMENTS = 1024  # of each tensor per program: 8 per thread, which are 16 bytes
UNFUSED = {"enable_fp_fusion": False}  # because an FMA does not round its product
TOGETHER = 4  # number of copies of a token that are loaded at the same time


@triton.jit
def swiglu_gradient_elements(
    gate, up, d_out,  # (n,) each
    d_gate, d_up,  # (n,) each, out
    n, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradients of gate and up. One program per BLOCK elements."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    g = load_fp32(gate + i, inside)
    d = load_fp32(d_out + i, inside)
    sigmoid = 1 / (1 + tl.exp(-g))
    d_silu = d * load_fp32(up + i, inside)
    store_rounded(d_gate + i, d_silu * sigmoid * (1 + g * (1 - sigmoid)), inside)
    store_rounded(d_up + i, d * g * sigmoid, inside)


@triton.jit
def _rotate_tile(
    x, cos, sin, out,  # (N, HEADS, 2 HALF), (N, HALF) twice, out like x
    tile, N,
    HEADS: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate ROWS heads."""
    row = tile * ROWS + tl.arange(0, ROWS)  # rows of (N HEADS, 2 HALF)
    i = tl.arange(0, BLOCK)[None, :]
    inside = (row < N * HEADS)[:, None] & (i < HALF)
    angle = (row // HEADS)[:, None] * HALF + i
    at = row.to(tl.int64)[:, None] * (2 * HALF) + i
    a = load_fp32(x + at, inside)
    b = load_fp32(x + at + HALF, inside)
    c = load_fp32(cos + angle, inside)
    s = load_fp32(sin + angle, inside)
    if INVERSE:
        s = -s
    ac = rounded_like(a * c, x)
    bs = rounded_like(b * s, x)
    bc = rounded_like(b * c, x)
    as_ = rounded_like(a * s, x)
    store_rounded(out + at, ac - bs, inside)
    store_rounded(out + at + HALF, bc + as_, inside)


@triton.jit(do_not_specialize=["N"])
def rotate_heads(
    q, k, cos, sin,  # (N, H, 2 HALF), (N, HKV, 2 HALF), (N, HALF) twice
    q_out, k_out,  # like q and k
    N,
    H: tl.constexpr, HKV: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate all heads. One program per ROWS heads: first the heads of q, then those of k."""
    tile = tl.program_id(0)
    q_tiles = tl.cdiv(N * H, ROWS)
    if tile < q_tiles:
        _rotate_tile(q, cos, sin, q_out, tile, N, H, HALF, INVERSE, ROWS, BLOCK)
    else:
        tile -= q_tiles
        _rotate_tile(k, cos, sin, k_out, tile, N, HKV, HALF, INVERSE, ROWS, BLOCK)


@triton.jit(do_not_specialize=["N"])
def copy_key_rows(
    k, v, rows,  # (tokens, WIDTH) twice, (N,) int32
    k_out, v_out,  # (N, WIDTH) each
    N, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy rows of k and v. One program per ROWS copies and BLOCK columns."""
    copy = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    exists = copy < N
    inside = exists[:, None] & (i < WIDTH)
    token = tl.load(rows + copy, exists, 0).to(tl.int64)
    source = token[:, None] * WIDTH + i
    at = copy.to(tl.int64)[:, None] * WIDTH + i
    tl.store(k_out + at, tl.load(k + source, inside), inside)
    tl.store(v_out + at, tl.load(v + source, inside), inside)


@triton.jit(do_not_specialize=["N"])
def sum_key_copies(
    d_k, d_v,  # (copies, WIDTH) each
    segments, cu_seqlens, first, begins,  # (N,), (S+1,), (S+1,), (P,) int32: see `fused.Copies`
    k_out, v_out,  # (N, WIDTH) each
    N, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """Add the gradients of a token's copies. One program per ROWS tokens and BLOCK columns."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    exists = token < N
    segment = tl.load(segments + token, exists, 0)
    begin = tl.load(first + segment, exists, 0)
    n_copies = tl.load(first + segment + 1, exists, 0) - begin
    place = token - tl.load(cu_seqlens + segment, exists, 0)
    k_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    v_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for c in range(0, tl.max(n_copies, 0), TOGETHER):
        for j in tl.static_range(TOGETHER):
            more = c + j < n_copies
            copy = tl.load(begins + begin + c + j, more, 0) + place
            at = copy.to(tl.int64)[:, None] * WIDTH + i
            inside = more[:, None] & (i < WIDTH)
            k_sum += load_fp32(d_k + at, inside)
            v_sum += load_fp32(d_v + at, inside)
    at = token.to(tl.int64)[:, None] * WIDTH + i
    inside = exists[:, None] & (i < WIDTH)
    store_rounded(k_out + at, k_sum, inside)
    store_rounded(v_out + at, v_sum, inside)


def swiglu_gradients(gate: Tensor, up: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up, given that of silu(gate) * up.

    All tensors are contiguous and have the same shape.
    """
    d_gate = gate.new_empty(gate.shape)
    d_up = up.new_empty(up.shape)
    n = gate.numel()
    with launch_device(gate):
        swiglu_gradient_elements[(triton.cdiv(n, ELEMENTS),)](
            gate,
            up,
            d_out,
            d_gate,
            d_up,
            n,
            BLOCK=ELEMENTS,
        )
    return d_gate, d_up


def rotate(
    q: Tensor,  # (N, H, Dh), contiguous like all arguments
    k: Tensor,  # (N, Hkv, Dh)
    cos: Tensor,  # (N, 1, Dh/2)
    sin: Tensor,  # (N, 1, Dh/2)
    *,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return q and k rotated by their angles, or by the negative angles if `inverse`."""
    n_tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    q_out = q.new_empty(q.shape)
    k_out = k.new_empty(k.shape)
    tile = heads_tile(heads, kv_heads, head_dim)
    rows = tile["ROWS"]
    tiles = triton.cdiv(n_tokens * heads, rows) + triton.cdiv(n_tokens * kv_heads, rows)
    with launch_device(q):
        rotate_heads[(tiles,)](
            q,
            k,
            cos,
            sin,
            q_out,
            k_out,
            n_tokens,
            **tile,
            INVERSE=inverse,
            **UNFUSED,
        )
    return q_out, k_out


def copy_keys(k: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return k[rows] and v[rows].

    k, v: (N, Hkv, Dh), contiguous. rows: (Nk,) int32.
    """
    n_copies = len(rows)
    shape = (n_copies, *k.shape[1:])
    k_out = k.new_empty(shape)
    v_out = v.new_empty(shape)
    tile = keys_tile(*k.shape[1:])
    with launch_device(k):
        copy_key_rows[_programs(n_copies, tile)](k, v, rows, k_out, v_out, n_copies, **tile)
    return k_out, v_out


def sum_copies(
    d_k: Tensor,  # (Nk, Hkv, Dh), contiguous
    d_v: Tensor,  # (Nk, Hkv, Dh), contiguous
    segments: Tensor,  # (N,) int32; for this and the next three see `fused.Copies`
    cu_seqlens: Tensor,  # (S+1,) int32
    first: Tensor,  # (S+1,) int32
    begins: Tensor,  # (P,) int32
) -> tuple[Tensor, Tensor]:
    """Return the sums of each token's copies, (N, Hkv, Dh) each, added in fp32."""
    n_tokens = len(segments)
    shape = (n_tokens, *d_k.shape[1:])
    k_out = d_k.new_empty(shape)
    v_out = d_v.new_empty(shape)
    tile = keys_tile(*d_k.shape[1:])
    with launch_device(d_k):
        sum_key_copies[_programs(n_tokens, tile)](
            d_k,
            d_v,
            segments,
            cu_seqlens,
            first,
            begins,
            k_out,
            v_out,
            n_tokens,
            **tile,
            TOGETHER=TOGETHER,
        )
    return k_out, v_out


def heads_tile(heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    """Return the constants of `rotate_heads` for q (N, H, Dh) and k (N, Hkv, Dh)."""
    half = head_dim // 2
    block = triton.next_power_of_2(half)
    rows = max(1, ELEMENTS // block)
    return {"H": heads, "HKV": kv_heads, "HALF": half, "ROWS": rows, "BLOCK": block}


def keys_tile(kv_heads: int, head_dim: int) -> dict[str, int]:
    """Return the tile of `copy_key_rows` and `sum_key_copies` for rows of (Hkv, Dh) keys."""
    width = kv_heads * head_dim
    block = min(triton.next_power_of_2(width), ELEMENTS)
    return {"WIDTH": width, "ROWS": ELEMENTS // block, "BLOCK": block}


def _programs(n_rows: int, tile: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(n_rows, tile["ROWS"]), triton.cdiv(tile["WIDTH"], tile["BLOCK"])
