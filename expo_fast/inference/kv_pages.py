"""Who holds which page of a key-value cache: sequences that begin alike hold the same pages."""

from collections.abc import Iterable, Sequence

Table = list[int]  # pages of a sequence, in order


class Pages:
    """A fixed number of pages of `size` tokens, each free or held by some sequences.

    Page 0 is nobody's: rows that only fill up a batch write there.
    """

    def __init__(self, n: int, size: int):
        self.size = size
        self.free = list(range(n - 1, 0, -1))
        self._holders = [0] * n

    def __len__(self) -> int:
        return len(self._holders)

    def needed(self, n_tokens: int) -> int:
        return -(-n_tokens // self.size)

    def take(self, n: int) -> Table:
        assert n <= len(self.free), f"{n} pages taken of {len(self.free)} free ones"
        return self.hold(self.free.pop() for _ in range(n))

    def hold(self, pages: Iterable[int]) -> Table:
        held = list(pages)
        for page in held:
            self._holders[page] += 1
        return held

    def release(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                self.free.append(page)

    def new_for(self, begun: int, n_tokens: int) -> int:
        """Pages that `fork` takes."""
        return self.needed(n_tokens) - begun // self.size

    def fork(
        self, table: Sequence[int], begun: int, n_tokens: int
    ) -> tuple[Table, list[tuple[int, int]]]:
        """A table for n_tokens, of which the first `begun` are those of another's.

        Whole pages are shared. A page begun must be copied before more is written: (from, to).
        """
        whole, rest = divmod(begun, self.size)
        own = self.take(self.new_for(begun, n_tokens))
        copies = [(table[whole], own[0])] if rest and own else []
        return self.hold(table[:whole]) + own, copies
