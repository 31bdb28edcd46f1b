"""Continuous batching: serve many requests with one engine and one key-value cache.

A step admits waiting requests, if rows and pages are free, and prefills their prompts. If no
request can be admitted, it decodes the active sequences instead. Then it collects the finished
sequences.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index as index_of

import torch
from torch import Tensor

from expo_fast.inference.engine import Engine, Rows, cpu_int64, padded_tables
from expo_fast.inference.kv_pages import PageCopy, Pages, Table, pages_for, pages_to_fork
from expo_fast.inference.prefill import PrefillBatch, Segment, prefill_batches
from expo_fast.inference.requests import Completion, FinishReason, Request
from expo_fast.inference.sampling import SampledTokens, Sampling, Truncation
from expo_fast.inference.stop_rules import StopRules
from expo_fast.modeling.packing import common_prefix
from expo_fast.runtime import interruptions


@dataclass(eq=False)
class Prompt:
    """The prompt of one or more requests, computed once for all of them."""

    ids: tuple[int, ...]
    rank: int = 0  # index in the order of service
    n_waiting: int = 0  # number of requests that have not been admitted
    table: Table = field(default_factory=list)  # empty if the prompt is not in the cache
    hidden: Tensor | None = None  # (D,) of its last token; None before it is computed


@dataclass(eq=False)
class SampledSequence:
    """A request and the tokens sampled for it so far."""

    index: int  # index of the request
    request: Request
    prompt: Prompt
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    table: Table = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        return len(self.prompt.ids) + len(self.token_ids)

    @property
    def most_cached(self) -> int:
        """The most tokens that the cache will hold. The last token is not cached."""
        return len(self.prompt.ids) + self.request.max_new_tokens - 1

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        logp = torch.tensor(self.logps, dtype=torch.float32, device="cpu")
        return Completion(self.token_ids, logp, self.finish_reason)


@dataclass
class Admission:
    """Sequences admitted in one step. Their pages are allocated but not filled yet."""

    sequences: list[SampledSequence] = field(default_factory=list)
    new_prompts: list[Prompt] = field(default_factory=list)
    prefix_copies: list[PageCopy] = field(default_factory=list)  # from the prefix to new prompts
    prompt_copies: list[PageCopy] = field(default_factory=list)  # from prompts to sequences


class Scheduler:
    """Serve the requests of one call.

    requests: by their indices.
    max_rows: maximum number of sequences that are decoded together.
    kv_cache_bytes: bound on the size of the key-value cache.
    Raise ValueError if a request does not fit the key-value cache.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Mapping[int, Request],
        stop_rules: StopRules,
        *,
        max_rows: int,
        kv_cache_bytes: int,
    ):
        self.engine = engine
        self.stop_rules = stop_rules
        self.max_rows = min(len(requests), max_rows)
        self.waiting = _in_order_of_service(requests)  # the next request is the last element
        self.active: list[SampledSequence] = []
        self.loaded: list[SampledSequence] = []  # rows of the engine; some may be finished
        prompts = list({sequence.prompt.ids for sequence in self.waiting})
        self.prefix = prompts[0][: common_prefix(prompts)]  # common to all prompts, computed once
        self.pages = Pages(self._n_pages(kv_cache_bytes), engine.page)
        self.prefix_table: Table = []

    def completions(self) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) in the order in which requests finish."""
        engine = self.engine
        try:
            with engine.own_modes():
                self._open()
            while self.active or self.waiting:
                with engine.own_modes():
                    finished = self._step()
                yield from finished
        finally:
            engine.close()

    def _open(self) -> None:
        """Allocate the cache and prefill the prefix."""
        n_positions = max(sequence.most_cached for sequence in self.waiting) + 1
        self.engine.open(len(self.pages), n_positions)
        if self.prefix:
            self.prefix_table = self.pages.take(pages_for(len(self.prefix), self.pages.size))
            prefix = Prompt(self.prefix, table=self.prefix_table)
            self._run_prompts([prefix], n_cached=0)

    def _step(self) -> list[tuple[int, Completion]]:
        """Sample the first tokens of new sequences, or the next tokens of all active sequences."""
        interruptions.check()
        if not self.engine.runs_ahead:
            admission = self._admit()
            if admission.sequences:
                self._prefill(admission)
                sampled = self._first_tokens(admission.sequences)
                return self._collect(admission.sequences, sampled)
        sampled = self._decode()
        return self._collect(self.loaded, sampled)

    # Admit

    def _admit(self) -> Admission:
        """Admit waiting requests while rows and pages are free, and allocate their pages."""
        admission = Admission()
        n_rows = self.max_rows - len(self.active)
        while self.waiting and len(admission.sequences) < n_rows:
            sequence = self.waiting[-1]
            if self._new_pages(sequence) > len(self.pages.free):
                break
            self.waiting.pop()
            admission.sequences.append(sequence)
            self._allocate(sequence, admission)
        return admission

    def _new_pages(self, sequence: SampledSequence) -> int:
        """Return the number of pages that `_allocate` takes for the sequence."""
        size = self.pages.size
        n_prompt = len(sequence.prompt.ids)
        needed = pages_to_fork(n_prompt, sequence.most_cached, size)
        if not sequence.prompt.table:
            needed += pages_to_fork(len(self.prefix), n_prompt, size)
        return needed

    def _allocate(self, sequence: SampledSequence, admission: Admission) -> None:
        prompt = sequence.prompt
        n_prompt = len(prompt.ids)
        if not prompt.table:
            prompt.table, copies = self.pages.fork(self.prefix_table, len(self.prefix), n_prompt)
            admission.prefix_copies += copies
            admission.new_prompts.append(prompt)
        sequence.table, copies = self.pages.fork(prompt.table, n_prompt, sequence.most_cached)
        admission.prompt_copies += copies

    # Prefill

    def _prefill(self, admission: Admission) -> None:
        """Fill the pages of admitted sequences, and make the sequences active."""
        self.engine.copy_pages(admission.prefix_copies)
        self._run_prompts(admission.new_prompts, n_cached=len(self.prefix))
        self.engine.copy_pages(admission.prompt_copies)
        for sequence in admission.sequences:
            prompt = sequence.prompt
            prompt.n_waiting -= 1
            if not prompt.n_waiting:
                self.pages.release(prompt.table)
        self.active += admission.sequences
        self.active.sort(key=lambda sequence: sequence.prompt.rank)
        self.loaded = []

    def _run_prompts(self, prompts: list[Prompt], *, n_cached: int) -> None:
        """Compute the rest of prompts whose first n_cached tokens are in the cache."""
        segments = []
        for prompt in prompts:
            ids = cpu_int64(prompt.ids[n_cached:])
            segments.append(Segment(ids, n_cached, prompt.table))
        for batch in self._prefill_batches(segments):
            interruptions.check()
            hidden = self.engine.run(batch.tokens()).split(batch.lengths)
            for piece, rows in zip(batch.pieces, hidden, strict=True):
                prompts[piece.index].hidden = rows[-1].clone()  # the last piece overwrites others

    def _prefill_batches(self, segments: list[Segment]) -> Iterator[PrefillBatch]:
        engine = self.engine
        return prefill_batches(segments, engine.prefill_tokens, engine.prefill_keys)

    def _first_tokens(self, sequences: list[SampledSequence]) -> SampledTokens:
        """Draw the first token of each sequence from its prompt's last hidden state: (1, B)."""
        hidden = []
        for sequence in sequences:
            assert sequence.prompt.hidden is not None
            hidden.append(sequence.prompt.hidden)
        positions = cpu_int64([sequence.n_tokens for sequence in sequences])
        sampling = _sampling(sequences)
        sampled = self.engine.draw(torch.stack(hidden), positions, sampling)
        return SampledTokens(sampled.tokens[None], sampled.logps[None])

    # Decode

    def _decode(self) -> SampledTokens:
        """Sample the next tokens of the loaded sequences: (burst, B)."""
        engine = self.engine
        keeps = bool(self.loaded) and engine.keeps_loaded(len(self.active))
        if not keeps and not engine.runs_ahead:
            engine.load(_rows(self.active))
            self.loaded = self.active
            keeps = True
        return engine.decode(ahead=keeps and self._outlast_a_burst())

    def _outlast_a_burst(self) -> bool:
        """Return whether the loaded rows should be decoded again after the next burst.

        This is a guess, because sequences may end before their length limit.
        """
        left = [s.request.max_new_tokens - len(s.token_ids) for s in self.active]
        if not self.waiting:
            return max(left) > self.engine.burst
        # A request that can be admitted should not wait for a further burst.
        can_admit = len(self.active) < self.max_rows
        can_admit &= self._new_pages(self.waiting[-1]) <= len(self.pages.free)
        return not can_admit and min(left) > self.engine.burst

    # Collect

    def _collect(
        self, sequences: list[SampledSequence], sampled: SampledTokens
    ) -> list[tuple[int, Completion]]:
        """Append (n, B) sampled tokens to B sequences. Remove and return the finished ones."""
        steps = zip(sampled.tokens.tolist(), sampled.logps.tolist(), strict=True)
        for tokens, logps in steps:
            for sequence, token, logp in zip(sequences, tokens, logps, strict=True):
                if sequence.finish_reason is None:  # otherwise it ended earlier in the burst
                    self._append(sequence, token, logp)
        finished = [sequence for sequence in self.active if sequence.finish_reason]
        if finished:
            self.active = [s for s in self.active if s.finish_reason is None]
        for sequence in finished:
            # The engine may still decode this row. That is safe: only an admission gives its pages
            # to another sequence, and rows are loaded again after it.
            self.pages.release(sequence.table)
        return [(sequence.index, sequence.completion()) for sequence in finished]

    def _append(self, sequence: SampledSequence, token: int, logp: float) -> None:
        if logp != logp:  # NaN: the logits were not finite, and the token is invalid
            sequence.finish_reason = "error"
            return
        sequence.token_ids.append(token)
        sequence.logps.append(logp)
        sequence.finish_reason = self.stop_rules.finish_reason(sequence.request, sequence.token_ids)

    # The size of the cache

    def _n_pages(self, budget: int) -> int:
        """Return the number of pages to allocate within the budget in bytes, including page 0.

        Raise ValueError if a single request needs more than the budget.
        """
        size = self.engine.page
        prefix = len(self.prefix)

        def needed(sequence: SampledSequence) -> int:
            n_prompt = len(sequence.prompt.ids)
            prompt_pages = pages_to_fork(prefix, n_prompt, size)
            return prompt_pages + pages_to_fork(n_prompt, sequence.most_cached, size)

        needs = sorted(map(needed, self.waiting))
        fixed = 1 + pages_for(prefix, size)
        page_bytes = self.engine.page_bytes()
        affordable = budget // page_bytes - fixed
        if affordable < needs[-1]:
            largest = max(self.waiting, key=needed)
            raise ValueError(
                f"kv_cache_bytes={budget} cannot hold request {largest.index} of "
                f"{largest.most_cached} tokens, which needs {(fixed + needs[-1]) * page_bytes}: "
                "increase kv_cache_bytes, or shorten prompts or completions"
            )
        return fixed + min(affordable, sum(needs[-self.max_rows :]))


def _in_order_of_service(requests: Mapping[int, Request]) -> list[SampledSequence]:
    """Return one sequence per request. The last sequence in the list is served first.

    Prompts whose requests may run longest are served first, so that no long request runs alone at
    the end. Requests of one prompt are adjacent, so that they share its pages.
    """
    prompts: dict[tuple[int, ...], Prompt] = {}
    known: dict[int, tuple[Sequence[int], Prompt]] = {}  # (tokens, prompt) by id(tokens)
    longest: dict[Prompt, int] = {}
    sequences = []
    for index, request in requests.items():
        tokens = request.prompt_ids
        if id(tokens) not in known:
            ids = tuple(map(index_of, tokens))
            known[id(tokens)] = (tokens, prompts.setdefault(ids, Prompt(ids)))
        _, prompt = known[id(tokens)]
        prompt.n_waiting += 1
        sequence = SampledSequence(index, request, prompt)
        sequences.append(sequence)
        longest[prompt] = max(sequence.most_cached, longest.get(prompt, 0))
    by_length = sorted(prompts.values(), key=lambda prompt: -longest[prompt])
    for rank, prompt in enumerate(by_length):
        prompt.rank = rank
    return sorted(sequences, key=lambda sequence: sequence.prompt.rank, reverse=True)


def _rows(sequences: list[SampledSequence]) -> Rows:
    return Rows(
        last_tokens=cpu_int64([sequence.token_ids[-1] for sequence in sequences]),
        positions=cpu_int64([sequence.n_tokens - 1 for sequence in sequences]),
        tables=padded_tables([sequence.table for sequence in sequences]),
        sampling=_sampling(sequences),
    )


def _sampling(sequences: list[SampledSequence]) -> Sampling:
    requests = [sequence.request for sequence in sequences]

    def column(name: str, dtype: torch.dtype) -> Tensor:
        values = [getattr(request, name) for request in requests]
        return torch.tensor(values, dtype=dtype, device="cpu")

    return Sampling(
        seeds=column("seed", torch.int64),
        temperature=column("temperature", torch.float32),
        truncation=Truncation(
            top_k=column("top_k", torch.int64),
            top_p=column("top_p", torch.float32),
            min_p=column("min_p", torch.float32),
        ),
    )
