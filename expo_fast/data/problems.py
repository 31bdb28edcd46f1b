"""Problems: questions with known answers, from data files, hub data sets or the generator.

A source is a path to a file, a folder or a pattern of files (files.py says which forms), a hub data
set `hub:ORG/NAME[/CONFIG][:SPLIT]`, the name of a benchmark, or `builtin:NAME[:SPLIT]`. Each row
has a question in `prompt`, `problem` or `question`, as text or as chat messages, and an `answer`.
It may have a `solution`, a `level` and an `id`. An answer in the style of GSM8K, "... reasoning ...
#### 42", in a row without a solution is split into a solution and an answer. row_forms.py says
which other forms of rows are read. Chat messages may end with the beginning of the answer, an
assistant's message, which the model continues.

A complete source is checked before anything is built on it. The first bad row is a ValueError that
names its file, line and value.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np

from expo_fast.data.files import file_rows, files_of
from expo_fast.data.large_files import is_large, read_large
from expo_fast.data.problem import Problem, last_question, question_text
from expo_fast.data.problem_table import ProblemTable, Store
from expo_fast.data.row_blocks import (
    IS_TEXT,
    NO_LEVEL,
    Block,
    blocks_of,
    question_key,
)
from expo_fast.data.row_forms import parse_names
from expo_fast.data.row_reading import RowOptions
from expo_fast.data.sources import read_rows

__all__ = [
    "Problem",
    "fingerprint",
    "hold_out",
    "join_sources",
    "last_question",
    "load_problems",
    "overlap",
    "question_text",
    "same_fingerprint",
    "subset",
    "without",
    "worked_examples",
]


def load_problems(
    source: str,
    *,
    levels: Sequence[int] = (),  # keep only these; () keeps all
    limit: int | None = None,  # how many to generate, or the size of a random subset, in order
    seed: int = 0,  # of the generator or the subset; subsets of one seed are nested
    columns: Sequence[str] = (),  # NAME=COLUMN for columns with other names
    all_columns: bool = True,  # whether a row needs every column of `columns`
    answers: bool = True,  # whether every row needs an answer to judge by, or a pair
    data_dir: str | None = None,  # folder of benchmarks; None: that of EXPO_FAST_DATA
) -> ProblemTable:
    """Read, check and select the problems of `source` (see the module's docstring).

    Raises FileNotFoundError for a missing file. Raises ValueError for a bad row, an empty data set,
    a level that no problem has, an unknown built-in data set, and a hub data set that cannot be
    loaded.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: ask for at least one problem of {source}")
    names = {} if source.startswith("builtin:") else parse_names(columns)
    options = RowOptions(names, all_columns, answers)
    large = [file for file in files_of(source) if is_large(file)]
    if large:
        blocks = _blocks_of_files(source, options)
    else:
        rows = read_rows(source, levels=levels, limit=limit, seed=seed, data_dir=data_dir)
        blocks = blocks_of(rows, options)
    problems = _with_distinct_ids(Store(blocks))
    if not problems:
        raise ValueError(f"{source}: holds no problem; give a data set with at least one row")
    return subset(_of_levels(problems, levels, source), limit, seed)


def _blocks_of_files(source: str, options: RowOptions) -> Iterator[Block]:
    for file in files_of(source):
        if is_large(file):
            yield from read_large(file, options)
        else:
            yield from blocks_of(file_rows(file), options)


def _with_distinct_ids(store: Store) -> ProblemTable:
    """Return the problems of a source, whose ids differ.

    An id that another file of the source has gets the number of its file: `7@2`. Raise ValueError
    if a file has an id twice.
    """
    problems = ProblemTable.of_store(store)
    suffixes = {file: f"@{n}" for n, file in enumerate(dict.fromkeys(store.files), 1)}
    repeated: dict[str, np.ndarray] = {}  # by file: whether an earlier file has the id
    for first, later in _same_ids(problems):
        file = store.file(later)
        if store.file(first) != file:
            repeated.setdefault(file, np.zeros(len(problems), dtype=bool))[later] = True
    for file, mask in repeated.items():
        problems = problems.with_suffix(mask, suffixes[file])
    for first, later in _same_ids(problems):
        raise ValueError(
            f"{store.where(later)}: id {problems[later].id!r} is that of {store.where(first)}; ids "
            "must differ"
        )
    return problems


def _same_ids(problems: ProblemTable) -> Iterator[tuple[int, int]]:
    """Yield the index of each problem whose id an earlier one has, after that of the first one."""
    crcs = problems.id_crcs
    distinct, counts = np.unique(crcs, return_counts=True)
    first: dict[str, int] = {}
    for i in np.flatnonzero(np.isin(crcs, distinct[counts > 1])):
        index = int(i)
        earlier = first.setdefault(problems[index].id, index)
        if earlier != index:
            yield earlier, index


def join_sources(parts: Sequence[Sequence[Problem]]) -> list[ProblemTable]:
    """Return the problems of several sources with distinct ids.

    An id that an earlier source has gets the number of its source: `7@2`.
    """
    joined: list[ProblemTable] = []
    for number, part in enumerate(map(ProblemTable.of, parts), 1):
        taken: set[str] = set()
        for earlier in joined:
            suspects = np.isin(earlier.id_crcs, part.id_crcs)
            taken |= {problem.id for problem in earlier.select(suspects)}
        mask = np.zeros(len(part), dtype=bool)
        if taken:
            mask[:] = [problem.id in taken for problem in part]
        joined.append(part.with_suffix(mask, f"@{number}"))
    return joined


def hold_out(problems: Sequence[Problem], fraction: float, limit: int) -> ProblemTable:
    """Return the problems to hold out for evaluation, in the order of the data.

    A question is held out if its hash is among the lowest `fraction` of all hashes, so the choice
    does not change if rows are added or in another order. Of more than `limit` questions, those
    with the lowest hashes are held out. At least one is. Each question is held out once.
    """
    table = ProblemTable.of(problems)
    keys, first = np.unique(table.numbers("key"), return_index=True)  # the first row of several
    places = keys.astype(np.float64) / 2.0**64  # of the hashes among all hashes, from 0 to 1
    order = np.lexsort((first, places))
    n_below = int(np.count_nonzero(places < fraction))
    chosen = first[order[: min(limit, max(1, n_below))]]
    return table.select(np.sort(chosen))


def worked_examples(
    problems: Sequence[Problem], k: int
) -> tuple[tuple[Problem, ...], ProblemTable]:
    """Return k problems to show with their solutions, and the other problems.

    The examples are spread evenly over the shortest third of the solutions, so they are short and
    yet of different kinds. No question of an example is among the other problems.

    Raises ValueError if fewer than k problems have a solution.
    """
    if k < 0:
        raise ValueError(f"{k} worked examples: ask for 0 or more")
    table = ProblemTable.of(problems)
    solved = np.flatnonzero((table.numbers("solution") > 0) & ~table.has(IS_TEXT))
    _, first = np.unique(table.numbers("key")[solved], return_index=True)  # of equal questions
    solved = solved[np.sort(first)]
    if len(solved) < k:
        raise ValueError(
            f"{k} worked examples: only {len(solved)} problems have a solution; "
            f"use --shots {len(solved)}, or data with more of them"
        )
    n_short = max(k, len(solved) // 3)
    # the middle of the i-th of k equal parts of the shortest third
    places = [(2 * i + 1) * n_short // (2 * k) for i in range(k)]
    shots = _by_length(table.select(solved), places)
    shown = [question_key(shot) for shot in shots]
    rest = ~np.isin(table.numbers("key"), np.array(shown, dtype=np.uint64))
    return tuple(shots), table.select(rest)


def _by_length(table: ProblemTable, places: Sequence[int]) -> list[Problem]:
    """Return the problems at some places of the order by length of the solution, then by id."""
    lengths = table.numbers("solution")
    order = np.argsort(lengths, kind="stable")
    found = []
    for place in places:
        length = lengths[order[place]]
        equal = sorted(table.select(lengths == length), key=lambda problem: problem.id)
        n_shorter = int(np.count_nonzero(lengths < length))
        found.append(equal[place - n_shorter])
    return found


def fingerprint(problems: Sequence[Problem]) -> str:
    """Return the sha256 (hex) of everything that the problems hold, in order.

    A column that JSON cannot express counts by its `str`.
    """
    return ProblemTable.of(problems).fingerprint


def same_fingerprint(problems: Sequence[Problem], recorded: object) -> bool:
    """Return whether a record is the fingerprint of these problems.

    Versions up to 0.1.0 hashed a line of JSON for each problem, which takes 12 s for a million.
    """
    if recorded == fingerprint(problems):
        return True
    digest = hashlib.sha256()
    for problem in problems:
        line = json.dumps(asdict(problem), sort_keys=True, default=str)
        digest.update(line.encode() + b"\n")
    return recorded == digest.hexdigest()


def overlap(train: Sequence[Problem], evaluation: Sequence[Problem]) -> ProblemTable:
    """Return the problems of `evaluation` whose question is also in `train`.

    Case and spaces are ignored.
    """
    table = ProblemTable.of(evaluation)
    return table.select(_in_both(train, table))


def without(problems: Sequence[Problem], removed: Sequence[Problem]) -> ProblemTable:
    """Return the problems whose question is not one of the removed ones."""
    table = ProblemTable.of(problems)
    return table.select(~_in_both(removed, table))


def _in_both(train: Sequence[Problem], table: ProblemTable) -> np.ndarray:
    return np.isin(table.numbers("key"), ProblemTable.of(train).numbers("key"))


def _of_levels(problems: ProblemTable, levels: Sequence[int], source: str) -> ProblemTable:
    if not levels:
        return problems
    own = problems.numbers("level")
    kept = problems.select(np.isin(own, levels))
    if kept:
        return kept
    present = np.unique(own[own != NO_LEVEL])
    wanted = ", ".join(map(str, levels))
    found = ", ".join(map(str, present)) or "none"
    raise ValueError(f"{source}: no problem of level {wanted}; levels present: {found}")


def subset(problems: Sequence[Problem], limit: int | None, seed: int) -> ProblemTable:
    """Return a random subset of the size `limit`, in order; None: all. Subsets are nested."""
    table = ProblemTable.of(problems)
    if limit is None or limit >= len(table):
        return table
    order = list(range(len(table)))
    random.Random(seed).shuffle(order)
    return table.select(np.sort(order[:limit]))
