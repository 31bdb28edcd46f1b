"""Plan of one decode step's attention: pages that neighbouring rows share are read once.

Sequences with a common prefix share pages of the key-value cache, and are neighbouring rows. Their
tables are the leaves of a tree: pages of all rows, pages of one prompt, pages of one row. Each
branch of the tree is cut into items that are small enough to run in parallel. An item is one run of
pages that the queries of all its rows attend to at once. Its result for a row goes to one of the
row's slots, and the slots are added in their order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 3  # of the tree: all rows, a prompt, a row; what rows share beyond them is read again


@dataclass(frozen=True)
class Sizes:
    """What is fixed for a batch of `rows` rows with tables of `width` pages."""

    rows: int
    width: int

    @property
    def piece(self) -> int:
        """Pages of an item at most: 256 tokens, 128 for few rows, more where tables are long.

        An item's result costs as much as 2 (Dh + 2) / Dh tokens of cache per query head: with 7
        heads and 256 tokens that is 6% more bytes, which stay in L2. Few rows need the programs.
        """
        if self.rows >= 64:
            return max(8, -(-self.width // 16))
        return max(4, -(-self.width // 32))

    @property
    def slots(self) -> int:
        """Items of a row at most: ceil(a) + ceil(b) + ceil(c) <= ceil(a + b + c) + 2."""
        return -(-self.width // self.piece) + LEVELS - 1

    @property
    def items(self) -> int:
        """Items of the batch at most."""
        return self.rows * self.slots


class Item(NamedTuple):
    """Pages [first_page, end_page) for the rows from first_row on."""

    first_row: int
    n_rows: int
    first_page: int
    end_page: int
    slot: int  # of each of its rows


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
    rows_per_item: rows of an item at most.

    Return the items (N, FIELDS) int32 and the number of slots that each row uses, (B,) int32, both
    on the CPU.
    """
    n_pages = (tables != 0).cumprod(1).sum(1)
    same = (tables[1:] == tables[:-1]) & (tables[1:] != 0)
    shared = [0, *same.cumprod(1).sum(1).tolist()]  # pages that a row shares with the one before
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
    # items that take long start first
    items.sort(key=lambda item: (item.first_page - item.end_page, -item.n_rows))
    return (
        torch.tensor(items, dtype=torch.int32).view(-1, FIELDS),
        torch.tensor(used, dtype=torch.int32),
    )


def _piece_borders(branch: Branch, max_pages: int) -> list[int]:
    """Cut a branch's pages into pieces of at most max_pages pages, all of about one size."""
    n_pages = branch.end_page - branch.first_page
    n_pieces = -(-n_pages // max_pages)
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

    shared: pages that each row shares with the row before it.
    n_pages: of each row.
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
    if level == LEVELS:  # each row is a group
        starts = list(range(first_row, end_row))
    else:
        starts = [row for row in range(first_row + 1, end_row) if shared[row] <= end_page]
        starts.insert(0, first_row)
    for start, end in pairwise([*starts, end_row]):
        yield from _branches(shared, n_pages, start, end, end_page, level)
