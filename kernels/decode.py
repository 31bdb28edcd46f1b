"""Triton: attention of one new token per row over a paged key-value cache.

    out_i = sum_j softmax_j(scale q_i k_j) v_j        j <= position_i, or the last `window` of these

Split-KV with a cascade (flash-decoding, arXiv:2311.01282; Hydragen, arXiv:2402.05099). `cascade`
splits the rows' pages into items. A program computes one item for one key-value head. The queries
of the item's rows, and of the G = H / Hkv heads that share the key-value head, are the rows of one
product, (rows G, Dh) @ (Dh, tokens). Each item writes (max, sum, accumulator) to its rows' slots. A
second kernel adds a row's slots in their order, so that results are deterministic. The host reads
no lengths: the launches depend only on the batch size, so that a CUDA graph can hold them. The
number of items is read on the device.

FLOPs: 4 H Dh per row and visible token. Bytes: 4 Hkv Dh per token, once for the rows of an item. A
slot has 8 H (Dh + 2) bytes per row, written and read, which mostly stay in L2 (50 MB on an H200).
A product of G = 7 rows does 7 FLOPs per byte, and of 8 samples of a prompt 56 FLOPs per byte. An
H200 can do 184 FLOPs per byte, so the kernel is bound by memory. This gives a lower bound of its
time, here at 4.3 TB/s and batch 256, for 8 samples of each of 32 prompts of 512 tokens, with half
of 128 new tokens in the cache:

    shape   per layer: prompts, tails, queries, outputs     bound    of a step's weights and cache
    0.5B    8.4 + 8.4 + 0.9 MB, 24 layers                   99 us    0.43 of 1.42 GB
    3B      16.8 + 16.8 + 2.1 MB, 36 layers                 299 us   1.28 of 7.46 GB

Without the cascade, the prompts alone would be 67 and 134 MB per layer.
"""

# Pyright checks Triton's functions as if they were Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from expo_fast.kernels.cascade import FIELDS, Sizes
from expo_fast.kernels.triton_common import INTERPRETED, launch_device, to_bf16

FEW = 16  # rows of a product: the minimum of mma.sync
MANY = 64  # rows of a product: the minimum of wgmma
WIDEST = 256  # largest supported head_dim
EVERYTHING = 1 << 30  # a window larger than any sequence


@dataclass(frozen=True)
class Tile:
    """Tile sizes and launch options of `attend_items`."""

    tokens: int  # keys per iteration
    warps: int
    stages: int
    few: int = FEW  # rows of the product for items with few queries


def tile_for(dtype: torch.dtype, head_dim: int) -> Tile:
    """Return the largest tile that spills no registers when it is compiled for sm_90.

    fp32 is multiplied on the CUDA cores, which takes more registers per number. Raise ValueError
    if head_dim exceeds WIDEST.
    """
    if head_dim > WIDEST:
        raise ValueError(f"head_dim={head_dim}: decode attention needs at most {WIDEST}")
    if dtype == torch.float32:
        if head_dim <= 64:
            return Tile(tokens=16, warps=8, stages=2)
        return Tile(tokens=16, warps=16, stages=1, few=MANY)
    return Tile(tokens=64 if head_dim <= 128 else 32, warps=4, stages=3)


@dataclass(frozen=True)
class Paged:
    """A slab (pages, layers, 2, page, Hkv, Dh) of keys and values.

    address: (1,) int64, the address of the slab. Kernels read it when they run, so a CUDA graph
    uses the current slab, and its memory can be freed between calls. Pages are the first dimension
    for the same reason: no stride depends on their number.
    """

    address: Tensor
    layers: int
    page: int  # number of tokens
    kv_heads: int
    head_dim: int

    def layer(self, index: int) -> int:
        """Return the offset of a layer's keys in a page. The layer's values follow them."""
        return index * 2 * self.page * self.kv_heads * self.head_dim

    @property
    def constants(self) -> dict[str, int]:
        return {
            "STRIDE": self.layer(self.layers),
            "PAGE": self.page,
            "HKV": self.kv_heads,
            "DH": self.head_dim,
        }


@dataclass(frozen=True)
class Work:
    """The plan of `cascade.plan` on the device, and buffers for the results of its items."""

    items: Tensor  # (N, FIELDS) int32
    count: Tensor  # (1,) int32, number of items
    used: Tensor  # (B,) int32, number of slots of each row
    top: Tensor  # (B, slots, H) fp32, largest attention score times log2(e)
    total: Tensor  # (B, slots, H) fp32, sum of the weights relative to it
    values: Tensor  # (B, slots, H, Dh) fp32, sum of the weighted values

    @classmethod
    def allocate(cls, sizes: Sizes, heads: int, head_dim: int, device: torch.device) -> "Work":
        """Allocate the buffers of a batch, without items."""
        shape = (sizes.rows, sizes.slots, heads)
        return cls(
            items=torch.zeros(sizes.items, FIELDS, dtype=torch.int32, device=device),
            count=torch.zeros(1, dtype=torch.int32, device=device),
            used=torch.zeros(sizes.rows, dtype=torch.int32, device=device),
            top=torch.empty(shape, dtype=torch.float32, device=device),
            total=torch.empty(shape, dtype=torch.float32, device=device),
            values=torch.empty(*shape, head_dim, dtype=torch.float32, device=device),
        )

    def load(self, items: Tensor, used: Tensor) -> None:
        """Copy a plan to the device."""
        self.items[: len(items)] = items.to(self.items.device)
        self.count.fill_(len(items))
        self.used.zero_()
        self.used[: len(used)] = used.to(self.used.device)


def slot_warps(group: int, block: int) -> int:
    """Return the number of warps of `add_slots`, with 8 numbers of a slot per thread."""
    return min(8, max(1, group * block // 256))


def rows_together(heads: int, kv_heads: int) -> int:
    """Return the number of rows whose queries fit one product."""
    return max(1, MANY // (heads // kv_heads))


@triton.jit
def slab_at(address, like):
    """Return the slab's address as a pointer of the type of `like`."""
    return tl.multiple_of(tl.load(address).to(like.dtype), 16)


@triton.jit
def key_of_token(
    address, tables, positions,  # (1,), (B, W), (B,)
    row, layer, W, like,
    STRIDE: tl.constexpr, PAGE: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr,
):  # fmt: skip
    """Return the pointer to the (Hkv, Dh) keys of a row's newest token.

    The token's values are PAGE * HKV * DH elements later.
    """
    position = tl.load(positions + row)
    column = tl.minimum(position // PAGE, W - 1)  # page 0 if the row continues after its end
    page = tl.load(tables + row * W + column).to(tl.int64)
    return slab_at(address, like) + page * STRIDE + layer + position % PAGE * (HKV * DH)


@triton.jit
def append_tokens(
    k, v, address, tables, positions,  # (B, Hkv, Dh) twice, (1,), (B, W), (B,)
    layer, W,
    STRIDE: tl.constexpr, PAGE: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write each row's new key and value to its page. One program per row."""
    row = tl.program_id(0).to(tl.int64)
    key = key_of_token(address, tables, positions, row, layer, W, k, STRIDE, PAGE, HKV, DH)
    value = key + PAGE * HKV * DH
    i = tl.arange(0, BLOCK)
    inside = i < HKV * DH
    k += row * (HKV * DH)
    v += row * (HKV * DH)
    tl.store(key + i, tl.load(k + i, inside), inside)
    tl.store(value + i, tl.load(v + i, inside), inside)


@triton.jit
def _attend(
    q, slab, tables, positions, top_out, total_out, values_out, item, head,
    scale, window, W, SLOTS,
    STRIDE: tl.constexpr, PAGE: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Compute an item for one key-value head: its G query heads, of at most BM // G rows."""
    G: tl.constexpr = H // HKV
    # the fields of cascade.Item
    first_row = tl.load(item)
    rows = tl.load(item + 1)
    begin = tl.load(item + 2) * PAGE
    end = tl.load(item + 3) * PAGE
    slot = tl.load(item + 4)

    m = tl.arange(0, BM)
    d = tl.arange(0, BD)
    mine = m < rows * G
    deep = d < DH
    row = (first_row + m // G).to(tl.int64)
    h = head * G + m % G
    position = tl.load(positions + row, mine, -1).to(tl.int32)
    newest = tl.max(position, 0)
    oldest = tl.min(tl.where(mine, position, newest), 0) - window + 1  # visible to any row
    end = min(end, newest + 1)
    begin += max(oldest - begin, 0) // BN * BN

    query = q + (row * H + h)[:, None] * DH + d[None, :]
    queries = tl.load(query, mine[:, None] & deep[None, :], 0.0)
    if INTERPRETED:  # because the interpreter multiplies bf16 wrongly
        queries = queries.to(tl.float32)
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, BD], tl.float32)
    tables += first_row.to(tl.int64) * W
    slab += head * DH
    for first in range(begin, end, BN):
        token = first + tl.arange(0, BN)
        there = token < end
        page = tl.load(tables + token // PAGE, there, 0).to(tl.int64)
        key = page * STRIDE + token % PAGE * (HKV * DH)
        at = slab + key[:, None] + d[None, :]
        # Unwritten memory beyond `end` may contain NaN, and 0 * NaN is NaN.
        inside = there[:, None] & deep[None, :]
        keys = tl.load(at, inside, 0.0)
        values = tl.load(at + PAGE * HKV * DH, inside, 0.0)
        if INTERPRETED:
            keys = keys.to(tl.float32)
            values = values.to(tl.float32)
        s = tl.dot(queries, keys.T, input_precision="ieee") * scale
        ahead = position[:, None] - token[None, :]
        seen = there[None, :] & (ahead >= 0) & (ahead < window)
        s = tl.where(seen, s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)  # 0: no visible token so far
        p = tl.exp2(s - anchor[:, None])
        fade = tl.exp2(top - anchor)
        total = total * fade + tl.sum(p, 1)
        if q.dtype.element_ty == tl.bfloat16:
            p = to_bf16(p)
        out = tl.dot(p.to(values.dtype), values, out * fade[:, None], input_precision="ieee")
        top = higher

    place = (row * SLOTS + slot) * H + h
    tl.store(top_out + place, top, mine)
    tl.store(total_out + place, total, mine)
    found = mine & (total != 0)  # true for NaN
    value = values_out + place[:, None] * DH + d[None, :]
    tl.store(value, out, found[:, None] & deep[None, :])


@triton.jit
def attend_items(
    q, address, tables, positions,  # (B, H, Dh), (1,), (B, W), (B,)
    items, count,  # (N, FIELDS), (1,)
    top, total, values,  # (B, SLOTS, H) twice, (B, SLOTS, H, Dh), out
    layer, scale, window, W, SLOTS,  # scale times log2(e)
    STRIDE: tl.constexpr, PAGE: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr,
    FEW: tl.constexpr, MANY: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    FIELDS: tl.constexpr,
):  # fmt: skip
    """Compute all items. One program per key-value head of each of the maximum number of items.

    The number of items changes with each load, but the grid of a CUDA graph does not, so programs
    without an item end at once. Long items start first. One launch computes items of one row and of
    many rows, because the latter are too few to fill the SMs.
    """
    program = tl.program_id(0)
    item = items + program // HKV * FIELDS
    head = program % HKV
    slab = slab_at(address, q) + layer
    if program < tl.load(count) * HKV:
        if tl.load(item + 1) * (H // HKV) > FEW:
            _attend(
                q, slab, tables, positions, top, total, values, item, head, scale, window, W, SLOTS,
                STRIDE, PAGE, H, HKV, DH, MANY, BN, BD,
            )  # fmt: skip
        else:
            _attend(
                q, slab, tables, positions, top, total, values, item, head, scale, window, W, SLOTS,
                STRIDE, PAGE, H, HKV, DH, FEW, BN, BD,
            )  # fmt: skip


@triton.jit
def _load_slot(top, total, values, place, end, mine, d, DH: tl.constexpr):
    """Return max (BG,), sum (BG,) and values (BG, BD) of a slot, or an empty slot from `end` on."""
    there = mine & (place < end)
    inside = there[:, None] & (d < DH)[None, :]
    t = tl.load(top + place, there, -float("inf"))
    s = tl.load(total + place, there, 0.0)
    v = tl.load(values + place[:, None] * DH + d[None, :], inside, 0.0)
    return t, s, v


@triton.jit
def _add_slot(highest, mass, found, t, s, v):
    full = s != 0  # true for NaN; if false, v is left from an earlier step
    higher = tl.where(full, tl.maximum(highest, t), highest)
    anchor = tl.where(higher == -float("inf"), 0.0, higher)
    weight = tl.where(full, tl.exp2(t - anchor), 0.0)
    fade = tl.exp2(highest - anchor)
    v = tl.where(full[:, None], v * weight[:, None], 0.0)
    return higher, mass * fade + s * weight, found * fade[:, None] + v


@triton.jit
def add_slots(
    top, total, values, used, out,  # as above; (B,) int32; (B, H, Dh) out
    SLOTS,
    H: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr,
    BG: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Add a row's slots in their order. One program per row and key-value head.

    A row without slots gets zeros. Four slots are loaded before the first one is added, to overlap
    their latencies. Most rows have at most four.
    """
    row = tl.program_id(0).to(tl.int64)
    G: tl.constexpr = H // HKV
    g = tl.arange(0, BG)
    d = tl.arange(0, BD)
    h = tl.program_id(1) * G + g
    mine = g < G
    n = tl.load(used + row)
    highest = tl.full([BG], -float("inf"), tl.float32)
    mass = tl.zeros([BG], tl.float32)
    found = tl.zeros([BG, BD], tl.float32)
    end = (row * SLOTS + n) * H
    for i in range(0, n, 4):
        place = (row * SLOTS + i) * H + h
        t0, s0, v0 = _load_slot(top, total, values, place, end, mine, d, DH)
        t1, s1, v1 = _load_slot(top, total, values, place + H, end, mine, d, DH)
        t2, s2, v2 = _load_slot(top, total, values, place + 2 * H, end, mine, d, DH)
        t3, s3, v3 = _load_slot(top, total, values, place + 3 * H, end, mine, d, DH)
        highest, mass, found = _add_slot(highest, mass, found, t0, s0, v0)
        highest, mass, found = _add_slot(highest, mass, found, t1, s1, v1)
        highest, mass, found = _add_slot(highest, mass, found, t2, s2, v2)
        highest, mass, found = _add_slot(highest, mass, found, t3, s3, v3)
    found = found / tl.where(mass == 0, 1.0, mass)[:, None]
    if out.dtype.element_ty == tl.bfloat16:
        found = to_bf16(found)
    at = (row * H + h)[:, None] * DH + d[None, :]
    tl.store(out + at, found, mine[:, None] & (d < DH)[None, :])


def append(
    cache: Paged,
    layer: int,
    k: Tensor,  # (B, Hkv, Dh)
    v: Tensor,  # (B, Hkv, Dh)
    tables: Tensor,  # (B, W) int32
    positions: Tensor,  # (B,) int
) -> None:
    """Write each row's new key and value to the page of its position."""
    n_rows, kv_heads, head_dim = k.shape
    with launch_device(k):
        append_tokens[(n_rows,)](
            k.contiguous(),
            v.contiguous(),
            cache.address,
            tables,
            positions,
            cache.layer(layer),
            tables.stride(0),
            **cache.constants,
            BLOCK=triton.next_power_of_2(kv_heads * head_dim),
        )


def attend(
    cache: Paged,
    layer: int,
    q: Tensor,  # (B, H, Dh) bf16, fp16 or fp32
    tables: Tensor,  # (B, W) int32
    positions: Tensor,  # (B,) int; a row attends to tokens up to its position
    work: Work,
    scale: float,
    window: int | None,
    tile: Tile | None = None,
) -> Tensor:  # (B, H, Dh)
    """Return the attention of each row's newest token.

    window: number of visible tokens, including the newest; None: all.
    tile: None selects it with `tile_for`.
    Raise ValueError if head_dim exceeds WIDEST.
    """
    n_rows, heads, head_dim = q.shape
    assert work.values.shape[0] == n_rows
    assert work.values.shape[2:] == (heads, head_dim)
    if tile is None:
        tile = tile_for(q.dtype, head_dim)
    q = q.contiguous()
    out = torch.empty_like(q)
    slots = work.top.shape[1]
    group = triton.next_power_of_2(heads // cache.kv_heads)
    block = max(16, triton.next_power_of_2(head_dim))
    with launch_device(q):
        attend_items[(len(work.items) * cache.kv_heads,)](
            q,
            cache.address,
            tables,
            positions,
            work.items,
            work.count,
            work.top,
            work.total,
            work.values,
            cache.layer(layer),
            scale * math.log2(math.e),
            EVERYTHING if window is None else window,
            tables.stride(0),
            slots,
            **cache.constants,
            H=heads,
            FEW=max(tile.few, group),
            MANY=max(MANY, group),
            BN=tile.tokens,
            BD=block,
            FIELDS=FIELDS,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        add_slots[(n_rows, cache.kv_heads)](
            work.top,
            work.total,
            work.values,
            work.used,
            out,
            slots,
            H=heads,
            HKV=cache.kv_heads,
            DH=head_dim,
            BG=group,
            BD=block,
            num_warps=slot_warps(group, block),
        )
    return out
