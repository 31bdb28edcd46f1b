"""Decoding on a GPU: a step is a CUDA graph that is replayed some times with nobody looking on.

The host says which rows there are and what they share, reads `burst` tokens of each with one copy,
and decides then who has ended. A row that ends goes on until rows are loaded anew; what it writes
lands on page 0 or on pages that were its own, which are nobody's before that load, and what it
samples is not read.

A graph holds the launches of one step for a number of rows (BUCKETS) and a width of the tables. It
reads the weights where they lie, so the trainer may change them in place, and finds the slab by an
address in device memory. So the slab is given back after every call, for the trainer to use, while
graphs stay: making them takes about as long as a short call. They stay only as long as the model is
made of our own modules, all of its tensors where they were. Of adapters, whose switches leave no
trace that could be checked, graphs end with the call. Hooks are Python that a replay would leave
out: then, as on a CPU in Triton's interpreter, each step is launched anew.
"""

import gc
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from expo_fast.inference.cpu_engine import PLAIN, has_hooks
from expo_fast.inference.engine import PagedAttention, Rows, Tokens, TorchEngine
from expo_fast.inference.sampling import BLOCK, Truncation, draw_from_blocks, uniform
from expo_fast.kernels.cascade import Sizes, plan
from expo_fast.kernels.products import wide_product
from expo_fast.modeling.attention import Layer, varlen_attention
from expo_fast.modeling.decoder import Attend, Block, Decoder, RMSNorm

BUCKETS = (8, 16, 32, 64, 128, 256)  # rows; more are rounded up to a multiple of the last
CUDA_PREFILL = 8192  # tokens of prompts computed together: some 25 ms of launches, if eager
LEAST_WIDTH = 16  # pages of a table, doubled until they are enough


def supports(model: Decoder) -> bool:
    """16-bit models on a GPU for which triton is installed."""
    return model.device.type == "cuda" and model.dtype.itemsize == 2 and has_triton(model.device)


def has_triton(device: torch.device) -> bool:
    """On a CPU: its interpreter."""
    try:
        from expo_fast.kernels.rowwise import INTERPRETED
    except ImportError:
        return False
    return INTERPRETED or device.type == "cuda"


class CudaEngine(TorchEngine):
    """graphs: whether steps are captured; None: on a GPU, unless the model has hooks."""

    page = 32
    burst = 8

    def __init__(self, model: Decoder, *, graphs: bool | None = None):
        if not has_triton(model.device):
            raise ValueError(
                "backend='triton' runs on a GPU for which triton is installed, or in triton's "
                f"interpreter (TRITON_INTERPRET=1), not on {model.device} as it is"
            )
        super().__init__(model)
        self.wants_graphs = model.device.type == "cuda" if graphs is None else graphs
        self.address = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.steps: dict[tuple[int, int, bool], Step] = {}
        self.state: list[tuple[int, ...]] | None = None
        self.pool = self.stream = None  # of all graphs

    def prefill_tokens(self) -> int:
        return CUDA_PREFILL if self.model.device.type == "cuda" else super().prefill_tokens()

    def open(self, n_pages: int, n_positions: int) -> None:
        shape, model = self.model.shape, self.model
        state = _state(model)
        if state is None or state != self.state:
            self.forget()
        self.state = state
        self.graphs = self.wants_graphs and not has_hooks(model)
        if self.wants_graphs and not self.graphs:
            warnings.warn(
                "decoding without CUDA graphs, which is slower: the model has hooks, or a forward "
                "of its own",
                stacklevel=5,
            )
        size = (n_pages, len(shape.windows), 2, self.page, shape.kv_heads, shape.head_dim)
        slab = torch.empty(size, dtype=model.dtype, device=model.device)
        self.address.fill_(slab.data_ptr())
        self.slab = slab.permute(1, 2, 0, 3, 4, 5)
        self.head = self.widened_head()
        needed = 1 + -(-n_positions // self.page)  # the last column is always page 0
        self.width = max(LEAST_WIDTH, 1 << (needed - 1).bit_length())

    @property
    def busy(self) -> bool:
        return self.slab.numel() > 0

    def close(self) -> None:
        super().close()
        if self.state is None:
            self.forget()

    def forget(self) -> None:
        """Graphs and their memory."""
        self.steps, self.pool = {}, None

    def attention(self, tokens: Tokens) -> PagedAttention:
        wide = self.model.device.type == "cuda" and self.model.dtype.itemsize == 2
        return (Varlen if wide else PagedAttention)(self.slab, tokens)

    @torch.no_grad()
    def load(self, rows: Rows) -> None:
        cut = rows.sampling.truncation.active() & (rows.sampling.temperature > 0)
        self.n = len(rows.last)
        key = (bucket(self.n), self.width, bool(cut.any()))
        if key not in self.steps:
            self.steps[key] = Step(self, *key)
        self.step = self.steps[key]
        self.step.load(rows)

    def keeps(self, n: int) -> bool:
        """While up to an eighth has ended, which wastes what those read of the cache: to load all
        anew costs the host some 3 ms.
        """
        return 8 * n >= 7 * self.n and bucket(n) == bucket(self.n)

    @torch.no_grad()
    def decode(self) -> tuple[Tensor, Tensor]:
        for _ in range(self.burst):
            self.step.run()
        tokens, logps = self.step.drawn[:, :, : self.n].cpu().unbind(1)  # here the host waits
        return tokens.long(), logps.float()

    def captured(self, step: "Step") -> "torch.cuda.CUDAGraph | None":
        """The step's launches; None, said aloud, where something in them can't be captured."""
        main = torch.cuda.current_stream(self.model.device)
        side = self.stream = self.stream or torch.cuda.Stream(self.model.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            step.launch()  # compiles, and makes what libraries make on first use
        main.wait_stream(side)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with uncollected(), torch.cuda.graph(graph, pool=self.pool, stream=side):
                step.launch()
        except RuntimeError as why:
            torch.cuda.set_stream(main)  # torch leaves the other where the capture's end fails
            self.graphs, self.state = False, None  # so the next call tries again
            line = str(why).splitlines()[0]
            warnings.warn(f"decoding without CUDA graphs, which is slower: {line}", stacklevel=5)
            return None
        return graph


def bucket(n: int) -> int:
    """Rows of the step for n."""
    return next((b for b in BUCKETS if b >= n), -(-n // BUCKETS[-1]) * BUCKETS[-1])


@contextmanager
def uncollected() -> Iterator[None]:
    """Without garbage collection: to destroy a graph, wherever it comes from, ends a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@dataclass
class _Inputs:
    """Of a step, on its device; a row's own, or what does no harm on rows that are nobody's."""

    last: Tensor  # (B,) int64
    positions: Tensor  # (B,) int64
    tables: Tensor  # (B, W) int32
    seeds: Tensor  # (B,) int64
    temperature: Tensor  # (B,) fp32

    @classmethod
    def idle(cls, size: int, width: int, device: torch.device) -> "_Inputs":
        last, positions, seeds = torch.zeros(3, size, dtype=torch.int64, device=device)
        tables = torch.zeros(size, width, dtype=torch.int32, device=device)
        return cls(last, positions, tables, seeds, torch.zeros(size, device=device))

    def load(self, rows: Rows) -> None:
        n, sampling = len(rows.last), rows.sampling
        given = rows.last, rows.positions, rows.tables, sampling.seeds, sampling.temperature
        for own, x in zip(vars(self).values(), given, strict=True):
            own.zero_()
            (own[:n, : x.shape[1]] if x.ndim == 2 else own[:n]).copy_(x)


class Step:
    """The next token of up to `size` rows. What it reads and writes stays where it is."""

    def __init__(self, engine: CudaEngine, size: int, width: int, truncated: bool):
        from expo_fast.kernels import blocks, decode, layer, truncate

        model, shape, device = engine.model, engine.model.shape, engine.model.device
        # no cycle: a graph that waits for the garbage collector may break another's capture
        self.engine, self.truncated = weakref.proxy(engine), truncated
        self.decode, self.layer, self.blocks, self.truncate = decode, layer, blocks, truncate
        self.sizes = Sizes(size, width)
        self.inputs = _Inputs.idle(size, width, device)
        rules = torch.zeros(size), torch.ones(size), torch.zeros(size)  # which cut nothing
        self.cut = Truncation(rules[0].long(), *rules[1:]).to(device)
        kept = engine.page, shape.kv_heads, shape.head_dim
        self.cache = decode.Paged(engine.address, len(shape.windows), *kept)
        self.work = decode.Work.room(self.sizes, shape.heads, shape.head_dim, device)
        self.together = decode.rows_together(shape.heads, shape.kv_heads)
        # fp64 holds token ids and fp32 exactly, and one copy fetches both
        self.drawn = torch.zeros(engine.burst, 2, size, dtype=torch.float64, device=device)
        self.turn = torch.zeros(1, dtype=torch.int64, device=device)
        self.hidden = torch.empty(size, shape.hidden, dtype=model.dtype, device=device)
        self.graph = engine.captured(self) if engine.graphs else None

    def load(self, rows: Rows) -> None:
        self.inputs.load(rows)
        self.work.load(*plan(rows.tables, self.sizes, self.together))
        self.turn.zero_()  # where a burst was interrupted, it is not 0
        if self.truncated:
            rules = vars(rows.sampling.truncation).values()
            for own, x in zip(vars(self.cut).values(), rules, strict=True):
                own[: len(x)].copy_(x)

    def run(self) -> None:
        if self.graph is None:
            self.launch()
        else:
            self.graph.replay()

    def launch(self) -> None:
        given = self.inputs
        run = self.engine.model.run if self.engine.state is None else self.fused
        self.hidden.copy_(run(given.last, given.positions, self.attend))
        given.positions += 1
        self.draw()

    def draw(self) -> None:
        given = self.inputs
        logits = wide_product(self.hidden, self.engine.head)
        u = uniform(given.seeds, given.positions)
        top, total = self.blocks.blocks_of(logits, given.temperature, BLOCK)
        drawn = token, logp = draw_from_blocks(logits, top, total, given.temperature, u)
        if self.truncated:
            rules = self.cut.top_k, self.cut.top_p, self.cut.min_p
            self.truncate.redraw(logits, top, total, BLOCK, given.temperature, rules, u, *drawn)
        given.last.copy_(token)
        self.drawn.index_copy_(0, self.turn, torch.stack([token.double(), logp.double()])[None])
        self.turn.add_(1).remainder_(len(self.drawn))

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.decode.append(self.cache, layer.index, k, v, self.inputs.tables, self.inputs.positions)
        return self.attended(layer, q)

    def attended(self, layer: Layer, q: Tensor) -> Tensor:
        given = self.inputs.tables, self.inputs.positions, self.work
        return self.decode.attend(self.cache, layer.index, q, *given, layer.scale, layer.window)

    def fused(self, tokens: Tensor, positions: Tensor, _attend: Attend) -> Tensor:
        """`Decoder.run` of our own modules, with one launch between two products."""
        model, d = self.engine.model, None
        x, rotation = model.model.embed_tokens(tokens), model.rotation(positions)
        for block in model.model.layers:
            assert isinstance(block, Block)
            x, d = self.fused_block(block, x, d, rotation)
        return self.layer.add_norm(x, d, model.model.norm.weight, model.model.norm.eps)[1]

    def fused_block(
        self, block: Block, x: Tensor, d: Tensor | None, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """x + d is what comes in, and what the two results add up to what goes out."""
        a, mlp, n = block.self_attn, block.mlp, len(x)
        before, after, norms = block.input_layernorm, block.post_attention_layernorm, None
        if isinstance(a.q_norm, RMSNorm) and isinstance(a.k_norm, RMSNorm):
            norms = a.q_norm.weight, a.k_norm.weight, a.q_norm.eps
        x, h = self.layer.add_norm(x, d, before.weight, before.eps)
        heads = [p(h).view(n, -1, a.head_dim) for p in (a.q_proj, a.k_proj, a.v_proj)]
        turn = rotation if a.rope else None
        where = self.inputs.tables, self.inputs.positions
        q = self.layer.place(self.cache, a.layer.index, *heads, norms, turn, *where)
        o = a.o_proj(self.attended(a.layer, q).view(n, -1))
        x, h = self.layer.add_norm(x, o, after.weight, after.eps)
        return x, mlp.down_proj(self.layer.swiglu(mlp.gate_proj(h), mlp.up_proj(h)))


class Varlen(PagedAttention):
    """All sequences of a prefill in one call a layer."""

    def __init__(self, slab: Tensor, tokens: Tokens):
        super().__init__(slab, tokens)
        ends = torch.tensor([0, *tokens.lengths]).cumsum(0)
        seen = tokens.positions[ends[1:] - 1] + 1
        borders = torch.cat([seen.new_zeros(1), seen.cumsum(0)])
        owner = torch.arange(len(seen)).repeat_interleave(seen)
        place = torch.arange(int(borders[-1])) - borders[owner]
        pages = tokens.tables[ends[1:] - 1].long()[owner, place // self.size]
        self.seen = pages.to(slab.device), (place % self.size).to(slab.device)
        self.queries, self.keys = (x.to(slab.device, torch.int32) for x in (ends, borders))
        self.longest = max(tokens.lengths), int(seen.max())

    def several(self, layer: Layer, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        k, v = keys[self.seen], values[self.seen]
        return varlen_attention(layer, q, k, v, self.queries, self.keys, *self.longest)


def _state(model: Decoder) -> list[tuple[int, ...]] | None:
    """Where a model's tensors lie; None if it has modules of which that does not say enough."""
    if any(type(m) not in PLAIN for m in model.modules()) or has_hooks(model):
        return None
    return [
        (x.data_ptr(), *x.shape, *x.stride(), x.dtype.itemsize)
        for x in (*model.parameters(), *model.buffers())
    ]
