"""Samples -> packed rows of tokens, each shared prefix in them once.

A pack is a tree of segments: what all its prompts start with, under it each prompt's own rest,
under that the completions. A token is in the pack once however many samples continue it, and the
last token of a completion not at all, since nothing is predicted from it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from expo_fast.modeling.decoder import Decoder


@dataclass(frozen=True)
class Sample:
    """A prompt, one completion of it, and how the loss is to weigh the completion's tokens."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    advantage: float = 0.0
    row_weight: float = 0.0  # of each completion token; carries every normaliser of the loss
    on_policy: bool = False  # True: plain log-likelihood, no ratio, clip, KL or entropy (ExP-SFT)
    old_logp: Tensor | None = None  # (len(completion_ids),) fp32 nats under the sampling policy
    ref_logp: Tensor | None = None  # (len(completion_ids),) fp32 nats under the reference

    def __post_init__(self):
        assert self.prompt_ids and self.completion_ids, "a sample needs a prompt and a completion"


@dataclass(frozen=True)
class Pack:
    """N tokens of S segments for the model; R rows of them for the loss, one a completion token."""

    tokens: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64, in the sample's own sequence
    cu_seqlens: Tensor  # (S+1,) int32
    parents: Tensor  # (S,) int64, -1 for a root
    rows: Tensor  # (R,) int64, the token whose hidden state predicts targets
    targets: Tensor  # (R,) int64
    sequence_ids: Tensor  # (R,) int64, index of the row's sample in `members`
    advantage: Tensor  # (R,) fp32
    row_weight: Tensor  # (R,) fp32
    on_policy: Tensor  # (R,) bool
    old_logp: Tensor | None  # (R,) fp32
    ref_logp: Tensor | None  # (R,) fp32
    members: tuple[int, ...]  # the samples' places in the list that was packed
    lengths: tuple[int, ...]  # tokens of their completions

    def to(self, device: torch.device) -> "Pack":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in moved.items() if isinstance(v, Tensor)})

    def split(self, per_row: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(place of the sample, its own values) out of one value a row."""
        yield from zip(self.members, per_row.split(self.lengths), strict=True)


def pack(samples: Sequence[Sample], max_tokens: int, *, together: int = 1) -> Iterator[Pack]:
    """Packs of at most max_tokens tokens (a longer sample gets its own), prompts kept together.

    together: so many samples after one another, of one prompt, go into one pack in their order.
    """
    order: dict[tuple[int, ...], list[int]] = {}
    for i, sample in enumerate(samples):
        order.setdefault(sample.prompt_ids, []).append(i)
    root = common_prefix(order) if order else 0
    members: list[int] = []
    size, last = root, None
    for prompt, group in order.items():
        for at in range(0, len(group), together):
            unit = group[at : at + together]
            own = sum(len(samples[i].completion_ids) - 1 for i in unit)
            new = own + (0 if prompt == last else len(prompt) - root)
            if members and size + new > max_tokens:
                yield _build(samples, members)
                members, size, new = [], root, own + len(prompt) - root
            members.extend(unit)
            size, last = size + new, prompt
    if members:
        yield _build(samples, members)


def forward(
    model: Decoder, samples: Sequence[Sample], max_tokens: int, *, together: int = 1
) -> Iterator[tuple[Pack, Tensor]]:
    """The packs on the model's device, each with the (R, D) hidden states of its rows."""
    for p in pack(samples, max_tokens, together=together):
        p = p.to(model.device)
        yield p, model.hidden(p.tokens, p.positions, p.cu_seqlens, p.parents)[p.rows]


def common_prefix(prompts: Iterable[tuple[int, ...]]) -> int:
    """Tokens that all prompts start with, short of the last of any: each keeps one of its own."""
    prompts = list(prompts)
    low, high = min(prompts), max(prompts)  # whatever these two share lies in all between them
    limit = min(map(len, prompts)) - 1
    return next((n for n in range(limit) if low[n] != high[n]), limit)


@dataclass(frozen=True)
class _Segment:
    tokens: tuple[int, ...]
    start: int  # position of its first token in the sequence
    parent: int  # segment that it continues, or -1


def _build(samples: Sequence[Sample], members: list[int]) -> Pack:
    chosen = [samples[i] for i in members]
    root = common_prefix(s.prompt_ids for s in chosen)
    segments = [_Segment(chosen[0].prompt_ids[:root], 0, -1)] if root else []
    ends: list[int] = [root] if root else []  # tokens in the pack up to each segment's end
    prompts: dict[tuple[int, ...], int] = {}
    rows: list[int] = []

    def append(segment: _Segment) -> int:
        segments.append(segment)
        ends.append((ends[-1] if ends else 0) + len(segment.tokens))
        return len(segments) - 1

    shared = Counter(s.prompt_ids for s in chosen)
    for s in chosen:
        rest, own = s.prompt_ids[root:], s.completion_ids[:-1]
        parent = 0 if root else -1
        if shared[s.prompt_ids] == 1:  # one segment attends faster than two
            append(_Segment(rest + own, root, parent))
            rows.extend(range(ends[-1] - len(own) - 1, ends[-1]))
            continue
        if s.prompt_ids not in prompts:
            prompts[s.prompt_ids] = append(_Segment(rest, root, parent))
        prompt = prompts[s.prompt_ids]
        rows.append(ends[prompt] - 1)  # the prompt's last token predicts the completion's first
        if own:
            append(_Segment(own, len(s.prompt_ids), prompt))
            rows.extend(range(ends[-2], ends[-1]))
    lengths = tuple(len(s.completion_ids) for s in chosen)

    def per_row(values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(torch.tensor(lengths))

    return Pack(
        tokens=torch.tensor([t for s in segments for t in s.tokens]),
        positions=torch.cat([torch.arange(s.start, s.start + len(s.tokens)) for s in segments]),
        cu_seqlens=torch.tensor([0, *ends], dtype=torch.int32),
        parents=torch.tensor([s.parent for s in segments]),
        rows=torch.tensor(rows),
        targets=torch.tensor([t for s in chosen for t in s.completion_ids]),
        sequence_ids=per_row(list(range(len(chosen))), torch.int64),
        advantage=per_row([s.advantage for s in chosen], torch.float32),
        row_weight=per_row([s.row_weight for s in chosen], torch.float32),
        on_policy=per_row([s.on_policy for s in chosen], torch.bool),
        old_logp=_logps([s.old_logp for s in chosen], lengths),
        ref_logp=_logps([s.ref_logp for s in chosen], lengths),
        members=tuple(members),
        lengths=lengths,
    )


def _logps(values: list[Tensor | None], lengths: Sequence[int]) -> Tensor | None:
    """(R,), zeros for a sample without: it is on policy, and ignores them. None: none has any."""
    if all(v is None for v in values):
        return None
    filled = zip(values, lengths, strict=True)
    return torch.cat([torch.zeros(n) if v is None else v.float() for v, n in filled])
