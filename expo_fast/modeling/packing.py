"""Pack samples into rows of tokens in which every shared prefix is stored once.

A pack is a tree of segments. Its root is the common prefix of all prompts. The children of the root
are the rests of the prompts, and their children are the completions. A token is stored once for all
samples that continue it. The last token of a completion is not stored, because it predicts nothing.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from expo_fast.modeling.decoder import Decoder
from expo_fast.runtime import interruptions

PromptIds = tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """A prompt, one completion of it, and the weights of the completion's tokens in the loss."""

    prompt_ids: PromptIds
    completion_ids: tuple[int, ...]
    advantage: float = 0.0
    row_weight: float = 0.0  # of each completion token; includes every normaliser of the loss
    on_policy: bool = False  # True: log-likelihood without ratio, clip, KL or entropy (ExP-SFT)
    old_logp: Tensor | None = None  # (len(completion_ids),) fp32 nats under the sampling policy
    ref_logp: Tensor | None = None  # (len(completion_ids),) fp32 nats under the reference

    def __post_init__(self):
        assert self.prompt_ids and self.completion_ids, "a sample needs a prompt and a completion"


@dataclass(frozen=True)
class Pack:
    """N tokens in S segments for the model, and R rows for the loss, one per completion token."""

    tokens: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64, in the sample's own sequence
    cu_seqlens: Tensor  # (S+1,) int32 boundaries of the segments, on the CPU for attention
    parents: Tensor  # (S,) int64, -1 for a root; on the CPU for attention
    rows: Tensor  # (R,) int64, the token whose hidden state predicts the target
    targets: Tensor  # (R,) int64
    sequence_ids: Tensor  # (R,) int64, the index of the row's sample in `members`
    advantage: Tensor  # (R,) fp32
    row_weight: Tensor  # (R,) fp32
    on_policy: Tensor  # (R,) bool
    old_logp: Tensor | None  # (R,) fp32
    ref_logp: Tensor | None  # (R,) fp32
    members: tuple[int, ...]  # the indices of the samples in the list that was packed
    lengths: tuple[int, ...]  # the number of tokens of their completions
    all_weighted: bool  # whether no row weight is 0
    target_range: tuple[int, int]  # the smallest and the largest target

    def to(self, device: torch.device) -> "Pack":
        """Return the pack with its tokens and rows on the device, without a host sync."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and field.name not in ("cu_seqlens", "parents"):
                if device.type == "cuda" and value.device.type == "cpu":
                    value = value.pin_memory()  # else the copy waits for all earlier launches
                moved[field.name] = value.to(device, non_blocking=True)
        return replace(self, **moved)

    def has_targets_below(self, vocabulary: int) -> bool:
        """Return whether all targets are tokens of the vocabulary, without a host sync."""
        least, largest = self.target_range
        return least >= 0 and largest < vocabulary

    def is_complete(self, vocabulary: int) -> bool:
        """Return whether every row has a weight and a target, without a host sync."""
        return self.all_weighted and self.has_targets_below(vocabulary)

    def split(self, per_row: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Split (R, ...) values by sample: yield the index and the values of each sample."""
        parts = per_row.split(self.lengths)
        yield from zip(self.members, parts, strict=True)


def pack(
    samples: Sequence[Sample],
    max_tokens: int,
    *,
    together: int = 1,
) -> Iterator[Pack]:
    """Yield packs of at most `max_tokens` tokens. A longer sample gets its own pack.

    Samples of one prompt are kept together as far as possible.

    together: number of successive samples of one prompt that must be in one pack, in their order.
    """
    by_prompt: dict[PromptIds, list[int]] = {}
    for index, sample in enumerate(samples):
        by_prompt.setdefault(sample.prompt_ids, []).append(index)
    if not by_prompt:
        return
    n_shared = common_prefix(by_prompt)
    members: list[int] = []
    size = n_shared
    last_prompt = None
    for prompt, group in by_prompt.items():
        n_rest = len(prompt) - n_shared
        for start in range(0, len(group), together):
            unit = group[start : start + together]
            completions = [samples[index].completion_ids for index in unit]
            n_own = sum(map(len, completions)) - len(unit)
            n_added = n_own if prompt == last_prompt else n_own + n_rest
            if members and size + n_added > max_tokens:
                yield _build(samples, members)
                members = []
                size = n_shared
                n_added = n_own + n_rest
            members.extend(unit)
            size += n_added
            last_prompt = prompt
    yield _build(samples, members)


def forward(
    model: Decoder,
    samples: Sequence[Sample],
    max_tokens: int,
    *,
    together: int = 1,
) -> Iterator[tuple[Pack, Tensor]]:
    """Yield each pack on the model's device, with the (R, D) hidden states of its rows.

    Raise ValueError for a token that the embedding lacks. On a GPU it would end the process's use
    of the device.
    """
    vocabulary = model.shape.vocabulary
    for on_cpu in pack(samples, max_tokens, together=together):
        interruptions.check()
        largest = int(on_cpu.tokens.max())
        if largest >= vocabulary:
            raise ValueError(f"a sample has the token id {largest} outside [0, {vocabulary})")
        p = on_cpu.to(model.device)
        hidden = model.hidden(p.tokens, p.positions, p.cu_seqlens, p.parents)
        yield p, hidden[p.rows]


def common_prefix(prompts: Iterable[PromptIds]) -> int:
    """Return the length of the common prefix, at most one less than the shortest prompt.

    Each prompt therefore has at least one token after the prefix.
    """
    prompts = list(prompts)
    low = min(prompts)
    high = max(prompts)  # all prompts are between low and high, and have their common prefix
    limit = min(map(len, prompts)) - 1
    for n in range(limit):
        if low[n] != high[n]:
            return n
    return limit


@dataclass(frozen=True)
class _Segment:
    """A run of tokens that continues its parent."""

    tokens: tuple[int, ...]
    start: int  # the position of its first token in the sequence
    parent: int  # the index of the segment that it continues, or -1


class _Tree:
    """The segments of a pack, and the rows that predict its completions."""

    def __init__(self, shared: tuple[int, ...]):
        """shared: the common prefix of all prompts, which may be empty."""
        self.segments: list[_Segment] = []
        self.boundaries = [0]  # boundaries of the segments in the pack
        self.rows: list[int] = []
        self.root = -1
        self.n_shared = len(shared)
        if shared:
            root = _Segment(shared, start=0, parent=-1)
            self.root = self._append(root)
        self._prompts: dict[PromptIds, int] = {}  # the segment of each prompt's rest

    def _append(self, segment: _Segment) -> int:
        end = self.boundaries[-1] + len(segment.tokens)
        self.segments.append(segment)
        self.boundaries.append(end)
        return len(self.segments) - 1

    def add_single(self, sample: Sample) -> None:
        """Add the only sample of its prompt as one segment, which is faster than two."""
        completion = sample.completion_ids[:-1]
        tokens = sample.prompt_ids[self.n_shared :] + completion
        segment = _Segment(tokens, start=self.n_shared, parent=self.root)
        self._append(segment)
        end = self.boundaries[-1]
        first_row = end - len(completion) - 1
        self.rows.extend(range(first_row, end))

    def add(self, sample: Sample) -> None:
        """Add one of several samples of a prompt."""
        prompt = sample.prompt_ids
        if prompt not in self._prompts:
            rest = prompt[self.n_shared :]
            segment = _Segment(rest, start=self.n_shared, parent=self.root)
            self._prompts[prompt] = self._append(segment)
        parent = self._prompts[prompt]
        # The last token of the prompt predicts the first token of the completion.
        self.rows.append(self.boundaries[parent + 1] - 1)
        completion = sample.completion_ids[:-1]
        if completion:
            segment = _Segment(completion, start=len(prompt), parent=parent)
            self._append(segment)
            start, end = self.boundaries[-2:]
            self.rows.extend(range(start, end))

    def tokens(self) -> Tensor:
        ids: list[int] = []
        for segment in self.segments:
            ids.extend(segment.tokens)
        return _int64(ids)

    def positions(self) -> Tensor:
        places = []
        for segment in self.segments:
            end = segment.start + len(segment.tokens)
            places.append(torch.arange(segment.start, end))
        return torch.cat(places)


def _build(samples: Sequence[Sample], members: list[int]) -> Pack:
    chosen = [samples[index] for index in members]
    n_shared = common_prefix(sample.prompt_ids for sample in chosen)
    tree = _Tree(chosen[0].prompt_ids[:n_shared])
    n_samples = Counter(sample.prompt_ids for sample in chosen)
    targets: list[int] = []
    for sample in chosen:
        if n_samples[sample.prompt_ids] == 1:
            tree.add_single(sample)
        else:
            tree.add(sample)
        targets.extend(sample.completion_ids)
    lengths = [len(sample.completion_ids) for sample in chosen]
    repeats = torch.tensor(lengths)

    def per_row(values: Sequence, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(repeats)

    return Pack(
        tokens=tree.tokens(),
        positions=tree.positions(),
        cu_seqlens=torch.tensor(tree.boundaries, dtype=torch.int32),
        parents=_int64([segment.parent for segment in tree.segments]),
        rows=_int64(tree.rows),
        targets=_int64(targets),
        sequence_ids=per_row(range(len(chosen)), torch.int64),
        advantage=per_row([s.advantage for s in chosen], torch.float32),
        row_weight=per_row([s.row_weight for s in chosen], torch.float32),
        on_policy=per_row([s.on_policy for s in chosen], torch.bool),
        old_logp=_concatenated([s.old_logp for s in chosen], lengths),
        ref_logp=_concatenated([s.ref_logp for s in chosen], lengths),
        members=tuple(members),
        lengths=tuple(lengths),
        all_weighted=all(s.row_weight for s in chosen),
        target_range=(min(targets), max(targets)),
    )


def _int64(values: list[int]) -> Tensor:
    """Return an int64 tensor. torch.tensor takes seven times as long: 3 ms for 16384 values."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)


def _concatenated(
    logps: Sequence[Tensor | None],
    lengths: Sequence[int],
) -> Tensor | None:
    """Return the (R,) log-probs of all samples, or None if no sample has any.

    A sample without log-probs gets zeros. It is on-policy, so the loss ignores them.
    """
    if all(logp is None for logp in logps):
        return None
    filled = []
    for logp, length in zip(logps, lengths, strict=True):
        values = torch.zeros(length, device="cpu") if logp is None else logp.float()
        filled.append(values)
    return torch.cat(filled)
