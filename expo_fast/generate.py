"""Batched sampling from the trainer's own weight tensors, without a copy of the model.

A row holds one running sequence. While requests wait, a finished sequence is replaced at once.
Requests that may run longest start first. A prefix that prompts have in common (system prompt,
worked examples, or a complete prompt) is computed once, and its sequences share pages of the
key-value (KV) cache. One decode step of B rows reads every weight once: 2 bytes per bf16 parameter
for 2 B FLOPs. At B = 64 a CPU is bound by its GEMM, and no longer by memory.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from expo_fast.inference import cpu_engine, cuda_engine
from expo_fast.inference.engine import Engine
from expo_fast.inference.requests import Completion, Request, check_requests
from expo_fast.inference.scheduler import Scheduler
from expo_fast.inference.stop_rules import StopRules
from expo_fast.inference.torch_engine import TorchEngine
from expo_fast.modeling.decoder import Decoder
from expo_fast.op_backends import dispatch

__all__ = ["Completion", "Generator", "Request"]

MAX_ROWS = 128  # decoded together on a CPU, whose bf16 GEMM gains little from more rows
CUDA_MAX_ROWS = 256  # below about 200 rows an H200 is bound by memory: 2 B FLOPs per weight read
KV_CACHE_BYTES = 2 << 30  # default on a CPU
# Default fraction of a GPU's memory: 28 GB of an H200 hold 256 rows of 3000 tokens of a 3B model.
CUDA_KV_FRACTION = 0.2


class Generator:
    """Sample completions from `model`, whose weights may change in place between calls.

    tokenizer: needed for stop strings only.
    kv_cache_bytes: bound on the size of the KV cache. A small cache runs fewer sequences at a time.
    None: 2 GiB on a CPU, 20% of a GPU's memory.
    batch_invariant: make the tokens and log-probs of a request bit-identical for any other
    requests. The C++ engine always is batch-invariant, for a fixed number of threads. With this
    option its log-probs are also those that the ops compute from `exact_hidden`. The other engines
    run one request at a time instead, slower by about the batch size.
    backend: "native" (C++), "triton" (CUDA graphs of our kernels; on a CPU in Triton's interpreter,
    if TRITON_INTERPRET=1 was set before triton was imported) or "torch". None: the fastest that
    runs the model.
    Raise ValueError for another backend.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        tokenizer: Any = None,
        kv_cache_bytes: int | None = None,
        batch_invariant: bool = False,
        backend: str | None = None,
    ):
        if backend not in (None, "native", "torch", "triton"):
            raise ValueError(f"backend={backend!r}: must be None, 'native', 'torch' or 'triton'")
        if kv_cache_bytes is None:
            kv_cache_bytes = default_kv_cache_bytes(model.device)
        self.model = model
        self.tokenizer = tokenizer
        self.kv_cache_bytes = kv_cache_bytes
        self.batch_invariant = batch_invariant
        self.backend = backend
        self._cuda: cuda_engine.CudaEngine | None = None  # kept for later calls, with its graphs

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """Return one completion for each request, in the same order.

        Raise ValueError, before any sampling, if a request does not fit the model or the KV cache.
        """
        completions: dict[int, Completion] = dict(self.stream(requests))
        return [completions[index] for index in range(len(completions))]

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """Yield (index of the request, completion) in the order in which completions finish.

        Rewards can be computed while other requests are sampled. With `--gather layers`, all ranks
        have to call this and to take all completions, because they sample together.
        Raise ValueError, before any sampling, if a request does not fit the model or the KV cache.
        """
        if isinstance(requests, Request):
            raise ValueError("requests is a single Request: must be a sequence of them")
        requests = list(requests)
        has_tokenizer = self.tokenizer is not None
        check_requests(requests, self.model.shape, has_tokenizer=has_tokenizer)
        with self.model.lockstep():
            if requests:
                yield from self._completions(requests)

    def _completions(self, requests: list[Request]) -> Iterator[tuple[int, Completion]]:
        engine = self.engine()
        batches = [dict(enumerate(requests))]
        if self.batch_invariant and isinstance(engine, TorchEngine):
            batches = [{index: request} for index, request in enumerate(requests)]
        # All are made before any sampling, because each checks that its requests fit the cache.
        schedulers = [self._scheduler(engine, batch) for batch in batches]
        for scheduler in schedulers:
            yield from scheduler.completions()

    def engine(self) -> Engine:
        """Return the engine that the next call uses.

        It is chosen for every call, because adapters and hooks may have been added or removed.
        Unless `backend` names one, it is the first of these that runs the model:

        1. "native" runs plain fp32 and bf16 models on a CPU, and needs a C++ compiler.
        2. "triton" runs 16-bit models on a GPU, and needs triton.
        3. "torch" runs every model, at PyTorch's speed. It is the only one for a model whose ranks
           gather layer by layer, because it makes no pass that is not needed.
        """
        backend = self.backend
        if backend is None:
            if self.model.gathers_by_layer:
                # Each pass gathers all layers, and the CUDA engine starts passes ahead of need.
                backend = "torch"
            elif cpu_engine.supports(self.model) and dispatch.compiles("engine"):
                backend = "native"
            elif cuda_engine.supports(self.model):
                backend = "triton"
            else:
                backend = "torch"
        if backend == "native":
            return cpu_engine.NativeEngine(self.model, exact=self.batch_invariant)
        if backend == "triton":
            return self._cuda_engine()
        return TorchEngine(self.model)

    def _cuda_engine(self) -> cuda_engine.CudaEngine:
        """Return the engine of earlier calls, or a new one if an unfinished stream still has it."""
        if self._cuda is None or self._cuda.busy:
            self._cuda = cuda_engine.CudaEngine(self.model)
        return self._cuda

    def forget_engine(self) -> None:
        """Make the next call build its engine anew, after the weights have got other addresses.

        The CUDA graphs of an engine contain the addresses. The other engines keep none.
        """
        self._cuda = None

    def _scheduler(self, engine: Engine, requests: dict[int, Request]) -> Scheduler:
        return Scheduler(
            engine,
            requests,
            StopRules(self.model.eos_ids, self.tokenizer),
            max_rows=CUDA_MAX_ROWS if self.model.device.type == "cuda" else MAX_ROWS,
            kv_cache_bytes=self.kv_cache_bytes,
        )


def default_kv_cache_bytes(device: torch.device) -> int:
    """Return the bound on the key-value cache of a generator that is given none."""
    if device.type != "cuda":
        return KV_CACHE_BYTES
    return int(CUDA_KV_FRACTION * torch.cuda.get_device_properties(device).total_memory)
