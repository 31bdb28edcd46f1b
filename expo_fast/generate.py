"""Batched sampling on the trainer's own weight tensors: no second model, no copy, no sync.

A slot holds one running sequence; a finished one is replaced at once while requests wait. What all
prompts have in common (system prompt, worked examples) is computed and kept once, and a prompt that
several requests share is prefilled once. One decode step of B slots reads every weight once:
2 bytes a parameter, against 2 B FLOPs; at B = 64 a CPU is bound by its GEMM, no longer by memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expo_fast.attention import Layer, causal_attention
from expo_fast.kernels.products import wide_product, widened
from expo_fast.model import Decoder
from expo_fast.pack import common_prefix
from expo_fast.sampling import Truncation, draw, uniform

MAX_SLOTS = 128  # rows decoded together; a CPU's bf16 GEMM gains little beyond
ROW_BUCKET = 16  # rows decoded are rounded up: oneDNN compiles a GEMM for each new size, for 30 ms
KV_CACHE_BYTES = 2 << 30  # unless the caller says otherwise


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
    kv_cache_bytes: bound on the slots' key-value cache; fewer sequences run at once to respect it.
    batch_invariant: every request runs alone, so that its tokens and log-probs do not depend, to
    the bit, on its companions. Slower by about the batch size.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        tokenizer: Any = None,
        kv_cache_bytes: int | None = None,
        batch_invariant: bool = False,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.kv_cache_bytes = KV_CACHE_BYTES if kv_cache_bytes is None else kv_cache_bytes
        self.batch_invariant = batch_invariant
        self._cache: Cache | None = None

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions in the requests' order. ValueError on a request that can't be served."""
        done: list[Completion | None] = [None] * len(requests)
        for i, completion in self.stream(requests):
            done[i] = completion
        return [completion for completion in done if completion is not None]

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """(index, completion) as they finish, so that rewards can be checked meanwhile."""
        requests = list(requests)
        if not requests:
            return
        for i, request in enumerate(requests):
            self._check(i, request)
        everyone = list(range(len(requests)))
        for batch in [[i] for i in everyone] if self.batch_invariant else [everyone]:
            run = _Run(self, {i: requests[i] for i in batch})
            while run.slots or run.waiting:
                yield from run.step()

    def _check(self, i: int, request: Request) -> None:
        shape, n_prompt, n_new = self.model.shape, len(request.prompt_ids), request.max_new_tokens
        if not n_prompt:
            raise ValueError(f"request {i} has an empty prompt, need at least one token")
        if n_new < 1:
            raise ValueError(f"request {i} has max_new_tokens={n_new}, need at least 1")
        if n_prompt + n_new > shape.context:
            raise ValueError(
                f"request {i} needs {n_prompt} prompt + {n_new} new tokens, "
                f"the model's context holds {shape.context}"
            )
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < shape.vocabulary:
            raise ValueError(f"request {i} has a token id outside [0, {shape.vocabulary})")
        t = request.temperature
        if not (t == 0 or 1e-30 <= t <= 1e30):  # logits over it are finite, and not all 0, in fp32
            raise ValueError(f"request {i} has temperature={t}: need 0, or from 1e-30 to 1e30")
        if not (0 < request.top_p <= 1 and request.top_k >= 0 and 0 <= request.min_p <= 1):
            raise ValueError(
                f"request {i} has top_p={request.top_p}, top_k={request.top_k}, "
                f"min_p={request.min_p}: need 0 < top_p <= 1, top_k >= 0 and 0 <= min_p <= 1"
            )
        if not -(2**63) <= request.seed < 2**63:
            raise ValueError(f"request {i} has seed={request.seed}: it must fit 64 bits")
        if isinstance(request.stop_strings, str) or "" in request.stop_strings:
            given = request.stop_strings
            raise ValueError(f"request {i} has stop_strings={given!r}: need non-empty strings")
        if request.stop_strings and self.tokenizer is None:
            raise ValueError(f"request {i} has stop strings: give Generator a tokenizer for them")

    def _slots(self, requests: Sequence[Request], prefix: int) -> "Cache":
        """A cache with as many slots as are needed and fit."""
        tokens = max(len(r.prompt_ids) - prefix + r.max_new_tokens for r in requests)
        per_slot = Cache.bytes_per_token(self.model) * tokens
        fit = self.kv_cache_bytes // per_slot
        if fit < 1:
            raise ValueError(
                f"kv_cache_bytes={self.kv_cache_bytes} holds no sequence of {tokens} tokens, "
                f"which needs {per_slot}: raise it, or shorten prompts or completions"
            )
        slots = min(len(requests), MAX_SLOTS, fit)
        if self._cache is None or self._cache.numel < slots * tokens:
            self._cache = None  # freed before the larger one is made
            self._cache = Cache(self.model, slots * tokens)
        self._cache.reset(slots, tokens)
        return self._cache


class _Run:
    """The state of one call: requests waiting, and slots 0 .. n-1 running."""

    def __init__(self, generator: Generator, requests: dict[int, Request]):
        self.model, self.tokenizer = generator.model, generator.tokenizer
        prompts = [tuple(r.prompt_ids) for r in requests.values()]
        self.prefix = prompts[0][: common_prefix(prompts)]
        self.head = widened(self.model.head_weight.detach()).T
        self.cache = generator._slots(list(requests.values()), len(self.prefix))
        first: dict[tuple[int, ...], int] = {}
        self.waiting = [_Slot(i, r, len(self.prefix)) for i, r in requests.items()]
        for slot in self.waiting:
            first.setdefault(slot.own, len(first))
        self.waiting.sort(key=lambda slot: first[slot.own], reverse=True)  # next one last
        self.slots: list[_Slot] = []
        self.prompts: dict[tuple[int, ...], _Prompt] = {}
        if self.prefix:
            self._prefill_prefix()

    @torch.no_grad()
    def step(self) -> list[tuple[int, Completion]]:
        """One token more for every running slot, or the first for newly admitted ones."""
        n_free = self.cache.n_slots - len(self.slots)
        if self.waiting and n_free >= min(len(self.waiting), max(1, self.cache.n_slots // 8)):
            new = [self.waiting.pop() for _ in range(min(n_free, len(self.waiting)))]
            hidden = self._admit(new)
            return self._extend(range(len(self.slots) - len(new), len(self.slots)), hidden)
        n = len(self.slots)
        rows = min(self.cache.n_slots, -(-n // ROW_BUCKET) * ROW_BUCKET)  # idle ones are ignored
        last = [s.tokens[-1] for s in self.slots] + [0] * (rows - n)
        tokens = torch.tensor(last, device=self.model.device)
        hidden = self.model.run(tokens, self.cache.positions(rows), self.cache.decode)
        self.cache.lengths[:n] += 1
        return self._extend(range(n), hidden[:n])

    def _prefill_prefix(self) -> None:
        tokens = torch.tensor(self.prefix, device=self.model.device)
        with torch.no_grad():
            self.model.run(tokens, torch.arange(len(tokens), device=tokens.device), self._shared)

    def _shared(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache.set_prefix(layer.index, k, v)
        return causal_attention(layer, q, k, v)

    def _admit(self, new: list["_Slot"]) -> Tensor:
        """Prefill the prompts not seen yet, fill the slots, and return (len(new), D) hidden."""
        fresh = list(dict.fromkeys(s.own for s in new if s.own not in self.prompts))
        if fresh:
            self._prefill(fresh)
        for slot in new:
            self.cache.fill(len(self.slots), self.prompts[slot.own].kv)
            self.slots.append(slot)
        hidden = torch.stack([self.prompts[slot.own].hidden for slot in new])
        wanted = {slot.own for slot in self.waiting}
        self.prompts = {own: p for own, p in self.prompts.items() if own in wanted}
        return hidden

    def _prefill(self, prompts: list[tuple[int, ...]]) -> None:
        start = len(self.prefix)
        ends = torch.tensor([len(p) for p in prompts]).cumsum(0).tolist()
        spans = [slice(end - len(p), end) for p, end in zip(prompts, ends, strict=True)]
        kv: list[list[tuple[Tensor, Tensor]]] = [[] for _ in prompts]

        def attend(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k0, v0 = self.cache.prefix(layer.index, k.dtype)
            out = []
            for rows, store in zip(spans, kv, strict=True):
                store.append((k[rows], v[rows]))
                keys, values = torch.cat([k0, k[rows]]), torch.cat([v0, v[rows]])
                out.append(causal_attention(layer, q[rows], keys, values))
            return torch.cat(out)

        device = self.model.device
        tokens = torch.tensor([t for p in prompts for t in p], device=device)
        positions = [torch.arange(start, start + len(p), device=device) for p in prompts]
        hidden = self.model.run(tokens, torch.cat(positions), attend)
        for p, rows, store in zip(prompts, spans, kv, strict=True):
            self.prompts[p] = _Prompt(store, hidden[rows.stop - 1])

    def _extend(self, rows: range, hidden: Tensor) -> list[tuple[int, Completion]]:
        """Sample one token for each of the slots `rows`; collect those that are finished."""
        running = [self.slots[i] for i in rows]
        tokens, logps = self._draw(running, hidden)
        for slot, token, logp in zip(running, tokens, logps, strict=True):
            slot.extend(token, logp, self.model.eos_ids, self.tokenizer)
        finished = [i for i in rows if self.slots[i].finish_reason]
        return [self._release(i) for i in reversed(finished)]

    def _draw(self, slots: list["_Slot"], hidden: Tensor) -> tuple[list[int], list[float]]:
        def column(name: str, dtype: torch.dtype) -> Tensor:
            return torch.tensor([getattr(s.request, name) for s in slots], dtype=dtype).to(device)

        device = hidden.device
        positions = torch.tensor([len(s.request.prompt_ids) + len(s.tokens) for s in slots])
        logits = wide_product(hidden, self.head)
        cut = Truncation(
            column("top_k", torch.int64),
            column("top_p", torch.float32),
            column("min_p", torch.float32),
        )
        u = uniform(column("seed", torch.int64), positions.to(device))
        tokens, logps = draw(logits, column("temperature", torch.float32), cut, u)
        return tokens.tolist(), logps.tolist()

    def _release(self, row: int) -> tuple[int, Completion]:
        """Free a slot; the last running one moves into the hole."""
        slot, last = self.slots[row], len(self.slots) - 1
        if slot.finish_reason == "error":
            self.cache.clear(row)
        if row != last:
            self.cache.move(last, row)
            self.slots[row] = self.slots[last]
        self.slots.pop()
        self.cache.lengths[last] = 0
        logp = torch.tensor(slot.logps, dtype=torch.float32)
        return slot.index, Completion(slot.tokens, logp, slot.finish_reason)


class _Slot:
    """A request and what was sampled for it so far."""

    def __init__(self, index: int, request: Request, prefix: int):
        self.index, self.request = index, request
        self.own = tuple(request.prompt_ids[prefix:])  # the prompt after the common prefix
        self.tokens: list[int] = []
        self.logps: list[float] = []
        self.finish_reason = ""

    def extend(self, token: int, logp: float, eos_ids: Sequence[int], tokenizer: Any) -> None:
        if logp != logp:  # NaN: the logits were not finite
            self.finish_reason = "error"
            return
        self.tokens.append(token)
        self.logps.append(logp)
        request = self.request
        stop_ids = eos_ids if request.stop_ids is None else request.stop_ids
        if token in stop_ids or self._hit_stop_string(tokenizer):
            self.finish_reason = "stop"
        elif len(self.tokens) == request.max_new_tokens:
            self.finish_reason = "length"

    def _hit_stop_string(self, tokenizer: Any) -> bool:
        strings = self.request.stop_strings
        if not strings:
            return False
        reach = 4 * max(map(len, strings)) + 4  # a token may hold a quarter of a character
        tail = tokenizer.decode(self.tokens[-reach:])
        return any(s in tail for s in strings)


@dataclass(frozen=True)
class _Prompt:
    kv: list[tuple[Tensor, Tensor]]  # one a layer, (tokens, Hkv, Dh) each
    hidden: Tensor  # (D,) of its last token


class Cache:
    """Keys and values of the slots (n, Hkv, L, Dh) a layer, and of the prefix they all share.

    On a CPU they are kept in fp32: scores of bf16 keys are then exact, and its fp32 batched GEMM is
    no slower at these sizes.
    """

    def __init__(self, model: Decoder, numel: int):
        shape = model.shape
        self.numel = numel  # tokens that it holds, over all slots
        self.heads = (shape.kv_heads, shape.head_dim)
        self.n_layers, self.device = len(shape.windows), model.device
        self.dtype = self._dtype(model)
        size = (self.n_layers, 2, numel * shape.kv_heads * shape.head_dim)
        # what a slot has not written yet is multiplied by zero, so it must be finite
        self.slab = torch.zeros(size, dtype=self.dtype, device=self.device)

    @staticmethod
    def _dtype(model: Decoder) -> torch.dtype:
        on_cpu = model.device.type == "cpu"
        return torch.promote_types(model.dtype, torch.float32) if on_cpu else model.dtype

    @staticmethod
    def bytes_per_token(model: Decoder) -> int:
        per_layer = 2 * model.shape.kv_heads * model.shape.head_dim
        return len(model.shape.windows) * per_layer * Cache._dtype(model).itemsize

    def reset(self, n_slots: int, n_tokens: int) -> None:
        """Cut the slab into n_slots rows of n_tokens, and forget what it held."""
        Hkv, Dh = self.heads
        self.n_slots = n_slots
        used = self.slab[..., : n_slots * n_tokens * Hkv * Dh]
        kv = used.view(self.n_layers, 2, n_slots, Hkv, n_tokens, Dh)
        self.k, self.v = kv[:, 0], kv[:, 1]
        self.lengths = torch.zeros(n_slots, dtype=torch.int64, device=self.device)
        empty = torch.empty(Hkv, 0, Dh, dtype=self.dtype, device=self.device)
        self.shared = [(empty, empty)] * self.n_layers
        self._masks: dict[int | None, Tensor] = {}

    def set_prefix(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v (Lp, Hkv, Dh)."""
        k, v = (x.transpose(0, 1).to(self.dtype).contiguous() for x in (k, v))
        self.shared[layer] = (k, v)

    def prefix(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k, v = (x.transpose(0, 1).to(dtype) for x in self.shared[layer])
        return k, v

    def fill(self, slot: int, kv: list[tuple[Tensor, Tensor]]) -> None:
        for layer, (k, v) in enumerate(kv):
            self.k[layer, slot, :, : len(k)] = k.transpose(0, 1)
            self.v[layer, slot, :, : len(v)] = v.transpose(0, 1)
        self.lengths[slot] = len(kv[0][0])

    def move(self, source: int, target: int) -> None:
        n = int(self.lengths[source])
        self.k[:, target, :, :n] = self.k[:, source, :, :n]
        self.v[:, target, :, :n] = self.v[:, source, :, :n]
        self.lengths[target] = n

    def clear(self, slot: int) -> None:
        self.k[:, slot] = self.v[:, slot] = 0

    def positions(self, n: int) -> Tensor:
        """(n,) the position of the token that comes next in each of the first n slots."""
        self._masks = {}
        self._width = int(self.lengths[:n].max()) + 1
        return self.lengths[:n] + self.shared[0][0].shape[1]

    def decode(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token a slot: q (n, H, Dh), k and v (n, Hkv, Dh), the latter two kept."""
        n, (Hkv, Dh), width = len(q), self.heads, self._width
        keys, values = self.k[layer.index, :n, :, :width], self.v[layer.index, :n, :, :width]
        rows, last = torch.arange(n, device=q.device), self.lengths[:n]
        keys[rows, :, last], values[rows, :, last] = k.to(self.dtype), v.to(self.dtype)
        k0, v0 = self.shared[layer.index]
        n0 = k0.shape[1]
        q = q.to(self.dtype).view(n, Hkv, -1, Dh) * layer.scale
        group = q.shape[2]
        stacked = q.transpose(0, 1).reshape(Hkv, n * group, Dh)  # the prefix sees all rows as one
        scores = torch.cat(
            [
                (stacked @ k0.transpose(1, 2)).view(Hkv, n, group, n0).transpose(0, 1),
                q @ keys.transpose(2, 3),
            ],
            -1,
        )
        p = (scores + self._mask(layer.window, n, n0, width)).softmax(-1)
        shared = p[..., :n0].transpose(0, 1).reshape(Hkv, n * group, n0) @ v0
        out = p[..., n0:] @ values + shared.view(Hkv, n, group, Dh).transpose(0, 1)
        return out.reshape(n, Hkv * group, Dh).to(v.dtype)

    def _mask(self, window: int | None, n: int, n0: int, width: int) -> Tensor:
        """(n, 1, 1, n0 + width): 0 where a slot's new token sees a key, else -inf."""
        if window not in self._masks:
            columns = torch.arange(n0 + width, device=self.device)
            place = (self.lengths[:n] + n0)[:, None]
            seen = columns <= place
            if window is not None:
                seen &= columns > place - window
            mask = torch.zeros(n, n0 + width, dtype=self.dtype, device=self.device)
            self._masks[window] = mask.masked_fill(~seen, -torch.inf)[:, None, None]
        return self._masks[window]
