"""Triton: a linear head's log-probs and the inputs of its gradients, with logits in registers only.

Rows i of N, columns j of V, u_ij = z_ij - z_iy in nats, y the target:

    e_ij = exp(u_ij), 0 at the target    other_i = sum_j e_ij    moment_i = sum_j e_ij u_ij

u is relative to the target's logit, so no running maximum is needed. Tiles of columns write partial
sums, which are added in a fixed order. If a sum of a row exceeds SAFE_SUM, the row is computed
again relative to its largest logit.

    dz_ij = e_ij (c0_i + c1_i u_ij)    dz_iy has its own formula    (head.logit_grads)

c1 = 0 in every loss without an entropy term. E_iy is then set to dz_iy / c0_i = expm1(logp)
exp(log_total). With that, E is dz up to a factor per row, and the gradients are two GEMMs on E:

    d_hidden = diag(c0) (E @ weight)      d_weight = E.T @ (diag(c0) hidden)

The forward pass has 2NVD FLOPs. Its bytes are weight and hidden once for GROUP row tiles, 2NV of E
if it is stored, and 16 NV / BV of partial sums. That is D FLOPs per byte of E. An H200 can do 184
FLOPs per byte.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# (Pyright checks Triton's functions as if they were Python.)

import math
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from expo_fast.kernels.head import (
    Head,
    LogProb,
    RowGrads,
    logit_grads,
    logit_grads_about_lse,
)
from expo_fast.kernels.integers import round_up
from expo_fast.kernels.row_results import AT_ONCE, ROWS, largest_logits, row_results
from expo_fast.kernels.triton_common import INTERPRETED, launch_device, to_bf16

SHARED_BYTES = 214_040  # of a block, for the largest kernel here: `python -m benchmarks.aot`
SAFE_SUM = 2.0**60  # the target is 41 nats below another logit; squares still fit bf16's exponent
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Config:
    """Tile of a GEMM kernel: BN rows and BV columns, in steps of BD along the inner dimension D."""

    BN: int
    BV: int
    BD: int
    num_warps: int
    num_stages: int
    GROUP: int = 1  # row tiles that share a pass over the weight: 4096 rows of D 2048 stay in L2
    FLATTEN: bool = True  # one loop over tiles and D: loads of the next tile start earlier
    # Options of the forward kernel only:
    MASK_ALL: bool = True  # mask every tile, not only tiles with a target or a column beyond V
    MOMENT: bool = True  # compute the moment; without it the entropy is NaN


# Both tiles need the same number of bytes per FLOP.
_TALL = Config(256, 128, 64, num_warps=8, num_stages=3, GROUP=16)
_WIDE = Config(128, 256, 64, num_warps=8, num_stages=3, GROUP=32)
# In kernels that store E, triton 3.9 spills 24 bytes of "256x128-mask-some" and "128x256", and 48
# bytes of "128x256-mask-some". triton 3.6 spills none. Four stages and a tile of E exceed shared
# memory.
VARIANTS = {
    "256x128": _TALL,
    "256x128-mask-some": replace(_TALL, MASK_ALL=False),
    "128x256": _WIDE,
    "128x256-mask-some": replace(_WIDE, MASK_ALL=False),
    "128x256-nested": replace(_WIDE, FLATTEN=False),
    "128x256-mask-some-nested": replace(_WIDE, MASK_ALL=False, FLATTEN=False),
    "128x256-no-moment": replace(_WIDE, MOMENT=False),
    "128x256-s4": replace(_WIDE, num_stages=4),
}
VARIANT = "EXPO_FAST_VARIANT"  # environment variable with the name of one of VARIANTS
# The fastest measured variant by torch's name of the GPU (benchmarks/RESULTS.md). The default does
# not spill with any version of triton.
BY_CARD = {
    "default": "256x128",
    "NVIDIA H100 80GB HBM3": "128x256-mask-some",
}
ELEMENTS = 2048  # elements of a row per iteration of an elementwise kernel


@triton.jit
def _place(index, N, V, BN: tl.constexpr, BV: tl.constexpr, GROUP: tl.constexpr):
    """Return the first row and column of a tile.

    Consecutive tiles read the same columns of the weight. A group of tiles reads the same rows.
    """
    tiles_n = tl.cdiv(N, BN)
    tiles_v = tl.cdiv(V, BV)
    tiles_of_group = GROUP * tiles_v
    first = index // tiles_of_group * GROUP
    size = min(tiles_n - first, GROUP)
    inside = index % tiles_of_group
    row = (first + inside % size) * BN
    column = inside // size * BV
    return row, column


@triton.jit
def _logits(
    x, w, bias, n, v, V, D,
    BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Return (BN, BV) fp32 logits before temperature. They are 0 beyond N and V."""
    z = tl.zeros([BN, BV], tl.float32)
    for d in range(0, D, BD):
        a = x.load([n, d])
        b = w.load([v, d])
        if INTERPRETED:  # because the interpreter multiplies bf16 wrongly
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        z = tl.dot(a, b.T, z)
    if BIAS:
        column = v + tl.arange(0, BV)
        z += tl.load(bias + column, column < V, 0.0)[None, :]
    return z


@triton.jit
def target_logits(
    x, w, bias, targets, scale,
    out, base,  # (N,) out
    D, sx, sw, BLOCK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Write the targets' logits. One program per row.

    out: logits before temperature. base: logits over temperature, in bits.
    """
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + row)
    total = tl.zeros([BLOCK], tl.float32)
    for d in range(0, D, BLOCK):
        k = d + tl.arange(0, BLOCK)
        a = tl.load(x + row * sx + k, k < D, 0.0).to(tl.float32)
        b = tl.load(w + y * sw + k, k < D, 0.0).to(tl.float32)
        total += a * b
    z = tl.sum(total, 0)
    if BIAS:
        z += tl.load(bias + y)
    tl.store(out + row, z)
    tl.store(base + row, z * tl.load(scale + row))


@triton.jit
def _masked(u, column, y, end):
    """Mask the target and columns from `end` on: exp2(u) and exp2(u) u are 0 there."""
    is_target = column[None, :] == y[:, None]
    is_beyond = (column >= end)[None, :]
    return tl.where(is_target | is_beyond, -1000.0, u)


@triton.jit(do_not_specialize=["N"])
def softmax_sums(
    x, w, e, bias,  # descriptors (N, D), (V, D), (N, V) out or None; (V,) or None
    targets, base, scale,  # (N,) int64; anchor in bits; log2(e) / temperature
    any_again, tile_again,  # (1,), (row tiles,) bool: whether a row tile is computed; None: all are
    other, moment,  # (column tiles, N) out, moment in bits or None
    N, V, D,
    BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, STORE: tl.constexpr, BIAS: tl.constexpr,
    FLATTEN: tl.constexpr, MASK_ALL: tl.constexpr, MOMENT: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    """Write `other`, `moment` and E, tile by tile.

    If LARGEST, write each row's largest z to `other` instead.
    """
    tiles = tl.cdiv(N, BN) * tl.cdiv(V, BV)
    if any_again is not None:
        tiles = tl.where(tl.load(any_again).to(tl.int32) != 0, tiles, 0)
    for index in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN and any_again is None):
        n, v = _place(index, N, V, BN, BV, GROUP)
        if tile_again is None or tl.load(tile_again + n // BN):
            z = _logits(x, w, bias, n, v, V, D, BN, BV, BD, BIAS)
            row = n + tl.arange(0, BN)
            column = tl.arange(0, BV)
            inside = row < N
            y = tl.load(targets + row, inside, 0).to(tl.int32) - v
            s = tl.load(scale + row, inside, 0.0)
            b = tl.load(base + row, inside, 0.0)
            at = (v // BV).to(tl.int64) * N + row
            if LARGEST:
                is_beyond = (column >= V - v)[None, :]
                z = tl.where(is_beyond, -float("inf"), z * s[:, None])
                tl.store(other + at, tl.max(z, 1), inside)
            else:
                u = z * s[:, None] - b[:, None]
                # Masking after exp2 would keep two tiles in registers.
                if MASK_ALL:  # noqa: SIM114 (the compiler selects this branch)
                    u = _masked(u, column, y, V - v)
                elif (tl.max(((y >= 0) & (y < BV)).to(tl.int32), 0) > 0) | (v + BV > V):
                    u = _masked(u, column, y, V - v)
                p = tl.exp2(u)
                if MOMENT:
                    tl.store(moment + at, tl.sum(p * u, 1), inside)
                tl.store(other + at, tl.sum(p, 1), inside)
                if STORE:
                    e.store([n, v], to_bf16(p))


@triton.jit(do_not_specialize=["N"])
def logit_gradients(
    x, w, dz, bias,  # descriptors (N, D), (V, D), (N, V) out; (V,) or None
    targets, scale, base, c0, c1, at_target,  # (N,); base and u in bits
    N, V, D,
    BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, BIAS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Write dz of some columns from the forward results. base is lse, so exp(u_j) is p_j."""
    tiles = tl.cdiv(N, BN) * tl.cdiv(V, BV)
    for index in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN):
        n, v = _place(index, N, V, BN, BV, GROUP)
        z = _logits(x, w, bias, n, v, V, D, BN, BV, BD, BIAS)
        row = n + tl.arange(0, BN)
        column = tl.arange(0, BV)
        inside = row < N
        y = tl.load(targets + row, inside, -1).to(tl.int32) - v
        s = tl.load(scale + row, inside, 0.0)
        b = tl.load(base + row, inside, 0.0)
        a0 = tl.load(c0 + row, inside, 0.0)
        a1 = tl.load(c1 + row, inside, 0.0)
        own = tl.load(at_target + row, inside, 0.0)
        u = z * s[:, None] - b[:, None]
        g = tl.exp2(u) * (a0[:, None] + a1[:, None] * u)
        g = tl.where(column[None, :] == y[:, None], own[:, None], g)
        dz.store([n, v], to_bf16(g))


@triton.jit
def scale_stored(
    e, dz,  # (N, V) in and out, which may be the same tensor
    targets, c0, c1, at_target,  # (N,)
    V, se, sdz,  # strides of rows
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write dz = e (c0 + c1 log e), for losses with an entropy or lse term."""
    blocks = tl.cdiv(V, BLOCK)  # per row
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    column = block * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(e + row * se + column, column < V, 0.0).to(tl.float32)
    y = tl.load(targets + row)
    a0 = tl.load(c0 + row)
    a1 = tl.load(c1 + row)
    own = tl.load(at_target + row)
    u = tl.log2(tl.where(p > 0, p, 1.0))  # in bits, because c1 is per bit
    g = tl.where(column == y, own, p * (a0 + a1 * u))
    tl.store(dz + row * sdz + column, to_bf16(g), column < V)


def config_for(x: Tensor) -> Config:
    """Return the variant named in the environment, or else the one for the GPU of `x`.

    Raise ValueError if the name is not in VARIANTS.
    """
    card = _card(x.device) if x.is_cuda else "default"
    name = os.environ.get(VARIANT) or BY_CARD.get(card, BY_CARD["default"])
    if name not in VARIANTS:
        raise ValueError(f"{VARIANT}={name}: must be one of {', '.join(VARIANTS)}")
    return VARIANTS[name]


@cache
def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def supports(head: Head) -> bool:
    """Return whether the kernels run: bf16 rows that TMA can address, on Hopper or Blackwell.

    GeForce and RTX PRO cards of Blackwell have less shared memory than a tile needs. In the
    interpreter the kernels run on any device.
    """
    hidden = head.hidden
    weight = head.weight
    if hidden.device != weight.device:
        return False
    if not hidden.dtype == weight.dtype == torch.bfloat16:
        return False
    row_stride, column_stride = weight.stride()
    contiguous = column_stride == 1 and row_stride % 8 == 0 and weight.shape[1] % 8 == 0
    if not contiguous or weight.data_ptr() % 16:
        return False
    if INTERPRETED:
        return True
    return _has_tiles(hidden.device)


@cache
def _has_tiles(device: torch.device) -> bool:
    """Return whether a GPU addresses tensors by TMA and has the shared memory of a tile."""
    major, _ = torch.cuda.get_device_capability(device)
    active: Any = driver.active
    shared_bytes = active.utils.get_device_properties(device.index)["max_shared_mem"]
    return major >= 9 and shared_bytes >= SHARED_BYTES


def width_of_e(head: Head) -> int:
    """Return V rounded up to a multiple of 16 bytes of bf16."""
    return round_up(len(head.weight), 8)


def padded_e(head: Head, rows: int) -> Tensor:
    """Return a buffer for E: (rows, padded V) bf16, which is 0 in the padding."""
    e = head.hidden.new_empty(rows, width_of_e(head), dtype=torch.bfloat16)
    e[:, len(head.weight) :] = 0
    return e


def empty_e(head: Head, rows: int) -> Tensor:
    """Return a buffer for E: (rows, V) bf16, a view of a padded buffer."""
    return padded_e(head, rows)[:, : len(head.weight)]


def forward(
    head: Head,
    e: Tensor | None = None,
    config: Config | None = None,
    out: tuple[LogProb, Tensor] | None = None,
) -> tuple[LogProb, Tensor]:
    """Return the results and log_total, (N,) fp64 each.

    e: (N, V) bf16 buffer for E, with the values at the targets that the gradients need.
    config: None selects it with `config_for`.
    out: contiguous memory for the returned tensors.
    """
    if out is None:
        *results, log_total = head.hidden.new_empty(4, len(head.targets), dtype=torch.float64)
        out = LogProb(*results), log_total
    if len(head.targets):
        _Call.of(head, config).fill(*out, e)
    return out


def recomputed(head: Head, results: LogProb, row_grads: RowGrads, first: int, dz: Tensor) -> None:
    """Fill dz (N, S) bf16, the S columns from `first` on, from the forward results."""
    call = _Call.of(head)
    width = dz.shape[1]
    columns = slice(first, first + width)
    base, given = logit_grads_about_lse(results, row_grads, head.temperature, per_nat=LOG2_E)
    sizes = call.n, width, call.d
    with call.device:
        logit_gradients[(call.programs(),)](
            *call.operands(dz, columns), call.targets - first, call.scale, base, *given,
            *sizes, **call.meta(),
        )  # fmt: skip


def from_stored(
    head: Head, e: Tensor, log_total: Tensor, results: LogProb, row_grads: RowGrads, dz: Tensor
) -> None:
    """Fill dz (N, V) bf16, for a loss with a gradient in entropy or lse. dz may be `e`."""
    call = _Call.of(head)
    c0, c1, at_target = logit_grads(results, row_grads, head.temperature, log_total)
    programs = call.n * triton.cdiv(call.v, ELEMENTS)
    with call.device:
        scale_stored[(programs,)](
            e,
            dz,
            call.targets,
            _fp32(c0),
            _fp32(c1 / LOG2_E),
            _fp32(at_target),
            call.v,
            e.stride(0),
            dz.stride(0),
            BLOCK=ELEMENTS,
        )


def _fp32(x: Tensor) -> Tensor:
    return x.float().contiguous()


@dataclass(frozen=True)
class _Call:
    """A head in the layout that the kernels read."""

    hidden: Tensor  # (N, D) contiguous, 16-byte aligned
    weight: Tensor
    bias: Tensor | None  # (V,) fp32
    targets: Tensor  # (N,) int64
    scale: Tensor  # (N,) fp32, log2(e) / temperature
    config: Config

    @classmethod
    def of(cls, head: Head, config: Config | None = None) -> "_Call":
        hidden = head.hidden.contiguous()
        if hidden.data_ptr() % 16:
            hidden = hidden.clone()
        bias = None
        if head.bias is not None:
            # A bias of -inf forbids a token. Its p u must be 0, not 0 * inf.
            bias = _fp32(head.bias).clamp(min=-1e30)
        log2_e = hidden.new_full((len(hidden),), LOG2_E, dtype=torch.float32)
        return cls(
            hidden=hidden,
            weight=head.weight,
            bias=bias,
            targets=head.targets.contiguous(),
            scale=_fp32(log2_e / head.temperature),
            config=config or config_for(head.hidden),
        )

    @property
    def n(self) -> int:
        return self.hidden.shape[0]

    @property
    def v(self) -> int:
        return self.weight.shape[0]

    @property
    def d(self) -> int:
        return self.hidden.shape[1]

    @property
    def device(self) -> AbstractContextManager:
        return launch_device(self.hidden)

    def programs(self) -> int:
        """Return the number of programs that run at the same time."""
        if not self.hidden.is_cuda:
            return 4
        return torch.cuda.get_device_properties(self.hidden.device).multi_processor_count

    def operands(self, out: Tensor | None, columns: slice = slice(None)) -> tuple:
        """Return the kernels' operands: descriptors of hidden, weight columns and output, and bias.

        out: (N, V), or None.
        """
        tile = self.config
        return (
            TensorDescriptor.from_tensor(self.hidden, [tile.BN, tile.BD]),
            TensorDescriptor.from_tensor(self.weight[columns], [tile.BV, tile.BD]),
            out if out is None else TensorDescriptor.from_tensor(out, [tile.BN, tile.BV]),
            self.bias if self.bias is None else self.bias[columns],
        )

    def meta(self) -> dict[str, Any]:
        """Return the keyword arguments of both GEMM kernels."""
        meta = dict(vars(self.config))
        del meta["MASK_ALL"], meta["MOMENT"]  # arguments of the forward kernel only
        meta["PROGRAMS"] = self.programs()
        meta["BIAS"] = self.bias is not None
        return meta

    def target_logits(self) -> tuple[Tensor, Tensor]:
        """Return the targets' logits, and logits over temperature in bits, (N,) fp32 each."""
        out, base = self.scale.new_empty(2, self.n)
        with self.device:
            target_logits[(self.n,)](
                self.hidden,
                self.weight,
                self.bias,
                self.targets,
                self.scale,
                out,
                base,
                self.d,
                self.hidden.stride(0),
                self.weight.stride(0),
                ELEMENTS,
                self.bias is not None,
            )
        return out, base

    def flags(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return whether any row is computed again, which row tiles and which rows: all False.

        Each begins at a multiple of 16 bytes, as Triton compiles another kernel for other places.
        """
        n_tiles = round_up(triton.cdiv(self.n, self.config.BN), 16)
        sizes = [16, n_tiles, self.n]
        flags = torch.zeros(sum(sizes), dtype=torch.bool, device=self.hidden.device)
        any_again, tile_again, row_again = flags.split(sizes)
        return any_again, tile_again, row_again

    def fill(self, results: LogProb, log_total: Tensor, e: Tensor | None) -> None:
        """Write the results, log_total and, if it is given, E.

        There is no host sync: the kernels that compute rows again read on the GPU whether any row
        needs it.
        """
        tile = self.config
        tiles_v = triton.cdiv(self.v, tile.BV)
        z, base = self.target_logits()
        partials = self.scale.new_empty(1 + tile.MOMENT, tiles_v, self.n)
        sums = partials[0], partials[1] if tile.MOMENT else None
        any_again, tile_again, row_again = self.flags()
        operands = self.operands(e)
        meta = self.meta()
        shape = {"N": self.n, "V": self.v, "BV": tile.BV}
        shape |= {"ROWS": ROWS, "AT_ONCE": AT_ONCE}

        def sum_tiles(*, again: bool, largest: bool = False) -> None:
            flags = (any_again, tile_again) if again else (None, None)
            softmax_sums[(self.programs(),)](
                *operands, self.targets, base, self.scale, *flags, *sums,
                self.n, self.v, self.d, STORE=e is not None, MASK_ALL=tile.MASK_ALL,
                MOMENT=tile.MOMENT, LARGEST=largest, **meta,
            )  # fmt: skip

        def finish(redone: bool) -> None:
            row_results[(triton.cdiv(self.n, ROWS),)](
                *sums, z, base, self.scale, self.targets, any_again, tile_again, row_again,
                *results, log_total, e, 0 if e is None else e.stride(0), SAFE_SUM=SAFE_SUM,
                LOG2_E=LOG2_E, REDONE=redone, BN=tile.BN, **shape,
            )  # fmt: skip

        with self.device:
            sum_tiles(again=False)
            finish(redone=False)
            sum_tiles(again=True, largest=True)
            largest_logits[(triton.cdiv(self.n, ROWS),)](
                sums[0], any_again, row_again, base, **shape
            )
            sum_tiles(again=True)
            finish(redone=True)
