"""Allocation of key-value cache pages. Sequences with a common prefix share pages."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

Table = list[int]  # the pages of a sequence, in the order of its tokens


class PageCopy(NamedTuple):
    """The content of one page is to be copied to another."""

    source: int
    target: int


def pages_for(n_tokens: int, size: int) -> int:
    """Return how many pages of `size` tokens hold n_tokens tokens."""
    return -(-n_tokens // size)


def pages_to_fork(n_shared: int, n_tokens: int, size: int) -> int:
    """Return how many pages `Pages.fork` allocates."""
    return pages_for(n_tokens, size) - n_shared // size


class Pages:
    """A fixed number of pages of `size` tokens, each free or held by one or more sequences.

    Page 0 is never allocated: rows that only pad a batch write there.
    """

    def __init__(self, n: int, size: int):
        self.size = size
        self.free = list(range(n - 1, 0, -1))
        self._holders = [0] * n

    def __len__(self) -> int:
        return len(self._holders)

    def take(self, n: int) -> Table:
        """Allocate n pages."""
        assert n <= len(self.free), f"{n} pages taken of {len(self.free)} free ones"
        return self.hold(self.free.pop() for _ in range(n))

    def hold(self, pages: Iterable[int]) -> Table:
        """Add one holder to each of the pages, and return them."""
        held = list(pages)
        for page in held:
            self._holders[page] += 1
        return held

    def release(self, pages: Iterable[int]) -> None:
        """Remove one holder from each of the pages; a page without holders is free again."""
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                self.free.append(page)

    def fork(
        self, table: Sequence[int], n_shared: int, n_tokens: int
    ) -> tuple[Table, list[PageCopy]]:
        """Allocate the table of a sequence that starts with tokens of another one.

        table: of the other sequence.
        n_shared: tokens that both start with.
        n_tokens: that the new table has pages for.

        Return the new table and the copies to make before the sequence is written to. Full pages
        are shared. A page that the shared tokens fill in part is copied.
        """
        full_pages, rest = divmod(n_shared, self.size)
        own = self.take(pages_to_fork(n_shared, n_tokens, self.size))
        copies = []
        if rest and own:
            copies.append(PageCopy(table[full_pages], own[0]))
        return self.hold(table[:full_pages]) + own, copies
