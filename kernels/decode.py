"""Triton: attention of one new token a row over a paged key-value cache.

    out_i = sum_j softmax_j(scale q_i k_j) v_j        j <= position_i, or the last `window` of them

Split-KV with a cascade (flash-decoding, arXiv:2311.01282; Hydragen, arXiv:2402.05099). `cascade`
cuts the rows' pages into items. One program an item and key-value head: the queries of the item's
rows and of the heads that share that key-value head are the rows of one product, (rows G, Dh) @
(Dh, tokens). Each item leaves (max, sum, accumulator) in its rows' slots; a second kernel adds a
row's slots in their order, so that equal inputs give equal bits. Nothing here looks at lengths on
the host: the launches of a batch size are always the same, and a CUDA graph can hold them.

FLOPs 4 H Dh a row and token seen. Bytes 4 Hkv Dh a token, once for the rows of an item; a slot
costs 8 H (Dh + 2) a row, written and read, and mostly stays in L2 (50 MB on an H200). With G = H /
Hkv = 7 rows in a product that is 7 FLOPs a byte, 56 for 8 samples of a prompt, where an H200 does
184 while it moves one: bound by memory. Hence the floor, at 4.3 TB/s and batch 256, 8 samples of
each of 32 prompts of 512 tokens, half of 128 new tokens there:

    shape   a layer: prompts, tails, queries and outputs    floor    of a step's weights and cache
    0.5B    8.4 + 8.4 + 0.9 MB, 24 layers                   99 us    0.43 of 1.42 GB
    3B      16.8 + 16.8 + 2.1 MB, 36 layers                 299 us   1.28 of 7.46 GB

Without the cascade the prompts alone would be 67 and 134 MB a layer.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# (of Triton's functions, which it takes for Python's)

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from expo_fast.kernels.cascade import FIELDS, Sizes
from expo_fast.kernels.rowwise import INTERPRETED, launch_device, to_bf16

FEW, MANY = 16, 64  # rows of a product: the least that mma.sync takes, and that wgmma takes
WIDEST = 256  # head_dim
EVERYTHING = 1 << 30  # a window that no sequence fills


@dataclass(frozen=True)
class Tile:
    """How a program cuts its work."""

    tokens: int  # keys at a time
    warps: int
    stages: int
    few: int = FEW  # rows of the product for items of one row


def tile_for(dtype: torch.dtype, head_dim: int) -> Tile:
    """The largest tile that spills no registers, of those compiled for sm_90.

    fp32 is multiplied on the CUDA cores, which takes more registers a number.
    """
    if head_dim > WIDEST:
        raise ValueError(f"head_dim={head_dim}: decode attention takes at most {WIDEST}")
    if dtype == torch.float32:
        if head_dim <= 64:
            return Tile(tokens=16, warps=8, stages=2)
        return Tile(tokens=16, warps=16, stages=1, few=MANY)
    return Tile(tokens=64 if head_dim <= 128 else 32, warps=4, stages=3)


@dataclass(frozen=True)
class Paged:
    """A slab (pages, layers, 2, page, Hkv, Dh) of keys and values.

    address: (1,) int64, where the slab begins. Kernels read it when they run: a CUDA graph that
    holds them goes on with whatever slab is there, so the memory can be lent out in between. For
    the same reason pages come first, for then no stride depends on how many there are.
    """

    address: Tensor
    layers: int
    page: int  # tokens
    kv_heads: int
    head_dim: int

    def layer(self, index: int) -> int:
        """First number of a page's keys in that layer; their values follow."""
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
    """What to read for whom, as `cascade.plan` says it, and room for what the items find."""

    items: Tensor  # (N, FIELDS) int32; those of no rows do nothing
    used: Tensor  # (B,) int32 slots of each row
    top: Tensor  # (B, slots, H) fp32, bits
    total: Tensor  # (B, slots, H) fp32
    values: Tensor  # (B, slots, H, Dh) fp32

    @classmethod
    def room(cls, sizes: Sizes, heads: int, head_dim: int, device: torch.device) -> "Work":
        shape = (sizes.rows, sizes.slots, heads)
        items = torch.zeros(sizes.items, FIELDS, dtype=torch.int32, device=device)
        used = torch.zeros(sizes.rows, dtype=torch.int32, device=device)
        top, total = (torch.empty(shape, device=device) for _ in range(2))
        return cls(items, used, top, total, torch.empty(*shape, head_dim, device=device))

    def load(self, items: Tensor, used: Tensor) -> None:
        self.items.zero_()
        self.items[: len(items)] = items.to(self.items.device)
        self.used.zero_()
        self.used[: len(used)] = used.to(self.used.device)


def rows_together(heads: int, kv_heads: int) -> int:
    """Rows whose queries fit one product."""
    return max(1, MANY // (heads // kv_heads))


@triton.jit
def append_tokens(
    k, v, address, tables, positions,  # (B, Hkv, Dh) twice, (1,), (B, W), (B,)
    layer, W,
    STRIDE: tl.constexpr, PAGE: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slab = tl.multiple_of(tl.load(address).to(k.dtype), 16)
    position = tl.load(positions + row)
    column = tl.minimum(position // PAGE, W - 1)  # of a row that goes on after its end: page 0
    page = tl.load(tables + row * W + column).to(tl.int64)
    key = slab + page * STRIDE + layer + position % PAGE * (HKV * DH)
    i = tl.arange(0, BLOCK)
    inside = i < HKV * DH
    tl.store(key + i, tl.load(k + row * (HKV * DH) + i, inside), inside)
    tl.store(key + PAGE * HKV * DH + i, tl.load(v + row * (HKV * DH) + i, inside), inside)


@triton.jit
def _attend(
    q, slab, tables, positions, top_out, total_out, values_out, item, head,
    scale, window, W, SLOTS,
    STRIDE: tl.constexpr, PAGE: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One item for one key-value head; the query heads that share it, of BM // G rows."""
    G: tl.constexpr = H // HKV
    first_row, rows = tl.load(item), tl.load(item + 1)
    begin, end, slot = tl.load(item + 2) * PAGE, tl.load(item + 3) * PAGE, tl.load(item + 4)
    m, d = tl.arange(0, BM), tl.arange(0, BD)
    mine, deep = m < rows * G, d < DH
    row, h = (first_row + m // G).to(tl.int64), head * G + m % G
    position = tl.load(positions + row, mine, -1).to(tl.int32)
    newest = tl.max(position, 0)
    oldest = tl.min(tl.where(mine, position, newest), 0) - window + 1  # that any row sees
    end = min(end, newest + 1)
    begin += max(oldest - begin, 0) // BN * BN
    queries = tl.load(
        q + (row * H + h)[:, None] * DH + d[None, :], mine[:, None] & deep[None, :], 0.0
    )
    if WIDE:  # the interpreter multiplies bf16 wrongly
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
        at = slab + (page * STRIDE + token % PAGE * (HKV * DH))[:, None] + d[None, :]
        # never written beyond `end`: 0 times what lies there may be NaN
        inside = there[:, None] & deep[None, :]
        keys = tl.load(at, inside, 0.0)
        values = tl.load(at + PAGE * HKV * DH, inside, 0.0)
        if WIDE:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        s = tl.dot(queries, keys.T, input_precision="ieee") * scale
        ahead = position[:, None] - token[None, :]
        seen = there[None, :] & (ahead >= 0) & (ahead < window)
        s = tl.where(seen, s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)  # of a row that has seen nothing
        p, fade = tl.exp2(s - anchor[:, None]), tl.exp2(top - anchor)
        total = total * fade + tl.sum(p, 1)
        if q.dtype.element_ty == tl.bfloat16:
            p = to_bf16(p, WIDE)
        out = tl.dot(p.to(values.dtype), values, out * fade[:, None], input_precision="ieee")
        top = higher
    place = (row * SLOTS + slot) * H + h
    tl.store(top_out + place, top, mine)
    tl.store(total_out + place, total, mine)
    found = mine & (total != 0)  # NaN too
    tl.store(values_out + place[:, None] * DH + d[None, :], out, found[:, None] & deep[None, :])


@triton.jit
def attend_items(
    q, address, tables, positions, items,  # (B, H, Dh), (1,), (B, W), (B,), (N, FIELDS)
    top, total, values,  # (B, SLOTS, H) twice, (B, SLOTS, H, Dh), out
    layer, scale, window, W, SLOTS,  # scale times log2(e)
    STRIDE: tl.constexpr, PAGE: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr,
    FEW: tl.constexpr, MANY: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    FIELDS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One launch for items of one row and of many: the many are few, and leave SMs to the rest."""
    item, head = items + tl.program_id(0) * FIELDS, tl.program_id(1)
    rows = tl.load(item + 1)
    slab = tl.multiple_of(tl.load(address).to(q.dtype), 16) + layer
    if rows * (H // HKV) > FEW:
        _attend(
            q, slab, tables, positions, top, total, values, item, head, scale, window, W, SLOTS,
            STRIDE, PAGE, H, HKV, DH, MANY, BN, BD, WIDE,
        )  # fmt: skip
    elif rows > 0:
        _attend(
            q, slab, tables, positions, top, total, values, item, head, scale, window, W, SLOTS,
            STRIDE, PAGE, H, HKV, DH, FEW, BN, BD, WIDE,
        )  # fmt: skip


@triton.jit
def add_slots(
    top, total, values, used, out,  # as above; (B,) int32; (B, H, Dh) out
    SLOTS, DH: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A row that has no slot gets zeros."""
    row, h, H = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    slot, d = tl.arange(0, BS), tl.arange(0, BD)
    place = (row * SLOTS + slot) * H + h
    mine = slot < tl.load(used + row)
    sums = tl.load(total + place, mine, 0.0)
    full = sums != 0  # NaN too
    tops = tl.load(top + place, full, -float("inf"))
    highest = tl.max(tops, 0)
    weight = tl.where(full, tl.exp2(tops - tl.where(full, highest, 0.0)), 0.0)
    inside = full[:, None] & (d < DH)[None, :]
    parts = tl.load(values + place[:, None] * DH + d[None, :], inside, 0.0)
    found = tl.sum(parts * weight[:, None], 0)
    whole = tl.sum(sums * weight, 0)
    found = found / tl.where(whole == 0, 1.0, whole)
    if out.dtype.element_ty == tl.bfloat16:
        found = to_bf16(found, WIDE)
    tl.store(out + (row * H + h) * DH + d, found, d < DH)


def append(
    cache: Paged,
    layer: int,
    k: Tensor,  # (B, Hkv, Dh)
    v: Tensor,  # (B, Hkv, Dh)
    tables: Tensor,  # (B, W) int32
    positions: Tensor,  # (B,) int
) -> None:
    """Keep each row's new key and value at its position."""
    k, v, block = k.contiguous(), v.contiguous(), triton.next_power_of_2(k[0].numel())
    sizes = cache.layer(layer), tables.stride(0)
    with launch_device(k):
        append_tokens[(len(k),)](
            k, v, cache.address, tables, positions, *sizes, **cache.constants, BLOCK=block
        )


def attend(
    cache: Paged,
    layer: int,
    q: Tensor,  # (B, H, Dh) bf16, fp16 or fp32
    tables: Tensor,  # (B, W) int32
    positions: Tensor,  # (B,) int: each row sees its own and those before
    work: Work,
    scale: float,
    window: int | None,
    tile: Tile | None = None,
) -> Tensor:  # (B, H, Dh)
    """Attention of each row's newest token.

    tile: None takes that of `tile_for`. Raises ValueError for a head_dim beyond WIDEST.
    """
    q, (n, heads, dim) = q.contiguous(), q.shape
    assert work.values.shape[0] == n and work.values.shape[2:] == (heads, dim)
    tile = tile or tile_for(q.dtype, dim)
    slots, block = work.top.shape[1], max(16, triton.next_power_of_2(dim))
    found, out = (work.top, work.total, work.values), torch.empty_like(q)
    group = triton.next_power_of_2(heads // cache.kv_heads)
    bits, reach = scale * math.log2(math.e), EVERYTHING if window is None else window
    with launch_device(q):
        attend_items[(len(work.items), cache.kv_heads)](
            q, cache.address, tables, positions, work.items, *found,
            cache.layer(layer), bits, reach, tables.stride(0), slots,
            **cache.constants, H=heads, FEW=max(tile.few, group), MANY=max(MANY, group),
            BN=tile.tokens, BD=block, FIELDS=FIELDS, WIDE=INTERPRETED,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        add_slots[(n, heads)](
            *found, work.used, out, slots,
            DH=dim, BS=triton.next_power_of_2(slots), BD=block, WIDE=INTERPRETED,
        )  # fmt: skip
    return out
