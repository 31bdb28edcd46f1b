"""Batched sampling on the trainer's own weight tensors: no second model, no copy, no sync.

A slot holds one running sequence; a finished one is replaced at once while requests wait, those
that may run longest first. What all prompts have in common (system prompt, worked examples) is
computed and kept once, and so is a prompt that several requests share: their sequences hold the
same pages of the key-value cache. One decode step of B slots reads every weight once: 2 bytes a
parameter, against 2 B FLOPs; at B = 64 a CPU is bound by its GEMM, no longer by memory.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import index as index_of
from typing import Any

import torch
from torch import Tensor

from expo_fast.inference import cpu_engine, cuda_engine
from expo_fast.inference.engine import (
    Engine,
    Rows,
    Sampling,
    Segment,
    TorchEngine,
    int64,
    padded,
    prefill,
)
from expo_fast.inference.kv_pages import Pages, Table
from expo_fast.inference.sampling import Truncation
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.packing import common_prefix
from expo_fast.op_backends import dispatch

MAX_SLOTS = 128  # rows decoded together; a CPU's bf16 GEMM gains little beyond
CUDA_SLOTS = 256  # an H200 is bound by memory below some 200, where a weight read does 2 B FLOPs
KV_CACHE_BYTES = 2 << 30  # unless the caller says otherwise
CUDA_KV_SHARE = 0.2  # of a GPU's memory: 28 GB of an H200's hold 256 rows of 3000 tokens of a 3B

NOTHING = torch.empty(0, device="cpu")  # where there is no hidden state yet


@dataclass(frozen=True)
class Request:
    """One completion to sample. Its randomness is keyed by (seed, position) and nothing else."""

    prompt_ids: Sequence[int]
    max_new_tokens: int
    temperature: float = 1.0  # 0: the likeliest token
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    seed: int = 0  # the G samples of a prompt carry G seeds
    stop_ids: Sequence[int] | None = None  # None: the model's own EOS ids
    stop_strings: Sequence[str] = ()


@dataclass(frozen=True)
class Completion:
    token_ids: list[int]  # a stop token included
    logp: Tensor  # (len(token_ids),) fp32 nats, at the temperature, before any truncation
    finish_reason: str  # "stop" | "length" | "error" (the model's logits were not finite)


class Generator:
    """Samples from `model`, whose weights may change in place between calls.

    tokenizer: needed for stop strings only.
    kv_cache_bytes: bound on the key-value cache; fewer sequences run at once to respect it.
    batch_invariant: tokens and log-probs of a request do not depend, to the bit, on its companions
    (where csrc runs they never do, for a number of threads; elsewhere every request runs alone,
    slower by about the batch size), and where csrc runs the log-probs are those that the ops
    compute of `cpu_engine.exact_hidden`.
    backend: "native" (csrc), "triton" (CUDA graphs of our kernels; on a CPU, where
    TRITON_INTERPRET=1 was set before, in Triton's interpreter) or "torch"; None picks.
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
        self.model = model
        self.tokenizer = tokenizer
        self.kv_cache_bytes = _kv_bytes(model.device) if kv_cache_bytes is None else kv_cache_bytes
        self.batch_invariant = batch_invariant
        self.backend = backend
        self._cuda: cuda_engine.CudaEngine | None = None  # its graphs serve later calls too

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions in the requests' order. ValueError on a request that can't be served."""
        done: list[Completion | None] = [None] * len(requests)
        for i, completion in self.stream(requests):
            done[i] = completion
        return [completion for completion in done if completion is not None]

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """(index, completion) as they finish, so that rewards can be checked meanwhile."""
        requests = list(requests)
        for i, request in enumerate(requests):
            self._check(i, request)
        if not requests:
            return
        engine = self.engine()
        alone = self.batch_invariant and isinstance(engine, TorchEngine)
        everyone = list(range(len(requests)))
        batches = [[i] for i in everyone] if alone else [everyone]
        runs = [_Run(self, engine, {i: requests[i] for i in batch}) for batch in batches]
        for run in runs:  # none began before all were found possible
            try:
                run.begin()
                while run.slots or run.waiting:
                    yield from run.step()
            finally:
                engine.close()

    def engine(self) -> Engine:
        """What the next call runs on: it is chosen anew, for adapters and hooks come and go."""
        fits = self.backend is None and cpu_engine.supports(self.model)
        fits = fits and dispatch.compiles("engine")
        if fits or self.backend == "native":
            return cpu_engine.NativeEngine(self.model, exact=self.batch_invariant)
        fits = self.backend is None and cuda_engine.supports(self.model)
        if fits or self.backend == "triton":
            if self._cuda is None or self._cuda.busy:  # with another stream, which keeps its own
                self._cuda = cuda_engine.CudaEngine(self.model)
            return self._cuda
        return TorchEngine(self.model)

    def _check(self, i: int, request: Request) -> None:
        shape, whole = self.model.shape, 2**63
        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(request, name)
            if not _is_whole(value) or not -whole <= value < whole:
                raise ValueError(f"request {i} has {name}={value!r}: need an integer of 64 bits")
        for name in ("prompt_ids", "stop_ids"):
            ids = getattr(request, name)
            if ids is not None and not (_is_sequence(ids) and all(map(_is_whole, ids))):
                raise ValueError(f"request {i} has {name}={ids!r}: need a sequence of integers")
        n_prompt, n_new = len(request.prompt_ids), request.max_new_tokens
        if not n_prompt:
            raise ValueError(f"request {i} has an empty prompt, need at least one token")
        if n_new < 1:
            raise ValueError(f"request {i} has max_new_tokens={n_new}, need at least 1")
        if n_prompt + n_new > shape.context:
            raise ValueError(
                f"request {i} needs {n_prompt} prompt + {n_new} new tokens, "
                f"the model's context holds {shape.context}"
            )
        for token in (min(request.prompt_ids), max(request.prompt_ids)):
            if not 0 <= token < shape.vocabulary:
                raise ValueError(
                    f"request {i} has the token id {token} outside [0, {shape.vocabulary})"
                )
        t = request.temperature
        if not (t == 0 or 1e-30 <= t <= 1e30):  # logits over it are finite, and not all 0, in fp32
            raise ValueError(f"request {i} has temperature={t}: need 0, or from 1e-30 to 1e30")
        if not (0 < request.top_p <= 1 and request.top_k >= 0 and 0 <= request.min_p <= 1):
            raise ValueError(
                f"request {i} has top_p={request.top_p}, top_k={request.top_k}, "
                f"min_p={request.min_p}: need 0 < top_p <= 1, top_k >= 0 and 0 <= min_p <= 1"
            )
        strings = request.stop_strings
        if isinstance(strings, str) or not all(isinstance(s, str) and s for s in strings):
            raise ValueError(f"request {i} has stop_strings={strings!r}: need non-empty strings")
        if strings and self.tokenizer is None:
            raise ValueError(f"request {i} has stop strings: give Generator a tokenizer for them")


def _is_sequence(x: Any) -> bool:
    return hasattr(x, "__len__") and hasattr(x, "__iter__")


def _is_whole(x: Any) -> bool:
    return hasattr(x, "__index__")  # of tensors only those of integers pass `operator.index`


def _kv_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return KV_CACHE_BYTES
    return int(CUDA_KV_SHARE * torch.cuda.get_device_properties(device).total_memory)


class _Run:
    """The state of one call: requests waiting, and those running."""

    def __init__(self, generator: Generator, engine: Engine, requests: dict[int, Request]):
        self.engine = engine
        self.ends = _Ends(generator.model.eos_ids, generator.tokenizer)
        self.waiting = [_Slot(i, r) for i, r in requests.items()]
        prompts = [slot.prompt for slot in self.waiting]
        self.prefix = prompts[0][: common_prefix(prompts)]
        longest: dict[tuple[int, ...], int] = {}
        for slot in self.waiting:
            longest[slot.prompt] = max(slot.n_cached, longest.get(slot.prompt, 0))
        order = {p: i for i, p in enumerate(sorted(longest, key=lambda p: -longest[p]))}
        self.waiting.sort(key=lambda slot: order[slot.prompt], reverse=True)  # next one last
        self.order = order
        self.sharers = Counter(slot.prompt for slot in self.waiting)  # that wait
        self.slots: list[_Slot] = []
        self.loaded: list[_Slot] = []  # what the engine decodes; some may have ended
        self.prompts: dict[tuple[int, ...], _Prompt] = {}
        most = CUDA_SLOTS if generator.model.device.type == "cuda" else MAX_SLOTS
        self.n_slots = min(len(requests), most)
        self.pages = Pages(self._n_pages(generator.kv_cache_bytes), engine.page)

    def begin(self) -> None:
        """Compute what all prompts share."""
        self.engine.open(len(self.pages), max(slot.n_cached for slot in self.waiting) + 1)
        self.shared, _ = self.pages.fork([], 0, len(self.prefix))
        self._prefill([_Prompt(self.prefix, self.shared, 0)] if self.prefix else [])

    def _n_pages(self, budget: int) -> int:
        """As many as all requests or slots can use, within the budget; page 0 included."""
        pages, prefix = Pages(1, self.engine.page), len(self.prefix)

        def needed(slot: _Slot) -> int:
            prompt = len(slot.prompt)
            return pages.new_for(prefix, prompt) + pages.new_for(prompt, slot.n_cached)

        needs = sorted(map(needed, self.waiting))
        fixed = 1 + pages.needed(prefix)
        each = self.engine.page_bytes()
        fit = budget // each - fixed
        if fit < needs[-1]:
            largest = max(self.waiting, key=needed)
            raise ValueError(
                f"kv_cache_bytes={budget} cannot hold request {largest.index} of "
                f"{largest.n_cached} tokens, which needs {(fixed + needs[-1]) * each}: "
                "raise it, or shorten prompts or completions"
            )
        return fixed + min(fit, sum(needs[-self.n_slots :]))

    def step(self) -> list[tuple[int, Completion]]:
        """One token more for every running slot, or the first for newly admitted ones."""
        if new := self._admit(self.n_slots - len(self.slots)):
            rows, hidden = self._rows(new), torch.stack([slot.hidden for slot in new])
            drawn = self.engine.draw(hidden, rows.positions, rows.sampling)
            return self._extend(new, *(x[None] for x in drawn))
        if not (self.loaded and self.engine.keeps(len(self.slots))):
            self.engine.load(self._rows(self.slots))
            self.loaded = self.slots
        return self._extend(self.loaded, *self.engine.decode())

    def _admit(self, n: int) -> list["_Slot"]:
        """Up to n requests that wait, as far as there are pages, with their prompts computed."""
        new: list[_Slot] = []
        fresh: list[_Prompt] = []
        prefixes: list[tuple[int, int]] = []
        copies: list[tuple[int, int]] = []
        while self.waiting and len(new) < n:
            slot = self.waiting[-1]
            prompt, tokens = self.prompts.get(slot.prompt), len(slot.prompt)
            needed = self.pages.new_for(tokens, slot.n_cached)
            if prompt is None:
                needed += self.pages.new_for(len(self.prefix), tokens)
            if needed > len(self.pages.free):
                break
            if prompt is None:
                prompt, begun = self._prompt(slot.prompt)
                fresh.append(prompt)
                prefixes += begun
            new.append(self.waiting.pop())
            slot.table, copied = self.pages.fork(prompt.table, tokens, slot.n_cached)
            copies += copied
        if not new:
            return []
        self.engine.copy_pages(prefixes)
        self._prefill(fresh)
        self.engine.copy_pages(copies)
        for slot in new:
            slot.hidden = self.prompts[slot.prompt].hidden
            self.sharers[slot.prompt] -= 1
            if not self.sharers[slot.prompt]:
                self.pages.release(self.prompts.pop(slot.prompt).table)
        self.slots = sorted([*self.slots, *new], key=lambda slot: self.order[slot.prompt])
        self.loaded = []
        return new

    def _prompt(self, ids: tuple[int, ...]) -> tuple["_Prompt", list[tuple[int, int]]]:
        table, copies = self.pages.fork(self.shared, len(self.prefix), len(ids))
        self.prompts[ids] = _Prompt(ids, table, len(self.prefix))
        return self.prompts[ids], copies

    def _prefill(self, prompts: list["_Prompt"]) -> None:
        """Compute prompts; each keeps the hidden state of its last token."""
        segments = [Segment(int64(p.ids[p.begun :]), p.begun, p.table) for p in prompts]
        for prompt, hidden in zip(prompts, prefill(self.engine, segments), strict=True):
            prompt.hidden = hidden[-1].clone()

    def _extend(
        self, slots: list["_Slot"], tokens: Tensor, logps: Tensor
    ) -> list[tuple[int, Completion]]:
        """Add (n, len(slots)) sampled tokens to the slots, and collect those that are finished."""
        for drawn in zip(tokens.tolist(), logps.tolist(), strict=True):
            for slot, token, logp in zip(slots, *drawn, strict=True):
                if not slot.finish_reason:  # or the token came after its end
                    slot.extend(token, logp, self.ends)
        finished = [slot for slot in self.slots if slot.finish_reason]
        if finished:
            self.slots = [slot for slot in self.slots if not slot.finish_reason]
            for slot in finished:  # its pages go to others only when rows are loaded anew
                self.pages.release(slot.table)
        return [(slot.index, slot.completion()) for slot in finished]

    def _rows(self, slots: list["_Slot"]) -> Rows:
        def column(name: str, dtype: torch.dtype) -> Tensor:
            return torch.tensor(
                [getattr(s.request, name) for s in slots], dtype=dtype, device="cpu"
            )

        cut = Truncation(
            column("top_k", torch.int64),
            column("top_p", torch.float32),
            column("min_p", torch.float32),
        )
        seeds, temperature = column("seed", torch.int64), column("temperature", torch.float32)
        return Rows(
            last=int64([s.tokens[-1] if s.tokens else 0 for s in slots]),
            positions=int64([s.n_tokens - bool(s.tokens) for s in slots]),
            tables=padded([s.table for s in slots]),
            sampling=Sampling(seeds, temperature, cut),
        )


@dataclass
class _Prompt:
    """Tokens in the cache from which sequences go on."""

    ids: tuple[int, ...]
    table: Table
    begun: int  # tokens that another had put there
    hidden: Tensor = NOTHING  # (D,) of its last token


class _Slot:
    """A request and what was sampled for it so far."""

    def __init__(self, index: int, request: Request):
        self.index, self.request = index, request
        self.prompt = tuple(map(index_of, request.prompt_ids))
        self.tokens: list[int] = []
        self.logps: list[float] = []
        self.finish_reason = ""
        self.table: Table = []
        self.hidden = NOTHING  # (D,) of the prompt's last token, for the first draw

    @property
    def n_tokens(self) -> int:
        return len(self.prompt) + len(self.tokens)

    @property
    def n_cached(self) -> int:
        """Tokens whose keys and values are needed; nothing attends to the very last one."""
        return len(self.prompt) + self.request.max_new_tokens - 1

    def extend(self, token: int, logp: float, ends: "_Ends") -> None:
        self.hidden = NOTHING
        if logp != logp:  # NaN: the logits were not finite
            self.finish_reason = "error"
            return
        self.tokens.append(token)
        self.logps.append(logp)
        if ends.reached(self.request, self.tokens):
            self.finish_reason = "stop"
        elif len(self.tokens) == self.request.max_new_tokens:
            self.finish_reason = "length"

    def completion(self) -> Completion:
        logp = torch.tensor(self.logps, dtype=torch.float32, device="cpu")
        return Completion(self.tokens, logp, self.finish_reason)


class _Ends:
    """Whether a completion's last token ended it."""

    def __init__(self, eos_ids: Sequence[int], tokenizer: Any):
        self.eos_ids, self.tokenizer = eos_ids, tokenizer
        self._texts: dict[int, str] = {}

    def reached(self, request: Request, tokens: list[int]) -> bool:
        stop_ids = self.eos_ids if request.stop_ids is None else request.stop_ids
        strings = request.stop_strings
        if tokens[-1] in stop_ids:
            return True
        if not any(self._may_end(s, tokens[-1]) for s in strings):
            return False
        reach = 4 * max(map(len, strings)) + 4  # a token may hold a quarter of a character
        tail = self.tokenizer.decode(tokens[-reach:])
        return any(s in tail for s in strings)

    def _may_end(self, string: str, token: int) -> bool:
        """Decoding the tail for every token would cost more than sampling it."""
        if token not in self._texts:
            self._texts[token] = self.tokenizer.decode([token])
        text = self._texts[token]
        # half a character, or blanks that some tokenizers leave out at a text's beginning
        return not text.strip() or "\ufffd" in text or string[-1].isspace() or string[-1] in text
