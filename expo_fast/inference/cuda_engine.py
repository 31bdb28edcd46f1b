"""CUDA decode engine: a decode step is a CUDA graph, replayed `burst` times without a host sync.

What is captured: the launches of one `DecodeStep`, which samples the next token of a number of rows
(ROW_BUCKETS) with tables of a given width. The graph reads the weights where they are, so the
trainer may change them in place, and finds the key-value slab by an address in device memory.

What is replayed: a burst is `burst` replays. Each one feeds the tokens that it samples to the next.

What the host does meanwhile: it reads the tokens of the burst before, and decides which rows have
ended. So that the GPU never waits for that, a burst is started before the one before it is read,
unless no row can go on or a request waits for a free row. Waiting for a burst's copy of its tokens
is the only host sync. Rows are loaded again when sequences were admitted, or when too many rows
have ended. A row that ended continues until then: it writes to page 0 or to pages that nobody else
holds before the next load, and what it samples is not read.

What is kept between calls: the slab is freed after every call, for the trainer to use. The graphs
stay, because capturing them takes about as long as a short call, while the model is made of plain
modules and all of its tensors are where they were. The switches of adapters leave no trace that
could be checked, so graphs of models with adapters end with the call. Hooks are Python code that a
replay would skip: models with hooks launch every step anew, as Triton's interpreter does on a CPU.
"""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expo_fast.inference.engine import Rows
from expo_fast.inference.joined_weights import JoinedWeights
from expo_fast.inference.kv_pages import pages_for
from expo_fast.inference.paged_attention import VarlenPagedAttention
from expo_fast.inference.plain_model import has_hooks, is_plain
from expo_fast.inference.sampling import Drawn
from expo_fast.inference.torch_engine import TorchEngine
from expo_fast.modeling.decoder import Decoder

if TYPE_CHECKING:
    from expo_fast.inference.decode_step import DecodeStep, StepKey

ROW_BUCKETS = (8, 16, 32, 64, 128, 256)  # more rows are rounded up to a multiple of the last
CUDA_PREFILL_TOKENS = 8192  # some 25 ms of launches, which are not captured
MIN_TABLE_WIDTH = 16  # pages; doubled until it is enough
# Loading rows costs the host some 3 ms. Rows that ended cost their reads of the cache.
MAX_ENDED_SHARE = 1 / 8  # of the loaded rows, before rows are loaded again


def supports(model: Decoder) -> bool:
    """Return whether the model has 16 bits and is on a GPU for which triton is installed."""
    if model.device.type != "cuda" or model.dtype.itemsize != 2:
        return False
    return has_triton(model.device)


def has_triton(device: torch.device) -> bool:
    """Return whether Triton runs there; on a CPU it does in its interpreter only."""
    try:
        from expo_fast.kernels.rowwise import INTERPRETED
    except ImportError:
        return False
    return INTERPRETED or device.type == "cuda"


@dataclass(frozen=True)
class Burst:
    """The results of a burst, on their way to the host."""

    both: Tensor  # (burst, token and log-prob, B) fp64
    copied: torch.cuda.Event | None  # None: they are there

    def drawn(self) -> Drawn:
        """Wait for the results and return them."""
        if self.copied is not None:
            self.copied.synchronize()
        tokens, logps = self.both.unbind(1)
        return Drawn(tokens.long(), logps.float())


class CudaEngine(TorchEngine):
    """Decodes with `DecodeStep`; prompts go through PyTorch.

    graphs: whether to capture steps. None: on a GPU, unless the model has hooks.

    Raise ValueError where Triton does not run.
    """

    page = 32
    burst = 8

    def __init__(self, model: Decoder, *, graphs: bool | None = None):
        if not has_triton(model.device):
            raise ValueError(
                "backend='triton' runs on a GPU for which triton is installed, or in triton's "
                f"interpreter (TRITON_INTERPRET=1), not on {model.device} as it is"
            )
        super().__init__(model)
        on_gpu = model.device.type == "cuda"
        if on_gpu:
            self.prefill_tokens = CUDA_PREFILL_TOKENS
        if on_gpu and model.dtype.itemsize == 2:
            self.attention = VarlenPagedAttention
        self.wants_graphs = on_gpu if graphs is None else graphs
        self.slab_address = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.steps: dict[StepKey, DecodeStep] = {}
        self.layout: list[TensorLayout] | None = None  # of the model that the steps were made for
        self.joined: JoinedWeights | None = None  # for plain models
        self.graph_pool: Any = None  # handle of the memory that all graphs share
        self.capture_stream: torch.cuda.Stream | None = None
        self.started: Burst | None = None  # by `decode`, ahead of the call that returns it

    # One call: open, then load and decode, then close

    def open(self, n_pages: int, n_positions: int) -> None:
        model = self.model
        shape = model.shape
        layout = tensor_layout(model)
        if layout is None or layout != self.layout:
            self.forget_steps()
        self.layout = layout
        self._join_weights()
        self.graphs = self.wants_graphs and not has_hooks(model)
        if self.wants_graphs and not self.graphs:
            warnings.warn(
                "decoding without CUDA graphs, which is slower: the model has hooks, or a forward "
                "of its own",
                stacklevel=6,  # the caller of Generator.sample
            )
        # pages come first in memory: then no stride of the kernels depends on their number
        slab = torch.empty(
            (n_pages, len(shape.windows), 2, self.page, shape.kv_heads, shape.head_dim),
            dtype=model.dtype,
            device=model.device,
        )
        self.slab_address.fill_(slab.data_ptr())
        self.slab = slab.permute(1, 2, 0, 3, 4, 5)
        self.head = self.widened_head()
        width = 1 + pages_for(n_positions, self.page)  # the last column is always page 0
        power_of_two = 1 << (width - 1).bit_length()
        self.table_width = max(MIN_TABLE_WIDTH, power_of_two)

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        return self.slab.numel() > 0

    def close(self) -> None:
        super().close()
        self.started = None  # what it still writes comes before any later use of the memory
        if self.layout is None:
            self.forget_steps()

    def _join_weights(self) -> None:
        """Copy the weights that steps of a plain model read."""
        if self.layout is None:
            return
        if self.joined is None:
            self.joined = JoinedWeights(self.model)
        self.joined.refresh()

    def forget_steps(self) -> None:
        """Free the graphs and their memory."""
        self.steps = {}
        self.joined = None
        self.graph_pool = None

    @torch.no_grad()
    def load(self, rows: Rows) -> None:
        assert not self.runs_ahead
        from expo_fast.inference.decode_step import StepKey  # needs triton

        self.n_rows = len(rows.last_tokens)
        truncated = bool(rows.sampling.truncated().any())
        key = StepKey(row_bucket(self.n_rows), self.table_width, truncated)
        if key not in self.steps:
            self.steps[key] = self._new_step(key)
        self.step = self.steps[key]
        self.step.load(rows, self.head)

    def keeps_loaded(self, n_active: int) -> bool:
        if row_bucket(n_active) != row_bucket(self.n_rows):
            return False
        return self.n_rows - n_active <= MAX_ENDED_SHARE * self.n_rows

    @torch.no_grad()
    def decode(self, *, ahead: bool) -> Drawn:
        burst = self.started or self._start_burst()
        self.started = self._start_burst() if ahead else None
        return burst.drawn()

    @property
    def runs_ahead(self) -> bool:
        return self.started is not None

    def _start_burst(self) -> "Burst":
        for _ in range(self.burst):
            self.step.run()
        # into pinned memory, behind the burst on its stream and before the next burst
        drawn = self.step.progress.drawn.to("cpu", non_blocking=True, copy=True)
        copied = None
        if self.model.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self.model.device))
        return Burst(drawn[:, :, : self.n_rows], copied)

    # Steps and their graphs

    def _new_step(self, key: "StepKey") -> "DecodeStep":
        from expo_fast.inference.decode_step import DecodeStep  # needs triton

        step = DecodeStep(
            key,
            self.model,
            self.head,
            self.slab_address,
            page=self.page,
            burst=self.burst,
            joined=self.joined,
        )
        if self.graphs:
            self._capture(step)
        return step

    def _capture(self, step: "DecodeStep") -> None:
        """Give the step a graph of its launches; warn where something cannot be captured.

        The step's rows are still idle, so the launches do no harm.
        """
        main = torch.cuda.current_stream(self.model.device)
        if self.capture_stream is None:
            self.capture_stream = torch.cuda.Stream(self.model.device)
        stream = self.capture_stream
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            step.launch()  # compiles kernels, and sets up libraries on their first use
        main.wait_stream(stream)
        if self.graph_pool is None:
            self.graph_pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with uncollected(), torch.cuda.graph(graph, pool=self.graph_pool, stream=stream):
                step.launch()
        except RuntimeError as error:
            torch.cuda.set_stream(main)  # torch leaves the other one where a capture's end fails
            self.graphs = False
            self.layout = None  # so that the steps end with this call, and the next one tries again
            self.joined = None
            step.joined = None
            reason = str(error).splitlines()[0]
            warnings.warn(
                f"decoding without CUDA graphs, which is slower: {reason}",
                stacklevel=10,  # the caller of Generator.sample
            )
            return
        step.graph = graph


def row_bucket(n: int) -> int:
    """Return the rows of the step that decodes n rows."""
    for size in ROW_BUCKETS:
        if size >= n:
            return size
    largest = ROW_BUCKETS[-1]
    return -(-n // largest) * largest


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause garbage collection: destroying any CUDA graph ends a capture with an error."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True)
class TensorLayout:
    """Where a tensor is and how it lies in memory: what a graph's launches depend on."""

    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def tensor_layout(model: Decoder) -> list[TensorLayout] | None:
    """Return the layout of a model's tensors, or None if a graph depends on more than that."""
    if not is_plain(model):
        return None
    layout = []
    for x in (*model.parameters(), *model.buffers()):
        layout.append(
            TensorLayout(
                address=x.data_ptr(),
                shape=tuple(x.shape),
                stride=x.stride(),
                dtype=x.dtype,
            )
        )
    return layout
