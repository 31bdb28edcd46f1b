"""Batched sampling from the trainer's own weight tensors: no second model, no copy, no sync.

A row holds one running sequence. A finished sequence is replaced at once while requests wait, those
that may run longest first. What all prompts have in common (system prompt, worked examples) is
computed and kept once, and so is a prompt that several requests share: their sequences share pages
of the key-value cache. One decode step of B rows reads every weight once: 2 bytes per parameter for
2 B FLOPs. At B = 64 a CPU is bound by its GEMM, no longer by memory.
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

MAX_ROWS = 128  # decoded together; a CPU's bf16 GEMM gains little beyond
CUDA_MAX_ROWS = 256  # below some 200 rows an H200 is bound by memory: 2 B FLOPs per weight read
KV_CACHE_BYTES = 2 << 30  # on a CPU, unless the caller sets it
CUDA_KV_SHARE = 0.2  # of a GPU's memory: an H200's 28 GB hold 256 rows of 3000 tokens of a 3B


class Generator:
    """Samples from `model`, whose weights may change in place between calls.

    tokenizer: needed for stop strings only.
    kv_cache_bytes: bound on the key-value cache; fewer sequences run at once to respect it.
    batch_invariant: the tokens and log-probs of a request do not depend, to the bit, on the other
    requests. Where csrc runs they never do, for a fixed number of threads; there this option makes
    the log-probs those that the ops compute from `exact_hidden`. Elsewhere every request runs
    alone, slower by about the batch size.
    backend: "native" (csrc), "triton" (CUDA graphs of our kernels; on a CPU in Triton's
    interpreter, if TRITON_INTERPRET=1 was set before triton was imported) or "torch"; None picks
    the fastest that runs the model.
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
            kv_cache_bytes = _default_kv_cache_bytes(model.device)
        self.model = model
        self.tokenizer = tokenizer
        self.kv_cache_bytes = kv_cache_bytes
        self.batch_invariant = batch_invariant
        self.backend = backend
        self._cuda: cuda_engine.CudaEngine | None = None  # kept, with its graphs, for later calls

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """Return the completions in the requests' order.

        Raise ValueError, before any sampling, where a request cannot be served.
        """
        completions: dict[int, Completion] = dict(self.stream(requests))
        return [completions[index] for index in range(len(completions))]

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) as they finish, so that rewards can be checked meanwhile.

        Raise ValueError, before any sampling, where a request cannot be served.
        """
        requests = list(requests)
        has_tokenizer = self.tokenizer is not None
        check_requests(requests, self.model.shape, has_tokenizer=has_tokenizer)
        if not requests:
            return
        engine = self.engine()
        batches = [dict(enumerate(requests))]
        if self.batch_invariant and isinstance(engine, TorchEngine):
            batches = [{index: request} for index, request in enumerate(requests)]
        # all of them first, for each checks that its requests fit the cache
        schedulers = [self._scheduler(engine, batch) for batch in batches]
        for scheduler in schedulers:
            yield from scheduler.completions()

    def engine(self) -> Engine:
        """Return the engine that the next call uses.

        Chosen anew for every call, because adapters and hooks come and go. The first of these that
        runs the model, unless `backend` names one:

        1. "native": csrc knows plain fp32 and bf16 models on a CPU, and needs a C++ compiler.
        2. "triton": CUDA graphs serve 16-bit models on a GPU for which triton is installed.
        3. "torch": runs everything, at PyTorch's speed.
        """
        backend = self.backend
        if backend is None:
            if cpu_engine.supports(self.model) and dispatch.compiles("engine"):
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
        """Return the engine of earlier calls, or a new one if an unfinished stream holds that."""
        if self._cuda is None or self._cuda.busy:
            self._cuda = cuda_engine.CudaEngine(self.model)
        return self._cuda

    def _scheduler(self, engine: Engine, requests: dict[int, Request]) -> Scheduler:
        return Scheduler(
            engine,
            requests,
            StopRules(self.model.eos_ids, self.tokenizer),
            max_rows=CUDA_MAX_ROWS if self.model.device.type == "cuda" else MAX_ROWS,
            kv_cache_bytes=self.kv_cache_bytes,
        )


def _default_kv_cache_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return KV_CACHE_BYTES
    return int(CUDA_KV_SHARE * torch.cuda.get_device_properties(device).total_memory)
