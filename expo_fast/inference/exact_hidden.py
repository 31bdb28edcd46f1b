"""Packed forward pass on the C++ decode engine, bit-identical to sampling.

In batch-invariant mode, `Decoder.exact` is set to it. The trainer's hidden states are then those of
sampling, for any packing of the tokens.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from expo_fast.inference.cpu_engine import NativeEngine
from expo_fast.inference.kv_pages import Pages, Table, pages_for
from expo_fast.inference.prefill import Segment, prefill_batches
from expo_fast.modeling.decoder import Decoder, Exact


def exact_hidden(model: Decoder) -> Exact:
    """Return the function for `model.exact`, or for that of a model that shares its weights.

    Raise ValueError if csrc does not run the model.
    """
    NativeEngine(model)
    return partial(hidden, model)


@dataclass
class _PackSegment:
    """A segment of a pack, with the segment that it continues and its pages."""

    ids: Tensor  # (T,) int64
    start: int  # position of its first token
    parent: "_PackSegment | None"
    table: Table = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)  # (T, D) in pieces

    @property
    def end(self) -> int:
        return self.start + len(self.ids)

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else self.parent.depth + 1


@torch.no_grad()
def hidden(
    model: Decoder,
    tokens: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    parents: Tensor | None,
) -> Tensor:
    """Compute `Decoder.hidden`. A token's result depends only on the tokens that it attends to.

    tokens: (N,) int.
    positions: (N,) int, the index of each token in its own sequence.
    cu_seqlens: (S+1,) int32, the boundaries of the segments.
    parents: (S,) int, see `PackedAttention`.

    Return (N, D) in the model's dtype. Raise ValueError if csrc does not run the model.
    """
    segments = _segments(tokens.long(), positions, cu_seqlens, parents)
    n_pages = sum(pages_for(segment.end, NativeEngine.page) for segment in segments)
    pages = Pages(1 + n_pages, NativeEngine.page)
    engine = NativeEngine(model)
    longest = max(segment.end for segment in segments)
    engine.open(len(pages), longest)
    levels: dict[int, list[_PackSegment]] = defaultdict(list)
    for segment in segments:
        levels[segment.depth].append(segment)
    for depth in sorted(levels):  # parents before their children
        _run_level(engine, pages, levels[depth])
    return torch.cat([piece for segment in segments for piece in segment.hidden])


def _segments(
    tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, parents: Tensor | None
) -> list[_PackSegment]:
    borders = cu_seqlens.tolist()
    n_segments = len(borders) - 1
    parent_indices = [-1] * n_segments if parents is None else parents.tolist()
    segments: list[_PackSegment] = []
    for (first, end), parent in zip(pairwise(borders), parent_indices, strict=True):
        segments.append(
            _PackSegment(
                ids=tokens[first:end],
                start=int(positions[first]),
                parent=segments[parent] if parent >= 0 else None,
            )
        )
    return segments


def _run_level(engine: NativeEngine, pages: Pages, level: list[_PackSegment]) -> None:
    """Compute the segments of one depth of the tree. None of them is the parent of another."""
    for segment in level:
        parent_table = [] if segment.parent is None else segment.parent.table
        segment.table, copies = pages.fork(parent_table, segment.start, segment.end)
        engine.copy_pages(copies)
    to_run = [Segment(segment.ids, segment.start, segment.table) for segment in level]
    for batch in prefill_batches(to_run, engine.prefill_tokens):
        found = engine.run(batch.tokens()).split(batch.lengths)
        for piece, rows in zip(batch.pieces, found, strict=True):
            level[piece.index].hidden.append(rows)
