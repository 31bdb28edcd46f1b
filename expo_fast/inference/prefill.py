"""Batches of prompt tokens for the forward passes that fill the key-value cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expo_fast.inference.engine import Tokens, cpu_int64, padded_tables
from expo_fast.inference.kv_pages import Table


@dataclass(frozen=True)
class Segment:
    """The next tokens of a sequence. All tokens before them are in the cache."""

    ids: Tensor  # (T,) int64
    start: int  # position of the first token
    table: Table

    @property
    def end(self) -> int:
        """Position after the last token, which is the number of keys that this token sees."""
        return self.start + len(self.ids)


@dataclass(frozen=True)
class Piece:
    """A part of a segment that one forward pass computes."""

    index: int  # index of the segment in the list
    segment: Segment  # the tokens of the piece


@dataclass(frozen=True)
class PrefillBatch:
    """The pieces of one forward pass. Its results are in the order of the pieces."""

    pieces: list[Piece]

    @property
    def lengths(self) -> list[int]:
        return [len(piece.segment.ids) for piece in self.pieces]

    def tokens(self) -> Tokens:
        segments = [piece.segment for piece in self.pieces]
        lengths = self.lengths
        positions: list[int] = []
        for segment, length in zip(segments, lengths, strict=True):
            positions += range(segment.start, segment.start + length)
        tables = padded_tables([segment.table for segment in segments])
        return Tokens(
            ids=torch.cat([segment.ids for segment in segments]),
            positions=cpu_int64(positions),
            tables=tables.repeat_interleave(cpu_int64(lengths), 0),
            lengths=lengths,
        )


def prefill_batches(
    segments: Sequence[Segment], max_tokens: int, max_keys: int | None = None
) -> Iterator[PrefillBatch]:
    """Split segments into batches of at most max_tokens tokens, in order.

    A segment of more than max_tokens tokens is split into pieces. Run the batches in their order,
    because a piece attends to the earlier pieces of its segment.

    max_keys: maximum number of keys of a batch of several pieces. None: no maximum.
    """
    batch: list[Piece] = []
    n_tokens = 0
    n_keys = 0
    for index, segment in enumerate(segments):
        for piece in _pieces(index, segment, max_tokens):
            n_tokens += len(piece.segment.ids)
            n_keys += piece.segment.end
            fits = n_tokens <= max_tokens and (max_keys is None or n_keys <= max_keys)
            if batch and not fits:
                yield PrefillBatch(batch)
                batch = []
                n_tokens = len(piece.segment.ids)
                n_keys = piece.segment.end
            batch.append(piece)
    if batch:
        yield PrefillBatch(batch)


def _pieces(index: int, segment: Segment, size: int) -> Iterator[Piece]:
    for part, ids in enumerate(segment.ids.split(size)):
        start = segment.start + part * size
        yield Piece(index, Segment(ids, start, segment.table))
