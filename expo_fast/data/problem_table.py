"""A table of problems that takes little more memory than their texts.

`ProblemTable` is a sequence of problems, each of which is made when it is asked for. The numbers of
all its problems (`row_blocks.NUMBERS`) are arrays. A selection shares the bytes of its table.
"""

import hashlib
import json
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import overload

import numpy as np

from expo_fast.data.problem import Problem
from expo_fast.data.row_blocks import NUMBERS, Block, decode, make_block

Indices = np.ndarray  # (n,) of integers


class Store:
    """The problems of one source as bytes, and their numbers."""

    def __init__(self, blocks: Iterable[Block]):
        self.content = bytearray()
        self.names: set[str] = set()
        """Names of the other columns of all rows."""
        self.pickled: set[int] = set()
        """Indices of the problems whose bytes are a pickle."""
        self.files: list[str] = []
        """The file of each block, with repetitions."""
        self.block_starts: list[int] = []
        """The index of the first problem of each block."""
        ends = array("Q", [0])
        numbers = {name: array(code) for name, code in NUMBERS.items()}
        for block in blocks:
            first = len(ends) - 1
            self.files.append(block.file)
            self.block_starts.append(first)
            self.names |= block.names
            self.pickled |= {first + i for i in block.pickled}
            ends.extend(len(self.content) + end for end in block.ends)
            for name, values in block.numbers.items():
                numbers[name].extend(values)
            self.content += block.content
        self.ends = np.frombuffer(ends, dtype=np.uint64)  # (n + 1,)
        self.columns = {name: np.frombuffer(x, dtype=NUMBERS[name]) for name, x in numbers.items()}

    def __len__(self) -> int:
        return len(self.ends) - 1

    def problem(self, i: int) -> Problem:
        """Return the problem with the index i."""
        with memoryview(self.content) as content:
            return decode(content[int(self.ends[i]) : int(self.ends[i + 1])])

    def where(self, i: int) -> str:
        """Return the place of a problem for an error: "data/a.jsonl:7"."""
        return f"{self.file(i)}:{self.columns['place'][i]}"

    def file(self, i: int) -> str:
        """Return the file of a problem."""
        block = np.searchsorted(self.block_starts, i, side="right") - 1
        return self.files[int(block)]


class ProblemTable(Sequence[Problem]):
    """A sequence of problems of some stores. It equals a list of the same problems."""

    def __init__(
        self,
        stores: Sequence[Store],
        store: np.ndarray,  # (n,) uint16: index of each problem's store
        row: np.ndarray,  # (n,) uint32: its index in the store
        suffix: np.ndarray,  # (n,) uint16: index of the suffix of its id
        suffixes: Sequence[str] = ("",),
    ):
        self.stores = tuple(stores)
        self.store = store
        self.row = row
        self.suffix = suffix
        self.suffixes = tuple(suffixes)

    @classmethod
    def of_store(cls, store: Store) -> "ProblemTable":
        """Return the table of all problems of a store."""
        n = len(store)
        return cls(
            (store,),
            np.zeros(n, dtype=np.uint16),
            np.arange(n, dtype=np.uint32),
            np.zeros(n, dtype=np.uint16),
        )

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> "ProblemTable":
        """Return problems as a table, itself if it is one."""
        if isinstance(problems, ProblemTable):
            return problems
        return cls.of_store(Store([make_block("problems", problems)]))

    @classmethod
    def joined(cls, tables: Sequence["ProblemTable"]) -> "ProblemTable":
        """Return the problems of several tables, one table after the other."""
        stores: list[Store] = []
        suffixes: list[str] = []
        store = [np.empty(0, dtype=np.uint16)]
        row = [np.empty(0, dtype=np.uint32)]
        suffix = [np.empty(0, dtype=np.uint16)]
        for table in tables:
            store.append(table.store + np.uint16(len(stores)))
            row.append(table.row)
            suffix.append(table.suffix + np.uint16(len(suffixes)))
            stores += table.stores
            suffixes += table.suffixes
        return cls(
            stores,
            np.concatenate(store),
            np.concatenate(row),
            np.concatenate(suffix),
            suffixes or ("",),
        )

    def __len__(self) -> int:
        return len(self.row)

    @overload
    def __getitem__(self, index: int) -> Problem: ...

    @overload
    def __getitem__(self, index: slice) -> "ProblemTable": ...

    def __getitem__(self, index: int | slice) -> "Problem | ProblemTable":
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        problem = self.stores[self.store[index]].problem(int(self.row[index]))
        suffix = self.suffixes[self.suffix[index]]
        return replace(problem, id=problem.id + suffix) if suffix else problem

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(ours == theirs for ours, theirs in zip(self, other, strict=True))

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"ProblemTable of {len(self)} problems"

    def select(self, indices: Indices) -> "ProblemTable":
        """Return some problems, in the order of their indices. A mask of all problems works too."""
        return ProblemTable(
            self.stores,
            self.store[indices],
            self.row[indices],
            self.suffix[indices],
            self.suffixes,
        )

    def with_suffix(self, mask: np.ndarray, suffix: str) -> "ProblemTable":
        """Return the table with a text appended to some of its ids."""
        suffixes = [*self.suffixes]
        codes = self.suffix.copy()
        for old in np.unique(self.suffix[mask]):
            codes[mask & (self.suffix == old)] = len(suffixes)
            suffixes.append(self.suffixes[old] + suffix)
        return ProblemTable(self.stores, self.store, self.row, codes, suffixes)

    def numbers(self, name: str) -> np.ndarray:
        """Return a number of each problem, by its name in NUMBERS."""
        found = np.empty(len(self), dtype=NUMBERS[name])
        for i, store in enumerate(self.stores):
            mine = self.store == i
            found[mine] = store.columns[name][self.row[mine]]
        return found

    def has(self, flag: int) -> np.ndarray:
        """Return whether each problem has a flag: (n,) bool."""
        return (self.numbers("flags") & flag) != 0

    @property
    def names(self) -> set[str]:
        """Names of the other columns of all rows."""
        return set().union(*(store.names for store in self.stores))

    @cached_property
    def id_crcs(self) -> np.ndarray:
        """The crc32 of each id, (n,) uint32."""
        crcs = self.numbers("id_crc")
        for i in np.flatnonzero(self._is_suffixed()):
            suffix = self.suffixes[self.suffix[i]]
            crcs[i] = zlib.crc32(suffix.encode(), int(crcs[i]))
        return crcs

    def by_id(self, ids: Iterable[str]) -> dict[str, Problem]:
        """Return the problems with the ids, without those that no problem has."""
        wanted = set(ids)
        crcs = [zlib.crc32(each.encode()) for each in wanted]
        candidates = np.isin(self.id_crcs, np.array(crcs, dtype=np.uint32))
        return {each.id: each for each in self.select(candidates) if each.id in wanted}

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 (hex) of everything that the problems hold, in order.

        A column that JSON cannot express counts by its `str`.
        """
        digest = hashlib.sha256()
        for run in self._runs():
            digest.update(run)
        return digest.hexdigest()

    def _runs(self) -> Iterator[bytes | memoryview]:
        """Yield the bytes of the problems, those of neighbours in a store together."""
        odd = self._is_suffixed() | self._is_pickled()
        row = self.row.astype(np.int64)
        follows = (np.diff(row) == 1) & (np.diff(self.store.astype(np.int64)) == 0)
        follows &= ~(odd[1:] | odd[:-1])
        starts = np.flatnonzero(np.concatenate([[True], ~follows])) if len(self) else []
        for first, end in zip(starts, [*starts[1:], len(self)], strict=True):
            if odd[first]:
                problem = self[int(first)]
                yield json.dumps(asdict(problem), sort_keys=True, default=str).encode()
                continue
            store = self.stores[self.store[first]]
            begin = int(store.ends[row[first]])
            yield memoryview(store.content)[begin : int(store.ends[row[end - 1] + 1])]

    def _is_suffixed(self) -> np.ndarray:
        return np.array([suffix != "" for suffix in self.suffixes])[self.suffix]

    def _is_pickled(self) -> np.ndarray:
        mask = np.zeros(len(self), dtype=bool)
        for i, store in enumerate(self.stores):
            if store.pickled:
                mask |= (self.store == i) & np.isin(self.row, list(store.pickled))
        return mask
