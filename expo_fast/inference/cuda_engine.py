"""CUDA decode engine: a decode step is a CUDA graph, replayed `burst` times without a host sync.

Capture: a graph holds the launches of one `DecodeStep`, which samples the next token of a number of
rows (ROW_BUCKETS) with page tables of a given width. The graph reads the model's weight tensors, so
the trainer may change them in place. It reads the address of the key-value slab from device memory.

Replay: a burst is `burst` replays. Each replay passes the tokens that it samples to the next one.

Host: during a burst, the host reads the tokens of the previous burst and decides which rows have
ended. A burst is started before the previous one is read, so that the GPU does not wait. The
exceptions are that no row can continue, or that a request waits for a free row. The only host sync
is the wait for a burst's copy of its tokens. Rows are loaded again after sequences were admitted,
or when too many rows have ended. Until then, an ended row continues. It writes to page 0 or to
pages without another owner before the next load, and its samples are not read. A call uses the
stream that is current when it begins, also if its consumer changes the stream between two results.

Between calls: the slab is freed after every call, so that the trainer can use its memory. Graphs
are kept, because capturing them takes about as long as a short call. They are valid while the model
consists of plain modules and its tensors stay in place. Switching adapters on or off cannot be
detected, so graphs of models with adapters are freed with the call. Hooks are Python code, which a
replay would skip. Models with hooks therefore launch every step without a graph, as does Triton's
interpreter on a CPU.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expo_fast.inference import joined_weights
from expo_fast.inference.engine import Rows, Tokens
from expo_fast.inference.joined_weights import JoinedWeights
from expo_fast.inference.kv_pages import pages_for
from expo_fast.inference.paged_attention import VarlenPagedAttention
from expo_fast.inference.plain_model import is_plain
from expo_fast.inference.sampling import SampledTokens
from expo_fast.inference.torch_engine import TorchEngine
from expo_fast.kernels.integers import round_up
from expo_fast.modeling.attention import varlen_runs
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.hooks import has_hooks
from expo_fast.runtime.caller_warnings import warn_caller

if TYPE_CHECKING:
    from expo_fast.inference.decode_step import DecodeStep, StepKey
    from expo_fast.kernels.decode import Paged

ROW_BUCKETS = (8, 16, 32, 64, 128, 256)  # larger numbers are rounded up to a multiple of the last
# Prompt tokens in one forward pass. Its launches are not captured, and take the host longer than
# the GPU takes for a few thousand tokens. A larger number needs more memory: gate, up and their
# product take 2.2 GB for a 3B model, and each layer copies the keys and values that a batch sees.
CUDA_PREFILL_TOKENS = 32768
MIN_TABLE_WIDTH = 16  # pages; doubled until it suffices
# Keys of several prompts in one forward pass. Each layer copies those that a prompt sees, also if
# prompts share them: 0.5 GB for a model of 8 key-value heads of 128.
CUDA_PREFILL_KEYS = 131072
# Fraction of ended rows above which rows are loaded again. A load costs the host about 3 ms. An
# ended row still reads its part of the cache in every step.
MAX_ENDED_FRACTION = 1 / 8


def supports(model: Decoder) -> bool:
    """Return whether the model is 16-bit and on a GPU that triton is installed for."""
    if model.device.type != "cuda" or model.dtype.itemsize != 2:
        return False
    return has_triton(model.device)


def has_triton(device: torch.device) -> bool:
    """Return whether Triton runs on a device. On a CPU it runs only in its interpreter."""
    try:
        from expo_fast.kernels.triton_common import INTERPRETED
    except ImportError:
        return False
    return device.type == "cuda" or bool(INTERPRETED)


@dataclass(frozen=True)
class Burst:
    """The results of a burst, which are being copied to the host."""

    both: Tensor  # (burst, token and log-prob, B) fp64
    copied: torch.cuda.Event | None  # None: they are on the host

    def wait_on_stream(self) -> None:
        """Make the current stream wait for the results."""
        if self.copied is not None:
            self.copied.wait()

    def result(self) -> SampledTokens:
        """Wait for the results and return them."""
        if self.copied is not None:
            self.copied.synchronize()
        tokens, logps = self.both.unbind(1)
        return SampledTokens(tokens.long(), logps.float())


class CudaEngine(TorchEngine):
    """Decode with `DecodeStep`. On a GPU, prompts of plain models run through the same kernels.

    graphs: whether to capture steps. None: only on a GPU, for a model without hooks.

    Raise ValueError if Triton does not run on the model's device.
    """

    page = 32
    burst = 8

    def __init__(self, model: Decoder, *, graphs: bool | None = None):
        if not has_triton(model.device):
            raise ValueError(
                f"backend='triton' does not run on {model.device}: it needs a GPU and triton, or "
                "triton's interpreter (TRITON_INTERPRET=1)"
            )
        super().__init__(model)
        if not joined_weights.supports(model.shape):
            warn_caller(
                f"decoding {model.stored_config.model_type} with PyTorch's operations between "
                "products, which is slower: the fused kernels compute layers like Llama's"
            )
        on_gpu = model.device.type == "cuda"
        if on_gpu:
            self.prefill_tokens = CUDA_PREFILL_TOKENS
            self.prefill_keys = CUDA_PREFILL_KEYS
        if varlen_runs(model.device, model.dtype, model.shape.head_dim):
            self.attention = VarlenPagedAttention
        self.fuses_prompts = on_gpu  # many programs are slow in the interpreter
        self.wants_graphs = on_gpu if graphs is None else graphs
        self.graphs = self.wants_graphs  # whether the running call captures its steps
        self.table_width = MIN_TABLE_WIDTH  # pages, of the steps of the running call
        self.stream: torch.cuda.Stream | None = None  # of the call; None on a CPU
        with self.own_modes():
            self.slab_address = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.steps: dict[StepKey, DecodeStep] = {}
        self.layout: list[TensorLayout] | None = None  # of the model when the steps were made
        self.joined: JoinedWeights | None = None  # for plain models
        self.graph_pool: Any = None  # handle of the memory pool that all graphs share
        self.capture_stream: torch.cuda.Stream | None = None
        self._step: DecodeStep | None = None  # of the loaded rows
        self.n_rows = 0  # loaded, without the idle rows of the step
        self.started: Burst | None = None  # a burst that the next call of `decode` returns
        self.unread: Burst | None = None  # a burst that was started before the last `close`

    # One call: open, then load and decode, then close

    @contextmanager
    def own_modes(self) -> Iterator[None]:
        with super().own_modes():
            if self.model.device.type == "cuda" and not self.busy:
                self.stream = torch.cuda.current_stream(self.model.device)
            with torch.cuda.stream(self.stream):
                yield

    def open(self, n_pages: int, n_positions: int) -> None:
        if self.unread is not None:
            self.unread.wait_on_stream()
            self.unread = None
        model = self.model
        shape = model.shape
        layout = tensor_layout(model)
        if layout is None or layout != self.layout:
            self.forget_steps()
        self.layout = layout
        self._join_weights()
        hooked = layout is None and has_hooks(model.modules())  # a plain model has none
        self.graphs = self.wants_graphs and not hooked
        if self.wants_graphs and not self.graphs:
            warn_caller(
                "decoding without CUDA graphs, which is slower: the model has hooks or a replaced "
                "forward"
            )
        # Pages are the outermost dimension in memory, so no stride depends on their number.
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
        """Whether a call of the generator is running."""
        return self.slab.numel() > 0

    def close(self) -> None:
        super().close()
        # Its writes come before any later use of the memory on the same stream. The next call may
        # use another one, and loads rows into the same buffers.
        self.unread = self.started
        self.started = None
        if self.layout is None:
            self.forget_steps()

    def _join_weights(self) -> None:
        """Copy the current weights that steps of a plain model read.

        Steps of other architectures call `model.run`, in the same CUDA graph.
        """
        if self.layout is None or not joined_weights.supports(self.model.shape):
            return
        if self.joined is None:
            self.joined = JoinedWeights(self.model)
        self.joined.refresh()

    def forget_steps(self) -> None:
        """Free the graphs and their memory."""
        self.steps = {}
        self._step = None  # its graph keeps the memory of all graphs
        self.joined = None
        self.graph_pool = None

    @property
    def cache(self) -> "Paged":
        from expo_fast.kernels.decode import Paged  # needs triton

        shape = self.model.shape
        return Paged(
            address=self.slab_address,
            layers=len(shape.windows),
            page=self.page,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
        )

    @torch.no_grad()
    def run(self, tokens: Tokens) -> Tensor:
        if self.joined is None or not self.fuses_prompts:
            return super().run(tokens)
        from expo_fast.inference.fused_forward import FusedForward  # needs triton

        device = self.model.device
        forward = FusedForward(
            model=self.model,
            joined=self.joined,
            cache=self.cache,
            tokens=tokens.ids.to(device),
            positions=tokens.positions.to(device),
            tables=tokens.tables.to(device),
            attend=self.attention(self.slab, tokens).attend,
        )
        return forward.hidden()

    @torch.no_grad()
    def load(self, rows: Rows) -> None:
        assert not self.runs_ahead
        from expo_fast.inference.decode_step import StepKey  # needs triton

        self.n_rows = len(rows.last_tokens)
        truncated = bool(rows.sampling.truncated().any())
        key = StepKey(row_bucket(self.n_rows), self.table_width, truncated)
        if key not in self.steps:
            self.steps[key] = self._new_step(key)
        self._step = self.steps[key]
        self._step.load(rows, self.head)

    @property
    def step(self) -> "DecodeStep":
        """The step that decodes the loaded rows."""
        assert self._step is not None, "decode before load"
        return self._step

    def keeps_loaded(self, n_active: int) -> bool:
        if row_bucket(n_active) != row_bucket(self.n_rows):
            return False
        return self.n_rows - n_active <= MAX_ENDED_FRACTION * self.n_rows

    @torch.no_grad()
    def decode(self, *, ahead: bool) -> SampledTokens:
        burst = self.started or self._start_burst()
        self.started = self._start_burst() if ahead else None
        return burst.result()

    @property
    def runs_ahead(self) -> bool:
        return self.started is not None

    def _start_burst(self) -> "Burst":
        for _ in range(self.burst):
            self.step.run()
        # Copied into pinned memory, on the same stream: after this burst and before the next one.
        history = self.step.progress.history.to("cpu", non_blocking=True, copy=True)
        copied = None
        if self.model.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self.model.device))
        return Burst(history[:, :, : self.n_rows], copied)

    # Steps and their graphs

    def _new_step(self, key: "StepKey") -> "DecodeStep":
        from expo_fast.inference.decode_step import DecodeStep  # needs triton

        step = DecodeStep(
            key,
            self.model,
            self.head,
            self.cache,
            burst=self.burst,
            joined=self.joined,
        )
        if self.graphs:
            self._capture(step)
        return step

    def _capture(self, step: "DecodeStep") -> None:
        """Capture the step's launches as its graph. Warn if that fails.

        The step's rows are still idle, so the launches change no sequence.
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
            # thread_local: other threads may allocate memory meanwhile, such as a reward model's.
            with (
                uncollected(),
                torch.cuda.graph(
                    graph,
                    pool=self.graph_pool,
                    stream=stream,
                    capture_error_mode="thread_local",
                ),
            ):
                step.launch()
        except RuntimeError as error:
            torch.cuda.set_stream(main)  # a failed capture leaves torch on the other stream
            self.graphs = False
            self.layout = None  # frees the steps with this call, so that the next call tries again
            self.joined = None
            step.joined = None
            reason = str(error).splitlines()[0]
            warn_caller(f"decoding without CUDA graphs, which is slower: {reason}")
            return
        step.graph = graph


def row_bucket(n: int) -> int:
    """Return the number of rows of the step that decodes n rows."""
    for size in ROW_BUCKETS:
        if size >= n:
            return size
    return round_up(n, ROW_BUCKETS[-1])


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause garbage collection, because destroying a CUDA graph makes a capture fail."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True)
class TensorLayout:
    """The address and layout of a tensor, on which a graph's launches depend."""

    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def tensor_layout(model: Decoder) -> list[TensorLayout] | None:
    """Return the layouts of a plain model's tensors, or None if a graph depends on more."""
    modules = list(model.modules())
    if not is_plain(modules):
        return None
    layout = []
    for module in modules:
        for x in (*module._parameters.values(), *module._buffers.values()):
            if x is None:
                continue
            layout.append(
                TensorLayout(
                    address=x.data_ptr(),
                    shape=tuple(x.shape),
                    stride=x.stride(),
                    dtype=x.dtype,
                )
            )
    return layout
