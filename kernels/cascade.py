"""Plan of one decode step's attention: pages that adjacent rows share are read once.

Sequences with a common prefix are adjacent rows and share pages of the key-value cache. Their page
tables form a tree with three levels: pages of all rows, pages of one prompt, pages of one row. Each
branch of the tree is split into items that are small enough to run in parallel. An item is a range
of pages, which is read once for the queries of all its rows. Its result for a row is written to one
of the row's slots. The slots are added in their order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from expo_fast.kernels.integers import ceil_div

LEVELS = 3  # of the tree: all rows, a prompt, a row; other shared pages are read once per row


@dataclass(frozen=True)
class Sizes:
    """Limits of a plan for a batch of `rows` rows with page tables of `width` pages."""

    rows: int
    width: int

    @property
    def piece(self) -> int:
        """Maximum pages of an item: 256 tokens, 128 for few rows, more for long tables.

        The result of an item has as many bytes as 2 (Dh + 2) / Dh tokens of cache per query head.
        With 7 heads and 256 tokens that is 6% more bytes, which stay in L2. Few rows need smaller
        items to have enough programs.
        """
        if self.rows >= 64:
            return max(8, ceil_div(self.width, 16))
        return max(4, ceil_div(self.width, 32))

    @property
    def slots(self) -> int:
        """Maximum items of a row: ceil(a) + ceil(b) + ceil(c) <= ceil(a + b + c) + 2."""
        return ceil_div(self.width, self.piece) + LEVELS - 1

    @property
    def items(self) -> int:
        """Maximum items of the batch."""
        return self.rows * self.slots


class Item(NamedTuple):
    """Pages [first_page, end_page) for the rows [first_row, first_row + n_rows)."""

    first_row: int
    n_rows: int
    first_page: int
    end_page: int
    slot: int  # the slot that the item's results take in each of its rows


FIELDS = len(Item._fields)


class Branch(NamedTuple):
    """Pages [first_page, end_page) that the rows [first_row, end_row) share."""

    first_row: int
    end_row: int
    first_page: int
    end_page: int


def plan(tables: Tensor, sizes: Sizes, rows_per_item: int) -> tuple[Tensor, Tensor]:
    """Plan the attention of rows with the given page tables.

    tables: (B, width) int32, on the CPU; page 0 ends a table.
    rows_per_item: maximum number of rows of an item.

    Return the (N, FIELDS) int32 items and the (B,) int32 number of slots of each row, on the CPU.
    """
    n_pages = (tables != 0).cumprod(1).sum(1)
    same = (tables[1:] == tables[:-1]) & (tables[1:] != 0)
    shared = [0, *same.cumprod(1).sum(1).tolist()]  # pages that a row shares with the previous row
    items: list[Item] = []
    used = [0] * len(tables)
    for branch in _branches(shared, n_pages.tolist(), 0, len(tables)):
        borders = _piece_borders(branch, sizes.piece)
        first_slot = used[branch.first_row]
        for row in range(branch.first_row, branch.end_row, rows_per_item):
            n_rows = min(rows_per_item, branch.end_row - row)
            for i, (first_page, end_page) in enumerate(pairwise(borders)):
                items.append(Item(row, n_rows, first_page, end_page, first_slot + i))
        n_pieces = len(borders) - 1
        for row in range(branch.first_row, branch.end_row):
            used[row] = first_slot + n_pieces
    assert len(items) <= sizes.items and max(used, default=0) <= sizes.slots
    # The longest items start first.
    items.sort(key=lambda item: (item.first_page - item.end_page, -item.n_rows))
    return (
        torch.tensor(items, dtype=torch.int32, device="cpu").view(-1, FIELDS),
        torch.tensor(used, dtype=torch.int32, device="cpu"),
    )


def _piece_borders(branch: Branch, max_pages: int) -> list[int]:
    """Split a branch's pages into pieces of at most max_pages pages and of nearly equal sizes."""
    n_pages = branch.end_page - branch.first_page
    n_pieces = ceil_div(n_pages, max_pages)
    return [branch.first_page + n_pages * i // n_pieces for i in range(n_pieces + 1)]


def _branches(
    shared: Sequence[int],
    n_pages: Sequence[int],
    first_row: int,
    end_row: int,
    first_page: int = 0,
    level: int = 1,
) -> Iterator[Branch]:
    """Yield the branches of the tree of rows that share all pages before first_page.

    shared: number of pages that each row shares with the row before it.
    n_pages: number of pages of each row.
    """
    if end_row - first_row == 1:
        if n_pages[first_row] > first_page:
            yield Branch(first_row, end_row, first_page, n_pages[first_row])
        return
    end_page = first_page
    if level < LEVELS:
        end_page = min(shared[first_row + 1 : end_row])
    if end_page > first_page:
        yield Branch(first_row, end_row, first_page, end_page)
        level += 1
    if level == LEVELS:  # each row is its own group
        starts = list(range(first_row, end_row))
    else:
        starts = [row for row in range(first_row + 1, end_row) if shared[row] <= end_page]
        starts.insert(0, first_row)
    for start, end in pairwise([*starts, end_row]):
        yield from _branches(shared, n_pages, start, end, end_page, level)
