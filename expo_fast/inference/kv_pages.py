"""Allocation of key-value cache pages. Sequences with a common prefix share pages."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from expo_fast.kernels.integers import ceil_div

Table = list[int]  # the pages of a sequence, in the order of its tokens


class PageCopy(NamedTuple):
    """A copy of one page's content to another page."""

    source: int
    target: int


def pages_for(n_tokens: int, size: int) -> int:
    """Return the number of pages of `size` tokens that n_tokens tokens need."""
    return ceil_div(n_tokens, size)


def pages_to_fork(n_shared: int, n_tokens: int, size: int) -> int:
    """Return the number of pages that `Pages.fork` allocates."""
    return pages_for(n_tokens, size) - n_shared // size


class Pages:
    """A fixed number of pages of `size` tokens, with the number of holders of each page.

    A holder is a sequence, or the prefix or prompt that sequences share.

    Page 0 is never allocated, because idle rows that pad a batch write to it.
    """

    def __init__(self, n: int, size: int):
        self.size = size
        self.free = list(range(n - 1, 0, -1))
        self._holders = [0] * n

    def __len__(self) -> int:
        return len(self._holders)

    def take(self, n: int) -> Table:
        """Allocate n pages."""
        assert n <= len(self.free), f"cannot take {n} pages: only {len(self.free)} are free"
        return self.hold(self.free.pop() for _ in range(n))

    def hold(self, pages: Iterable[int]) -> Table:
        """Add one holder to each of the pages, and return them."""
        held = list(pages)
        for page in held:
            self._holders[page] += 1
        return held

    def release(self, pages: Iterable[int]) -> None:
        """Remove one holder from each of the pages. A page without holders becomes free."""
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                self.free.append(page)

    def fork(
        self, table: Sequence[int], n_shared: int, n_tokens: int
    ) -> tuple[Table, list[PageCopy]]:
        """Allocate the page table of a sequence that has a common prefix with another sequence.

        table: page table of the other sequence.
        n_shared: number of tokens of the common prefix.
        n_tokens: number of tokens that the new table has pages for.

        Return the new table and the copies to make before the sequence is written to. Full pages of
        the prefix are shared. A partly filled page is copied.
        """
        full_pages, rest = divmod(n_shared, self.size)
        own = self.take(pages_to_fork(n_shared, n_tokens, self.size))
        copies = []
        if rest and own:
            copies.append(PageCopy(table[full_pages], own[0]))
        return self.hold(table[:full_pages]) + own, copies
