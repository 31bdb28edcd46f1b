"""Who reads which pages of a key-value cache, so that what neighbours share is read once.

Sequences that begin alike hold the same pages, and lie side by side. Their tables are the leaves of
a tree: what all samples share, what those of a prompt share, what is a row's own. Each branch is
cut into items, small enough to run side by side; an item is one stretch of pages, attended to by
the queries of all its rows at once. What it finds for a row goes to one of the row's slots, and
the slots are added in their order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

LEVELS = 3  # of the tree: all, a prompt's, one's own; rows that share less evenly read it again
FIELDS = 5  # of an item: first row, rows, first page, end page, slot


@dataclass(frozen=True)
class Sizes:
    """What is fixed for a batch of `rows` rows with tables of `width` pages."""

    rows: int
    width: int

    @property
    def piece(self) -> int:
        """Pages of an item, at most: 256 tokens, 128 of few rows, more where tables are long.

        An item's result is worth 2 (Dh + 2) / Dh tokens of cache a query head: at 7 heads and 256
        tokens 6% more bytes, which stay in L2. Few rows need the programs.
        """
        return max(8, -(-self.width // 16)) if self.rows >= 64 else max(4, -(-self.width // 32))

    @property
    def slots(self) -> int:
        """Items that a row is in, at most: ceil(a) + ceil(b) + ceil(c) <= ceil(a + b + c) + 2."""
        return -(-self.width // self.piece) + LEVELS - 1

    @property
    def items(self) -> int:
        return self.rows * self.slots


def plan(tables: Tensor, sizes: Sizes, together: int) -> tuple[Tensor, Tensor]:
    """Items (N, FIELDS) int32 and the slots in use of each row, (B,) int32, all on the CPU.

    tables: (B, width) int32; page 0 is nobody's and ends a table.
    together: rows of an item, at most.
    """
    n_pages = (tables != 0).cumprod(1).sum(1)
    alike = (tables[1:] == tables[:-1]) & (tables[1:] != 0)
    shared = [0, *alike.cumprod(1).sum(1).tolist()]  # pages that a row shares with the one before
    items: list[tuple[int, ...]] = []
    used = [0] * len(tables)
    for lo, hi, begin, end in _branches(shared, n_pages.tolist(), 0, len(tables), 0, 1):
        pieces = -(-(end - begin) // sizes.piece)
        borders = [begin + (end - begin) * i // pieces for i in range(pieces + 1)]
        for row in range(lo, hi, together):
            n = min(together, hi - row)
            items += [(row, n, *borders[i : i + 2], used[lo] + i) for i in range(pieces)]
        used[lo:hi] = [used[lo] + pieces] * (hi - lo)
    assert len(items) <= sizes.items and max(used, default=0) <= sizes.slots
    items.sort(key=lambda item: (item[2] - item[3], -item[1]))  # the longest run first
    return (
        torch.tensor(items, dtype=torch.int32).view(-1, FIELDS),
        torch.tensor(used, dtype=torch.int32),
    )


def _branches(
    shared: Sequence[int], n_pages: Sequence[int], lo: int, hi: int, begin: int, level: int
) -> Iterator[tuple[int, int, int, int]]:
    """(first row, end row, first page, end page) of a tree of rows alike up to page `begin`."""
    if hi - lo == 1:
        if n_pages[lo] > begin:
            yield lo, hi, begin, n_pages[lo]
        return
    end = min(shared[lo + 1 : hi]) if level < LEVELS else begin
    if end > begin:
        yield lo, hi, begin, end
        level += 1
    if level == LEVELS:
        borders = [*range(lo, hi + 1)]
    else:
        borders = [lo, *(i for i in range(lo + 1, hi) if shared[i] <= end), hi]
    for a, b in pairwise(borders):
        yield from _branches(shared, n_pages, a, b, end, level)
