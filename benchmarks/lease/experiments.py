"""Time forms of a decode step's kernels that were tried, beside those in use.

Kernels that exist only for an experiment are in this file. Times are microseconds of a call in a
CUDA graph of many calls.
"""

# Pyright checks Triton's functions as if they were Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.gpu_decode import LAYERS as CACHED_LAYERS
from benchmarks.gpu_decode import LOAD, MODELS, SMOKE, TINY, AttentionCase, Sizes
from benchmarks.gpu_train import SHAPES
from benchmarks.lease.fake_driver import MULTIPROCESSORS
from benchmarks.lease.report import Report
from expo_fast.inference.cuda_engine import uncollected
from expo_fast.inference.sampling import BLOCK
from expo_fast.kernels import blocks, cascade, decode, layer
from expo_fast.kernels.decode import Tile
from expo_fast.kernels.products import wide_product
from expo_fast.kernels.triton_common import LOG2_E

ROWS = 256  # of a decode step
LAYERS = 24  # layers of 0.5B, each with weights of its own
REPEATS = 7
STD = 0.03  # of random weights
BF16 = 2.0**-8  # the largest relative error of a rounding to bf16


def replayed(report: Report, work: Callable[[], object]) -> float:
    """Return the median microseconds of the work in a CUDA graph.

    The graph is replayed three times in succession, and the last two replays are timed.
    In a dry run, do the work once and return 0.
    """
    work()  # compiles the kernels
    if report.dry:
        return 0.0
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with uncollected(), torch.cuda.graph(graph):
        work()
    found = []
    for _ in range(REPEATS):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        graph.replay()
        begin.record()
        graph.replay()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 2 * 1e3)
    return statistics.median(found)


def time_form(
    report: Report, table: str, form: str, work: Callable[[], object], calls: int = 1
) -> bool:
    """Add the microseconds of a call to a table of the report. The work makes `calls` calls.

    Return whether the work ran. A failure does not stop the other forms.
    """
    total = report.attempt(f"{table}, {form}", partial(replayed, report, work))
    if total is None:
        return False
    us = round(total / calls, 2)
    tables = report.found.get("microseconds", {})
    row = tables.get(table, {}) | {form: us}
    report.add(microseconds=tables | {table: row})
    print(f"{table}, {form}: {us:.2f} us", flush=True)
    return True


def show_fastest(report: Report) -> None:
    """Show the fastest form of each table, and raise Mismatch if a form failed."""
    for table, forms in report.found.get("microseconds", {}).items():
        fastest = min(forms, key=lambda form: forms[form])
        report.show(**{table: f"{fastest} {forms[fastest]:.2f} us"})
    report.require_all()


def random_bf16(report: Report, *size: int, std: float = 1.0) -> Tensor:
    """Return normal random numbers."""
    return (torch.randn(*size, device=report.device) * std).bfloat16()


class Branch:
    """A stream beside the current one, which a CUDA graph captures as a branch.

    A dry run has no streams.
    """

    def __init__(self, report: Report):
        self.stream = None if report.dry else torch.cuda.Stream()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Launch the kernels of the block on the branch, after those of the current stream."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """Make the current stream wait for the branch."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)


# step-products

PRODUCTS = {
    "q, k and v, 0.5B": (1152, 896),
    "attention output, 0.5B": (896, 896),
    "gate and up, 0.5B": (9728, 896),
    "down, 0.5B": (896, 4864),
    "q, k and v, 3B": (2560, 2048),
    "attention output, 3B": (2048, 2048),
    "gate and up, 3B": (22016, 2048),
    "down, 3B": (2048, 11008),
}
SMALL_PRODUCTS = {"small": (128, 64)}


@torch.no_grad()
def step_products(report: Report) -> None:
    """Time cuBLAS at the shapes of a step: each call with weights of its own, or all with one."""
    for name, (n, k) in (SMALL_PRODUCTS if report.dry else PRODUCTS).items():
        weights = [random_bf16(report, n, k) for _ in range(LAYERS)]
        for rows in (ROWS, ROWS // 2):
            x = random_bf16(report, rows, k)
            for form, used in (("cold", weights), ("hot", weights[:1] * LAYERS)):
                work = partial(products, x, used)
                time_form(report, name, f"{rows} rows, {form}", work, LAYERS)
    show_fastest(report)


def products(x: Tensor, weights: list[Tensor]) -> Tensor:
    """Multiply x by each weight. Return the last product."""
    y = x
    for weight in weights:
        y = F.linear(x, weight)
    return y


# overlap

CHAIN = 200  # kernels


@triton.jit
def norm_rows(x, out, D, BLOCK: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr):
    """Normalize a row. With EARLY, the next kernel may begin before this one writes."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
    if EARLY:
        gdc_launch_dependents()
    a = tl.load(x + row * D + i, i < D, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(a * a, 0) / D + 1e-6)
    tl.store(out + row * D + i, (a * scale).to(tl.bfloat16), i < D)


@torch.no_grad()
def overlapped(report: Report) -> None:
    """Time programmatic dependent launch in a chain of small kernels, and between products."""
    width = TINY.hidden if report.dry else 896
    x = random_bf16(report, ROWS, width)
    y = torch.empty_like(x)
    weight = random_bf16(report, width, width)

    def norm(source: Tensor, out: Tensor, pdl: bool, early: bool) -> None:
        launch = {"launch_pdl": True} if pdl else {}
        block = triton.next_power_of_2(width)
        norm_rows[(ROWS,)](source, out, width, BLOCK=block, PDL=pdl, EARLY=early, **launch)

    def kernels(pdl: bool, early: bool) -> None:
        for _ in range(CHAIN // 2):
            norm(x, y, pdl, early)
            norm(y, x, pdl, early)

    def pairs(pdl: bool, early: bool) -> None:
        for _ in range(CHAIN // 2):
            torch.mm(x, weight, out=y)
            norm(y, x, pdl, early)

    forms = {
        "plain": (False, False),
        "overlapped": (True, False),
        "overlapped, early": (True, True),
    }
    for form, how in forms.items():
        time_form(report, "kernel", form, partial(kernels, *how), CHAIN)
        time_form(report, "product and kernel", form, partial(pairs, *how), CHAIN // 2)
    show_fastest(report)


# prefetch

PREFETCHING = 64  # programs
LINE = 128  # bytes that an instruction prefetches


@triton.jit
def prefetch_lines(
    weight, n_lines,  # n_lines is a multiple of CHUNK
    CHUNK: tl.constexpr, PROGRAMS: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Prefetch a tensor to L2: each thread one line per iteration."""
    lane = tl.arange(0, CHUNK)
    for first in range(tl.program_id(0) * CHUNK, n_lines, PROGRAMS * CHUNK):
        line = (first + lane).to(tl.int64)
        at = weight.to(tl.pointer_type(tl.int8)) + line * LINE
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """The weights of a layer."""

    qkv: Tensor
    output: Tensor
    gate_up: Tensor
    down: Tensor

    @classmethod
    def random(cls, report: Report, sizes: Sizes) -> "Weights":
        d = sizes.hidden
        columns = d + 2 * sizes.kv_heads * (d // sizes.heads)
        weight = partial(random_bf16, report, std=STD)
        return cls(
            qkv=weight(columns, d),
            output=weight(d, d),
            gate_up=weight(2 * sizes.intermediate, d),
            down=weight(d, sizes.intermediate),
        )


class Chain:
    """Products, attention, norms and SwiGLU of the layers of a decode step."""

    def __init__(self, report: Report, sizes: Sizes):
        load = SMOKE if report.dry else LOAD
        head_dim = sizes.hidden // sizes.heads
        self.sizes = sizes
        self.case = AttentionCase(sizes.heads, sizes.kv_heads, head_dim, load, report.device)
        self.case.plan(decode.rows_together(sizes.heads, sizes.kv_heads))
        self.layers = [Weights.random(report, sizes) for _ in range(sizes.layers)]
        self.norm = torch.ones(sizes.hidden, device=report.device).bfloat16()
        self.x = random_bf16(report, ROWS, sizes.hidden)
        self.branch = Branch(report)

    def run(self, stage: str, wanted: str) -> None:
        """Launch all layers.

        stage: the kernel beside which weights are prefetched: "qkv", "attention" or "" (none).
        wanted: "near": the two products after attention; "all": also `down`; "next": instead of
        that, `down` and the next layer's first product beside the products of the MLP.
        """
        total = self.x
        change = None
        for i, weights in enumerate(self.layers):
            near = [weights.output, weights.gate_up]
            if wanted == "all":
                near.append(weights.down)
            total, normed = layer.add_norm(total, change, self.norm, 1e-6)
            if stage == "qkv":
                self.prefetch(near)
            qkv = F.linear(normed, weights.qkv)
            if stage == "attention":
                self.prefetch(near)
            self.case.run(i % CACHED_LAYERS)
            change = F.linear(qkv[:, : self.sizes.hidden], weights.output)
            total, normed = layer.add_norm(total, change, self.norm, 1e-6)
            gate, up = F.linear(normed, weights.gate_up).split(self.sizes.intermediate, 1)
            activated = layer.swiglu(gate, up)
            if stage and wanted == "next" and i + 1 < len(self.layers):
                self.prefetch([weights.down, self.layers[i + 1].qkv])
            change = F.linear(activated, weights.down)
            if stage:
                self.branch.join()

    def prefetch(self, weights: list[Tensor]) -> None:
        """Prefetch weights on the branch."""
        with self.branch.running():
            for weight in weights:
                prefetch_lines[(PREFETCHING,)](
                    weight,
                    weight.nbytes // LINE,
                    CHUNK=128,
                    PROGRAMS=PREFETCHING,
                    LINE=LINE,
                    num_warps=4,
                )


@torch.no_grad()
def prefetched(report: Report) -> None:
    """Time a layer with a branch of the graph that prefetches weights to L2."""
    chain = Chain(report, TINY if report.dry else MODELS["qwen2.5-0.5b"])
    n = len(chain.layers)
    time_form(report, "layer", "without prefetch", partial(chain.run, "", ""), n)
    for stage in ("attention", "qkv"):
        for wanted in ("near", "all", "next"):
            form = f"beside {stage}, {wanted}"
            time_form(report, "layer", form, partial(chain.run, stage, wanted), n)
    show_fastest(report)


# gate-up, split-k and head-sums


@dataclass(frozen=True)
class Gemm:
    """The tile and launch options of a product, and the kernel's own options."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    splits: int = 1  # parts of the sum over K
    nested: bool = False  # whether the loop over tiles is not flattened
    store: bool = False  # whether logits are stored

    def __str__(self) -> str:
        return (
            f"{self.rows}x{self.columns}x{self.depth}, {self.warps} warps, {self.stages} stages"
            + (f", {self.splits} splits" if self.splits > 1 else "")
            + (", nested" if self.nested else "")
            + (", stores logits" if self.store else "")
        )

    @property
    def sizes(self) -> dict[str, int]:
        return {"BM": self.rows, "BN": self.columns, "BK": self.depth}

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}

    def tiles(self, n_columns: int) -> int:
        """Return the number of tiles of ROWS rows."""
        return triton.cdiv(ROWS, self.rows) * triton.cdiv(n_columns, self.columns)

    def of_rows(self, x: Tensor) -> TensorDescriptor:
        """Return the descriptor of the first factor."""
        return TensorDescriptor.from_tensor(x, [self.rows, self.depth])

    def of_columns(self, weight: Tensor) -> TensorDescriptor:
        """Return the descriptor of the second factor."""
        return TensorDescriptor.from_tensor(weight, [self.columns, self.depth])


@triton.jit
def gate_up_tiles(
    x, w, out,  # descriptors of (M, K), (2 N, K), (M, N) out
    M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write silu(x gate.T) * (x up.T). One program per tile, with two sums."""
    tiles_m = tl.cdiv(M, BM)
    tile = tl.program_id(0)
    m = tile % tiles_m * BM
    n = tile // tiles_m * BN
    gate = tl.zeros([BM, BN], tl.float32)
    up = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        a = x.load([m, k])
        b = w.load([n, k])
        c = w.load([N + n, k])
        gate = tl.dot(a, b.T, gate)
        up = tl.dot(a, c.T, up)
    # rounded where the separate kernels round
    g = gate.to(tl.bfloat16).to(tl.float32)
    silu = (g / (1 + tl.exp(-g))).to(tl.bfloat16).to(tl.float32)
    out.store([m, n], (silu * up.to(tl.bfloat16).to(tl.float32)).to(tl.bfloat16))


MLPS = {"0.5B": (4864, 896), "3B": (11008, 2048)}  # gate's columns, and K
GATE_UP = (Gemm(128, 64, 64, 4, 3), Gemm(256, 64, 64, 8, 4), Gemm(128, 32, 64, 4, 4))


@torch.no_grad()
def gate_up(report: Report) -> None:
    """Time gate, up and SwiGLU as one kernel, beside cuBLAS and `swiglu`."""
    for name, (n, k) in ({"small": (256, 128)} if report.dry else MLPS).items():
        x = random_bf16(report, ROWS, k)
        weights = [random_bf16(report, 2 * n, k, std=STD) for _ in range(LAYERS)]
        out = x.new_empty(ROWS, n)

        def separate(x: Tensor = x, weights: list[Tensor] = weights, n: int = n) -> Tensor:
            activated = x
            for weight in weights:
                activated = layer.swiglu(*F.linear(x, weight).split(n, 1))
            return activated

        time_form(report, name, "cuBLAS and swiglu", separate, LAYERS)
        expected = separate()
        for gemm in GATE_UP:
            work = partial(fused_gate_up, gemm, x, weights, out)
            if time_form(report, name, str(gemm), work, LAYERS):
                report.compare(f"{name}, {gemm}", out, expected, BF16)
    show_fastest(report)


def fused_gate_up(gemm: Gemm, x: Tensor, weights: list[Tensor], out: Tensor) -> None:
    """Launch `gate_up_tiles` for each weight."""
    factor = gemm.of_rows(x)
    written = TensorDescriptor.from_tensor(out, [gemm.rows, gemm.columns])
    n = out.shape[1]
    for weight in weights:
        columns = gemm.of_columns(weight)
        gate_up_tiles[(gemm.tiles(n),)](
            factor, columns, written, ROWS, n, x.shape[1], **gemm.sizes, **gemm.launch
        )


@triton.jit
def partial_tiles(
    x, w, out,  # descriptors of (M, K), (N, K); (SPLITS, M, N) fp32 out
    M, N, K,
    SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write the products of SPLITS parts of K. One program per tile and part."""
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    program = tl.program_id(0)
    m = program % tiles_m * BM
    n = program // tiles_m % tiles_n * BN
    part = program // (tiles_m * tiles_n)
    steps = tl.cdiv(K, BK)
    total = tl.zeros([BM, BN], tl.float32)
    for k in range(steps * part // SPLITS, steps * (part + 1) // SPLITS):
        total = tl.dot(x.load([m, k * BK]), w.load([n, k * BK]).T, total)
    row = m + tl.arange(0, BM)
    column = n + tl.arange(0, BN)
    at = out + (part * M + row).to(tl.int64)[:, None] * N + column[None, :]
    tl.store(at, total, (row < M)[:, None] & (column < N)[None, :])


SPLIT = ("down, 0.5B", "attention output, 0.5B", "q, k and v, 0.5B", "down, 3B")
SPLIT_K = (
    Gemm(64, 64, 128, 4, 4, splits=2),
    Gemm(128, 64, 64, 4, 4, splits=4),
    Gemm(128, 64, 64, 4, 5, splits=2),
)


@torch.no_grad()
def split_k(report: Report) -> None:
    """Time products whose sums are split among programs, without the kernel that adds the parts."""
    shapes = SMALL_PRODUCTS if report.dry else {name: PRODUCTS[name] for name in SPLIT}
    for name, (n, k) in shapes.items():
        x = random_bf16(report, ROWS, k)
        weights = [random_bf16(report, n, k, std=STD) for _ in range(LAYERS)]
        time_form(report, name, "cuBLAS", partial(products, x, weights), LAYERS)
        expected = F.linear(x, weights[-1])
        for gemm in SPLIT_K:
            out = torch.empty(gemm.splits, ROWS, n, device=report.device)
            work = partial(parts, gemm, x, weights, out)
            if time_form(report, name, str(gemm), work, LAYERS):
                report.compare(f"{name}, {gemm}", out.sum(0), expected, BF16)
    show_fastest(report)


def parts(gemm: Gemm, x: Tensor, weights: list[Tensor], out: Tensor) -> None:
    """Launch `partial_tiles` for each weight."""
    factor = gemm.of_rows(x)
    n = out.shape[2]
    for weight in weights:
        partial_tiles[(gemm.tiles(n) * gemm.splits,)](
            factor,
            gemm.of_columns(weight),
            out,
            ROWS,
            n,
            x.shape[1],
            SPLITS=gemm.splits,
            **gemm.sizes,
            **gemm.launch,
        )


@triton.jit
def head_tiles(
    x, w, temperature,  # descriptors of (M, K), (V, K); (M,)
    z_out, block_max, block_sum,  # (M, V) fp32 out, (M, BLOCKS) out
    M, V, K, BLOCKS,
    PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STORE: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Write max and sum of blocks of BN logits, and with STORE the logits."""
    tiles_m = tl.cdiv(M, BM)
    tiles = tiles_m * tl.cdiv(V, BN)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN):
        m = tile % tiles_m * BM
        n = tile // tiles_m * BN
        z = tl.zeros([BM, BN], tl.float32)
        for k in range(0, K, BK):
            z = tl.dot(x.load([m, k]), w.load([n, k]).T, z)
        row = m + tl.arange(0, BM)
        column = n + tl.arange(0, BN)
        if STORE:
            at = z_out + row.to(tl.int64)[:, None] * V + column[None, :]
            tl.store(at, z, (row < M)[:, None] & (column < V)[None, :])
        t = tl.load(temperature + row, row < M, 1.0)
        scaled = tl.where((column < V)[None, :], tl.div_rn(z, t[:, None]), -float("inf"))
        largest = tl.max(scaled, 1)
        anchor = tl.where(largest == -float("inf"), 0.0, largest)
        weight = tl.exp2((scaled - anchor[:, None]) * LOG2_E)
        at_block = row.to(tl.int64) * BLOCKS + n // BN
        tl.store(block_max + at_block, largest, row < M)
        tl.store(block_sum + at_block, tl.sum(weight, 1), row < M)


HEADS = {"0.5B": (151936, 896), "3B": (151936, 2048)}
HEAD_SUMS = (
    Gemm(128, 256, 64, 8, 3),
    Gemm(128, 256, 64, 8, 3, nested=True),
    Gemm(128, 256, 64, 8, 3, nested=True, store=True),
    Gemm(256, 128, 64, 8, 3, store=True),
)


@torch.no_grad()
def head_sums(report: Report) -> None:
    """Time the LM head and `block_sums` as one kernel, beside cuBLAS and `block_sums`."""
    for name, (v, k) in ({"small": (512, 128)} if report.dry else HEADS).items():
        x = random_bf16(report, ROWS, k)
        weight = random_bf16(report, v, k, std=STD)
        temperature = torch.ones(ROWS, device=report.device)

        def separate(x: Tensor = x, w: Tensor = weight, t: Tensor = temperature) -> None:
            blocks.blocks_of(wide_product(x, w.T), t, BLOCK)

        time_form(report, name, "cuBLAS and block_sums", separate)
        time_form(report, name, "cuBLAS", partial(wide_product, x, weight.T))
        expected = wide_product(x, weight.T).double().logsumexp(1)
        for gemm in HEAD_SUMS:
            z = torch.empty(ROWS, v, device=report.device)
            largest = torch.empty(ROWS, triton.cdiv(v, gemm.columns), device=report.device)
            total = torch.empty_like(largest)
            work = partial(head_tiles_of, gemm, x, weight, temperature, z, largest, total)
            if time_form(report, name, str(gemm), work):
                lse = torch.logsumexp(largest.double() + total.double().log(), 1)
                report.compare(f"{name}, {gemm}", lse, expected, 1e-5, worst=True)
    show_fastest(report)


def head_tiles_of(
    gemm: Gemm,
    x: Tensor,
    weight: Tensor,
    temperature: Tensor,
    z: Tensor,
    largest: Tensor,
    total: Tensor,
) -> None:
    """Launch `head_tiles` with one program per multiprocessor of an H100."""
    head_tiles[(MULTIPROCESSORS,)](
        gemm.of_rows(x),
        gemm.of_columns(weight),
        temperature,
        z,
        largest,
        total,
        ROWS,
        len(weight),
        x.shape[1],
        largest.shape[1],
        PROGRAMS=MULTIPROCESSORS,
        STORE=gemm.store,
        FLATTEN=not gemm.nested,
        **gemm.sizes,
        **gemm.launch,
    )


# attention-forms

PIECES = (4, 16)  # pages of an item; 8 are in use
REGISTERS = (128, 96)  # limits per thread
TIGHT_ITEMS = 512  # about as many as the plan has, instead of the most that it may have
# A kernel of items with few queries, and one of items with many
SPLIT_TILES = {
    "2 streams, 4 warps": ((64, 4, 2), (64, 4, 3)),
    "2 streams, 2 warps": ((64, 2, 2), (64, 4, 3)),
}


@triton.jit
def attend_some_items(
    q, address, tables, positions, items, count, top, total, values,  # as in `attend_items`
    layer, scale, window, W, SLOTS,
    STRIDE: tl.constexpr, PAGE: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr,
    FEW: tl.constexpr, MANY: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    FIELDS: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Compute the items with more than FEW queries, or with LARGE=False the others."""
    program = tl.program_id(0)
    item = items + program // HKV * FIELDS
    head = program % HKV
    slab = decode.slab_at(address, q) + layer
    BM: tl.constexpr = MANY if LARGE else FEW
    if program < tl.load(count) * HKV:  # noqa: SIM102 (Triton's `and` loads both)
        if (tl.load(item + 1) * (H // HKV) > FEW) == LARGE:
            decode._attend(
                q, slab, tables, positions, top, total, values, item, head, scale, window, W, SLOTS,
                STRIDE, PAGE, H, HKV, DH, BM, BN, BD,
            )  # fmt: skip


class Skipped:
    """Replaces a kernel, and launches nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **named: None


class WithRegisters:
    """Launches a kernel with a limit of registers per thread, and keeps what the compiler used."""

    def __init__(self, kernel: Any, limit: int):
        self.kernel = kernel
        self.limit = limit
        self.used: dict[str, int] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            compiled = self.kernel[grid](*arguments, **named, maxnreg=self.limit)
            self.used = {"registers": compiled.n_regs, "spills": compiled.n_spills}

        return launch


class OnTwoStreams:
    """Replaces `attend_items`: a kernel for items with few queries, and one beside it for many."""

    def __init__(self, report: Report, few: Tile, many: Tile):
        self.few = few
        self.many = many
        self.branch = Branch(report)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def one(tile: Tile, large: bool, arguments: tuple, named: dict[str, Any]) -> None:
            options = named | {
                "BN": tile.tokens,
                "LARGE": large,
                "num_warps": tile.warps,
                "num_stages": tile.stages,
            }
            attend_some_items[grid](*arguments, **options)

        def launch(*arguments: Any, **named: Any) -> None:
            with self.branch.running():
                one(self.few, False, arguments, named)
            one(self.many, True, arguments, named)
            self.branch.join()

        return launch


@torch.no_grad()
def attention_forms(report: Report, models: list[str]) -> None:
    """Time the attention of a layer, its two kernels alone, and other forms of it."""
    for name in models:
        sizes = TINY if report.dry else SHAPES[name]
        attention_of(report, name, sizes)
    show_fastest(report)


def attention_of(report: Report, name: str, sizes: Sizes) -> None:
    """Time the forms for one model."""

    def time_with(form: str, owner: Any, attribute: str, replacement: Any) -> None:
        with patch.object(owner, attribute, replacement):
            time_form(report, name, form, layers_of(report, sizes), CACHED_LAYERS)

    time_form(report, name, "in use", layers_of(report, sizes), CACHED_LAYERS)
    time_with("attend_items alone", decode, "add_slots", Skipped())
    time_with("add_slots alone", decode, "attend_items", Skipped())
    for limit in REGISTERS:
        limited = WithRegisters(decode.attend_items, limit)
        form = f"{limit} registers"
        time_with(form, decode, "attend_items", limited)
        report.add(compiled=report.found.get("compiled", {}) | {f"{name}, {form}": limited.used})
    for form, (few, many) in SPLIT_TILES.items():
        two = OnTwoStreams(report, Tile(*few), Tile(*many))
        time_with(form, decode, "attend_items", two)
    for pages in PIECES:
        time_with(f"pieces of {pages} pages", cascade.Sizes, "piece", pages)
    time_with("tight grid", cascade.Sizes, "items", TIGHT_ITEMS)


def layers_of(report: Report, sizes: Sizes) -> Callable[[], None]:
    """Return the work of attention in CACHED_LAYERS layers."""
    load = SMOKE if report.dry else LOAD
    head_dim = sizes.hidden // sizes.heads
    case = AttentionCase(sizes.heads, sizes.kv_heads, head_dim, load, report.device)
    case.plan(decode.rows_together(sizes.heads, sizes.kv_heads))

    def run() -> None:
        for index in range(CACHED_LAYERS):
            case.run(index)

    return run
