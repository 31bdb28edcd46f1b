"""One decode step on a GPU: the launches that sample the next token of every row.

A step has a fixed number of rows and a fixed table width. It always makes the same launches on the
same buffers, so that a CUDA graph can hold it. On a CPU it runs in Triton's interpreter.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from expo_fast.inference.engine import Rows
from expo_fast.inference.fused_forward import FusedForward
from expo_fast.inference.joined_weights import JoinedWeights
from expo_fast.inference.sampling import BLOCK, Truncation
from expo_fast.kernels import blocks, decode, draw, truncate
from expo_fast.kernels.cascade import Sizes, plan
from expo_fast.kernels.products import wide_product
from expo_fast.modeling.attention import Layer
from expo_fast.modeling.decoder import Decoder


@dataclass(frozen=True)
class StepKey:
    """The values that the launches of a step depend on."""

    rows: int  # B, including idle rows
    table_width: int  # W, pages
    truncated: bool  # whether top-k, top-p or min-p apply to any row


@dataclass
class StepInputs:
    """A step's inputs per row. Idle rows are 0, so they write to page 0 and sample greedily."""

    last_tokens: Tensor  # (B,) int64
    positions: Tensor  # (B,) int64
    tables: Tensor  # (B, W) int32
    seeds: Tensor  # (B,) int64
    temperature: Tensor  # (B,) fp32

    @classmethod
    def allocate(cls, rows: int, table_width: int, device: torch.device) -> "StepInputs":
        zeros = partial(torch.zeros, device=device)
        return cls(
            last_tokens=zeros(rows, dtype=torch.int64),
            positions=zeros(rows, dtype=torch.int64),
            tables=zeros(rows, table_width, dtype=torch.int32),
            seeds=zeros(rows, dtype=torch.int64),
            temperature=zeros(rows, dtype=torch.float32),
        )

    def load(self, rows: Rows) -> None:
        """Copy the rows. The remaining rows become idle."""
        _fill(self.last_tokens, rows.last_tokens)
        _fill(self.positions, rows.positions)
        _fill(self.tables, rows.tables)
        _fill(self.seeds, rows.sampling.seeds)
        _fill(self.temperature, rows.sampling.temperature)


def _fill(buffer: Tensor, values: Tensor) -> None:
    """Copy values to the start of each dimension of a buffer, and fill the rest with zeros."""
    buffer.zero_()
    beginning = tuple(slice(n) for n in values.shape)
    buffer[beginning].copy_(values)


class DecodeStep:
    """Sample the next token of up to `key.rows` rows with each call of `run`.

    head: (D, V), the LM head in the layout that `wide_product` needs.
    cache: the key-value cache.
    burst: number of steps whose results are kept until the host reads them.
    joined: weights to run the model's plain modules with, and with fused kernels between GEMMs.
    None: call `model.run`, which runs the model's adapters and hooks.

    A step has no reference to its engine. The garbage collector frees a reference cycle at any
    time, and freeing a graph during another graph's capture would make that capture fail.
    """

    def __init__(
        self,
        key: StepKey,
        model: Decoder,
        head: Tensor,
        cache: decode.Paged,
        *,
        burst: int,
        joined: JoinedWeights | None,
    ):
        shape = model.shape
        device = model.device
        self.key = key
        self.model = model
        self.head = head
        self.joined = joined
        self.graph: torch.cuda.CUDAGraph | None = None  # holds the launches of `launch`
        n = key.rows
        zeros = partial(torch.zeros, device=device)
        self.inputs = StepInputs.allocate(n, key.table_width, device)
        self.rules = Truncation(  # initially excludes no token
            top_k=zeros(n, dtype=torch.int64),
            top_p=torch.ones(n, dtype=torch.float32, device=device),
            min_p=zeros(n, dtype=torch.float32),
        )
        self.cache = cache
        self.sizes = Sizes(n, key.table_width)
        self.work = decode.Work.allocate(self.sizes, shape.heads, shape.head_dim, device)
        self.rows_per_item = decode.rows_together(shape.heads, shape.kv_heads)
        inputs = self.inputs
        self.progress = draw.Progress.start(inputs.last_tokens, inputs.positions, burst)

    def load(self, rows: Rows, head: Tensor) -> None:
        """Set the rows that `run` continues."""
        self.head = head
        self.inputs.load(rows)
        items, used = plan(rows.tables, self.sizes, self.rows_per_item)
        self.work.load(items, used)
        self.progress.index.zero_()  # it is not 0 if an earlier burst was interrupted
        if self.key.truncated:
            rules = rows.sampling.truncation
            n = len(rules.top_k)
            self.rules.top_k[:n].copy_(rules.top_k)
            self.rules.top_p[:n].copy_(rules.top_p)
            self.rules.min_p[:n].copy_(rules.min_p)

    def run(self) -> None:
        """Sample the next token of every row."""
        if self.graph is None:
            self.launch()
        else:
            self.graph.replay()

    def launch(self) -> None:
        """Launch the kernels of the step one by one."""
        inputs = self.inputs
        if self.joined is not None:
            forward = FusedForward(
                model=self.model,
                joined=self.joined,
                cache=self.cache,
                tokens=inputs.last_tokens,
                positions=inputs.positions,
                tables=inputs.tables,
                attend=self._attend,
            )
            hidden = forward.hidden()
        else:
            attend = self._append_and_attend
            hidden = self.model.run(inputs.last_tokens, inputs.positions, attend)
        self._draw(hidden.to(self.model.dtype))

    def _draw(self, hidden: Tensor) -> None:
        """Draw the next tokens and record them in `progress`."""
        inputs = self.inputs
        temperature = inputs.temperature
        logits = wide_product(hidden, self.head)
        found = blocks.blocks_of(logits, temperature, BLOCK)
        truncated = self.key.truncated
        sampled = draw.sample_rows(
            logits,
            *found,
            BLOCK,
            temperature,
            inputs.seeds,
            self.progress,
            record=not truncated,
        )
        if not truncated:
            return
        truncate.redraw(
            logits,
            *found,
            BLOCK,
            temperature,
            sampled.u,
            top_k=self.rules.top_k,
            top_p=self.rules.top_p,
            min_p=self.rules.min_p,
            tokens=sampled.tokens,
            logps=sampled.logps,
        )
        draw.record(sampled, self.progress)

    # Through `model.run`

    def _append_and_attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inputs = self.inputs
        decode.append(self.cache, layer.index, k, v, inputs.tables, inputs.positions)
        return self._attend(layer, q)

    def _attend(self, layer: Layer, q: Tensor) -> Tensor:
        return decode.attend(
            self.cache,
            layer.index,
            q,
            self.inputs.tables,
            self.inputs.positions,
            self.work,
            layer.scale,
            layer.window,
        )
