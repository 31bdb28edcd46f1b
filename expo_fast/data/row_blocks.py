"""Blocks of problems: compact bytes, and the numbers that checks of a large data set need.

A `Problem` of short texts takes a kilobyte of memory, and most of it is Python objects. A block
keeps problems as bytes, of which `decode` makes one problem at a time. Numbers of each problem,
such as the hash of its question, are computed once, when its row is read. So the checks and the
choices before a run are operations on arrays, and do not make a million problems several times.

This module runs in the processes that read large files, so it imports neither numpy nor torch.
"""

import hashlib
import marshal
import pickle
import unicodedata
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from expo_fast.data.answer_grading import MAX_CHARS, last_boxed
from expo_fast.data.files import Row
from expo_fast.data.problem import Problem, question_text
from expo_fast.data.row_reading import RowOptions, read_row

MARSHAL_VERSION = 2  # later versions write the same value in several ways
PICKLE = b"\x80"[0]  # the first byte of a pickle
ROWS_OF_A_BLOCK = 4096
LARGEST = 2**31 - 1  # a level
NO_LEVEL = -(2**31)

# Bits of `flags`
IS_TEXT = 1
HAS_ANSWER = 2
HAS_SOLUTION = 4
HAS_PAIR = 8
HAS_BOX = 16
"""The chosen text of the pair, or else the solution, has a box."""
MAY_DIFFER = 32
"""The box of the solution may differ from the answer."""

PLAIN = (str, int, float, bool, type(None))

# The numbers of each problem, with their type codes of `array`
NUMBERS = {
    "key": "Q",  # first 8 bytes of the sha256 of the question, without case and spaces
    "id_crc": "I",  # crc32 of the id
    "place": "I",  # line of its file
    "asked": "I",  # most tokens of the question and the answer
    "trained": "I",  # most tokens of the solution, or of the longer text of the pair
    "solution": "I",  # characters of the solution
    "level": "i",  # NO_LEVEL: none
    "form": "I",  # crc32 of the roles of the prompt
    "flags": "H",
}
OWN_NUMBERS = [name for name in NUMBERS if name != "place"]


@dataclass
class Block:
    """Consecutive problems of one file."""

    file: str
    """What the places of the rows begin with: "data/a.jsonl"."""
    content: bytes
    ends: array
    """The end of each problem in `content`."""
    numbers: dict[str, array]
    """The columns of NUMBERS."""
    names: set[str]
    """Names of the other columns of all rows."""
    pickled: list[int]
    """Indices of the problems that are pickled, because a column is no JSON value."""

    def __len__(self) -> int:
        return len(self.ends)


def make_block(
    file: str, problems: Sequence[Problem], places: Sequence[int] | None = None
) -> Block:
    """Return the problems of a file as a block.

    places: the line of each. None: they have no lines.
    """
    contents = [encode(problem) for problem in problems]
    names: set[str] = set()
    for problem in problems:
        if not names.issuperset(problem.columns):
            names.update(problem.columns)
    columns = (
        zip(*map(numbers_of, problems), strict=True) if problems else [()] * (len(NUMBERS) - 1)
    )
    numbers = {"place": array(NUMBERS["place"], places or [0] * len(problems))}
    for name, values in zip(OWN_NUMBERS, columns, strict=True):
        numbers[name] = array(NUMBERS[name], values)
    return Block(
        file=file,
        content=b"".join(contents),
        ends=array("Q", accumulate(map(len, contents))),
        numbers=numbers,
        names=names,
        pickled=[i for i, content in enumerate(contents) if content[0] == PICKLE],
    )


def blocks_of(rows: Iterable[Row], options: RowOptions) -> Iterator[Block]:
    """Yield the problems of rows in blocks. Raise ValueError for a bad row."""
    file = ""
    problems: list[Problem] = []
    places: list[int] = []
    for row in rows:
        own_file, _, place = row.where.rpartition(":")
        if own_file != file or len(problems) == ROWS_OF_A_BLOCK:
            if problems:
                yield make_block(file, problems, places)
            file = own_file
            problems = []
            places = []
        problems.append(read_row(row, options))
        places.append(int(place))
    if problems:
        yield make_block(file, problems, places)


# Bytes


def encode(problem: Problem) -> bytes:
    """Return the bytes of a problem. Columns are sorted by name."""
    columns: Mapping[str, object] = problem.columns
    if columns:
        columns = {name: columns[name] for name in sorted(columns)}
    parts: Any = (
        problem.id,
        problem.prompt,
        problem.answer,
        problem.solution,
        problem.level,
        columns,
        problem.pair,
    )
    if is_plain(columns):
        return marshal.dumps(parts, MARSHAL_VERSION)
    return pickle.dumps(parts, protocol=4)


def decode(content: bytes | bytearray | memoryview) -> Problem:
    """Return the problem of bytes of `encode`."""
    load = pickle.loads if content[0] == PICKLE else marshal.loads
    return Problem(*load(content))


def is_plain(value: object) -> bool:
    """Return whether a value consists of lists, dicts and the simple values of JSON."""
    if type(value) in PLAIN:
        return True
    if type(value) is dict:
        return all(map(is_plain, value)) and all(map(is_plain, value.values()))
    return type(value) is list and all(map(is_plain, value))


# Numbers


def numbers_of(problem: Problem) -> tuple[int, ...]:
    """Return the numbers of a problem, in the order of OWN_NUMBERS."""
    solution = problem.solution or ""
    return (
        question_key(problem),
        zlib.crc32(problem.id.encode()),
        most_tokens(problem.prompt) + most_tokens(problem.answer),
        max(map(most_tokens, problem.pair)) if problem.pair else most_tokens(solution),
        len(solution),
        level_number(problem.level),
        form_of(problem),
        flags_of(problem),
    )


def question_key(problem: Problem) -> int:
    """Return the first 8 bytes of the sha256 of the question, without case and spaces."""
    digest = hashlib.sha256(question_text(problem).encode()).digest()
    return int.from_bytes(digest[:8])


def most_tokens(value: str | tuple[dict[str, str], ...]) -> int:
    """Return a number of tokens that no tokenizer exceeds for a text, or the texts of a chat.

    A token of a tokenizer with all bytes has at least one byte of the text, after Unicode
    normalization. The compatibility decomposition (NFKD) is the longest normal form.
    """
    if isinstance(value, str):
        if value.isascii():
            return len(value)
        decomposed = unicodedata.normalize("NFKD", value)
        return max(len(value.encode()), len(decomposed.encode()))
    return sum(most_tokens(part) for message in value for part in message.values())


def level_number(level: int | None) -> int:
    """Return a level as a number of 32 bits."""
    return NO_LEVEL if level is None else max(-LARGEST, min(level, LARGEST))


def form_of(problem: Problem) -> int:
    """Return a hash of what decides the turns of a prompt: its roles and their other fields."""
    if isinstance(problem.prompt, str):
        return 1 if problem.prompt else 0
    turns = [(turn["role"], *sorted(turn)) for turn in problem.prompt]
    return zlib.crc32(repr((bool(problem.prefill), turns)).encode())


def flags_of(problem: Problem) -> int:
    """Return the flags of a problem."""
    flags = HAS_ANSWER if problem.answer else 0
    if not problem.prompt:
        flags |= IS_TEXT
    text = problem.solution or ""
    if problem.solution is not None:
        flags |= HAS_SOLUTION
        if problem.answer and may_differ(problem.answer, problem.solution):
            flags |= MAY_DIFFER
    if problem.pair is not None:
        flags |= HAS_PAIR
        text = problem.pair[0]
    if "\\boxed" in text:
        flags |= HAS_BOX
    return flags


def may_differ(answer: str, solution: str) -> bool:
    r"""Return False if a solution surely boxes the answer, or gets a box with it.

    A solution ends most often with the only `\boxed{...}`, which is the answer as it is written.
    """
    if "\\boxed" not in solution:
        return len(answer) > MAX_CHARS // 2 or any(mark in answer for mark in "{}\\")
    start = solution.rfind("\\boxed{")
    rest = solution[start + len("\\boxed{") :]
    if start >= 0 and rest.startswith(answer + "}") and "box" not in rest:
        return "</think>" in rest
    return last_boxed(solution) != answer
