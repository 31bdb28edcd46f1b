"""Problems: questions with known answers, from JSONL files, hub data sets or our own generator.

A source is a path to JSON lines (gzipped or not), `hub:ORG/NAME[/CONFIG][:SPLIT]`, or
`builtin:NAME[:SPLIT]`. Each row has a question in `prompt`, `problem` or `question`, as text or as
chat messages; an `answer`; and perhaps a `solution`, a `level` and an `id`. An answer in the style
of GSM8K, "... reasoning ... #### 42" with no solution beside it, becomes a solution and an answer.

Data are checked whole before anything is built on them: the first bad row is a ValueError that
names its file, line and value.
"""

import codecs
import gzip
import hashlib
import json
import math
import random
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from expo_fast.data import arithmetic

QUESTION_COLUMNS = ("prompt", "problem", "question")  # the first that a row has is its question
# of all levels, or of one: builtin:arithmetic-2
BUILTINS = {"arithmetic": ()} | {f"arithmetic-{n}": (n,) for n in arithmetic.LEVELS}
LINE_BYTES = 8 << 20  # a longer line is no row of text
NESTING = 64  # lists and objects inside one another

HUB_NAME = re.compile(r"([^/:]+/[^/:]+)(?:/([^/:]+))?(?::(.+))?")
GSM8K_ANSWER = re.compile(r"(?P<solution>.*?)\s*####\s*(?P<answer>[^#\n]*?)\s*", re.DOTALL)
GSM8K_CALCULATOR = re.compile(r"<<[^<>]*>>")  # marks for a tool: "4*6=<<4*6=24>>24"
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
LEVEL = re.compile(r"(?:level )?(\d{1,9}|\?)", re.IGNORECASE)  # "Level ?": MATH has two, = none

Rows = Iterator[tuple[str, object]]  # (where, row); where is what errors name: "data/a.jsonl:7"


@dataclass(frozen=True)
class Problem:
    id: str
    prompt: str | tuple[dict[str, str], ...]  # the question, or chat messages ending in a user turn
    answer: str  # final answer only; "" where the row has a pair instead
    solution: str | None = None  # the expert's chain of thought
    level: int | None = None
    columns: Mapping[str, object] = field(default_factory=dict)  # the row's other columns
    pair: tuple[str, str] | None = None  # a chosen and a rejected answer, where the row has them


def load_problems(
    source: str,
    *,
    levels: Sequence[int] = (),  # keep only these; () keeps all
    limit: int | None = None,  # of a generator: how many it makes; else a random subset, in order
    seed: int = 0,  # of the generator or the subset; subsets of one seed are nested
) -> list[Problem]:
    """Read, check and select the problems of `source` (see the module's docstring).

    Raises FileNotFoundError for a missing file, and ValueError for a bad row, an empty data set,
    a level that no problem has, an unknown built-in or a hub data set that can't be had.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: ask for at least one problem of {source}")
    kind, _, name = source.partition(":")
    if kind == "builtin":
        rows = _builtin_rows(name, levels, limit, seed)
    else:
        rows = _hub_rows(name) if kind == "hub" else _file_rows(Path(source).expanduser())
    problems = _all_distinct((where, _problem(where, row)) for where, row in rows)
    if not problems:
        raise ValueError(f"{source}: holds no problem; give a data set with at least one row")
    return _subset(_of_levels(problems, levels, source), limit, seed)


def worked_examples(
    problems: Sequence[Problem], k: int
) -> tuple[tuple[Problem, ...], list[Problem]]:
    """k problems to show with their solutions, and the problems left.

    The shots are spread evenly over the shortest third of the solutions: brief enough for a prompt,
    yet not all of one kind. No question of a shot is left among the rest.
    """
    if k < 0:
        raise ValueError(f"{k} worked examples: ask for 0 or more")
    solved = {question_text(p): p for p in reversed(problems) if p.solution}
    if len(solved) < k:
        raise ValueError(
            f"{k} worked examples: only {len(solved)} problems have a solution; "
            f"use --shots {len(solved)}, or data with more of them"
        )
    by_length = sorted(solved.values(), key=lambda p: (len(p.solution or ""), p.id))
    short = by_length[: max(k, len(by_length) // 3)]
    shots = tuple(short[(2 * i + 1) * len(short) // (2 * k)] for i in range(k))
    shown = {question_text(shot) for shot in shots}
    return shots, [p for p in problems if question_text(p) not in shown]


def fingerprint(problems: Iterable[Problem]) -> str:
    """sha256 hex of all that the problems hold, in order. A column JSON lacks counts by its str."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps(asdict(problem), sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def overlap(train: Iterable[Problem], evaluation: Iterable[Problem]) -> list[Problem]:
    """The problems of `evaluation` whose question, but for case and spaces, is in `train` too."""
    seen = {question_text(problem) for problem in train}
    return [problem for problem in evaluation if question_text(problem) in seen]


def question_text(problem: Problem) -> str:
    """The question (of a chat: its last turn) without case and spaces, to tell equal ones."""
    text = unicodedata.normalize("NFC", last_question(problem))
    return "".join(text.casefold().split())


def last_question(problem: Problem) -> str:
    """The question as it stands (of a chat: its last turn)."""
    prompt = problem.prompt
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _of_levels(problems: list[Problem], levels: Sequence[int], source: str) -> list[Problem]:
    kept = [problem for problem in problems if not levels or problem.level in levels]
    if kept:
        return kept
    present = sorted({problem.level for problem in problems if problem.level is not None})
    raise ValueError(
        f"{source}: no problem of level {_listed(levels)}; levels present: {_listed(present)}"
    )


def _subset(problems: list[Problem], limit: int | None, seed: int) -> list[Problem]:
    order = list(range(len(problems)))
    random.Random(seed).shuffle(order)
    return [problems[i] for i in sorted(order[:limit])]


def _all_distinct(problems: Iterable[tuple[str, Problem]]) -> list[Problem]:
    first: dict[str, str] = {}  # id -> where it was seen
    kept = []
    for where, problem in problems:
        if problem.id in first:
            raise ValueError(
                f"{where}: id {problem.id!r} is that of {first[problem.id]}; ids must differ"
            )
        first[problem.id] = where
        kept.append(problem)
    return kept


def _builtin_rows(name: str, levels: Sequence[int], limit: int | None, seed: int) -> Rows:
    name, _, split = name.partition(":")
    if name not in BUILTINS:
        raise ValueError(
            f"builtin:{name}: no such data set; the built-in ones: {_listed(BUILTINS)}"
        )
    levels = BUILTINS[name] or levels
    for number, row in enumerate(arithmetic.rows(split or "train", levels, limit, seed), 1):
        yield f"builtin:{name}:{number}", row


def _hub_rows(name: str) -> Rows:
    parts = HUB_NAME.fullmatch(name)
    if parts is None:
        raise ValueError(f"hub:{name}: write hub:ORG/NAME, hub:ORG/NAME/CONFIG or one with :SPLIT")
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"hub:{name}: needs a package: pip install datasets") from error
    path, config, split = parts.groups()
    try:
        rows = datasets.load_dataset(path, config, split=split or "train")
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"hub:{name}: can't be loaded: {reason}") from error
    for number, row in enumerate(rows, 1):
        yield f"hub:{name}:{number}", row


def _file_rows(path: Path) -> Rows:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a JSONL file in it")
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file; for data of the hub write hub:ORG/NAME, for ours builtin:NAME"
        )
    for number, line in enumerate(_lines(path), 1):
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if text.strip():
            yield f"{path}:{number}", _parse(f"{path}:{number}", text)


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as raw:
        zipped = raw.peek(2)[:2] == b"\x1f\x8b"
        lines = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if zipped else raw
        number = 0
        try:
            while line := lines.readline(LINE_BYTES + 1):
                number += 1
                if len(line) > LINE_BYTES:
                    raise ValueError(f"{path}:{number}: a line of more than {LINE_BYTES >> 20} MiB")
                yield line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{path}:{number + 1}: the gzip is cut short or damaged ({error}); get it again"
            ) from error


def _parse(where: str, line: bytes) -> object:
    try:
        row = json.loads(line.decode(), object_pairs_hook=_object)
        json.dumps(row, ensure_ascii=False).encode()  # an escaped half of a character can't be
        if _depth(row) > NESTING:
            raise RecursionError
        return row
    except json.JSONDecodeError as error:
        shown = _shown(error.doc[error.pos :])
        raise ValueError(f"{where}:{error.colno}: not JSON ({error.msg}): {shown}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start + 1} of the line") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{where}: {half!a} is half a character (a lone surrogate)") from error
    except RecursionError as error:
        raise ValueError(f"{where}: nested more than {NESTING} deep") from error
    except ValueError as error:  # a key twice, or an integer of thousands of digits
        raise ValueError(f"{where}: {error}") from error


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice; keep one")
    return row


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def _problem(where: str, row: object) -> Problem:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a row must be a JSON object, not {_shown(row)}")
    columns: dict[str, object] = dict(row)
    question = next((name for name in QUESTION_COLUMNS if name in columns), None)
    pair = _pair(where, columns)
    if question is None or not (pair or "answer" in columns):
        raise ValueError(f"{where}: {_missing(question, columns)}")
    prompt = _prompt(f"{where}: {question}", columns.pop(question))
    answer = columns.pop("answer", "")
    answer = _answer(f"{where}: answer", answer) if answer or not pair else ""
    solution = _solution(f"{where}: solution", columns.pop("solution", None))
    if solution is None and (match := GSM8K_ANSWER.fullmatch(answer)):
        solution = GSM8K_CALCULATOR.sub("", match["solution"]).strip() or None
        answer = _answer(f"{where}: answer", THOUSANDS.sub("", match["answer"]))
    level = _level(f"{where}: level", columns.pop("level", None))
    name = _id(where, columns.pop("id", None))
    return Problem(name, prompt, answer, solution, level, columns, pair)


def _missing(question: str | None, columns: Mapping[str, object]) -> str:
    wanted = "'answer'" if question else " or ".join(map(repr, QUESTION_COLUMNS))
    return f"no column {wanted}; the row has {_listed(map(repr, columns))}"


def _pair(where: str, columns: dict[str, object]) -> tuple[str, str] | None:
    """A preference pair: texts, or lists of the one message that answers the prompt."""
    if not {"chosen", "rejected"} <= columns.keys():
        return None
    chosen, rejected = (
        _reply(f"{where}: {name}", columns.pop(name)) for name in ("chosen", "rejected")
    )
    if chosen == rejected:
        raise ValueError(f"{where}: chosen and rejected are the same text: {_shown(chosen)}")
    return chosen, rejected


def _reply(what: str, value: object) -> str:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    if isinstance(value, str) and value.strip():
        return value
    raise ValueError(
        f"{what} must be text that is not empty, or a list of one chat message that answers the "
        f"prompt, not {_shown(value)}"
    )


def _prompt(what: str, value: object) -> str | tuple[dict[str, str], ...]:
    if isinstance(value, str) and value.strip():
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{what} must be text that is not empty or a list of chat messages, not {_shown(value)}"
        )
    turns = tuple(_turn(what, turn) for turn in value)
    if turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
        raise ValueError(
            f"{what}: the last message must be the user's question: {_shown(value[-1])}"
        )
    return turns


def _turn(what: str, value: object) -> dict[str, str]:
    """A chat message. A null in it is as good as absent: tables of the hub fill up with them."""
    parts = value if isinstance(value, dict) else {}
    turn = {name: part for name, part in parts.items() if part is not None}
    if not {"role", "content"} <= turn.keys() or not _all_text(turn.values()):
        raise ValueError(
            f"{what}: a chat message needs text in role and content, and no other kind of value "
            f"beside them: {_shown(value)}"
        )
    return turn


def _answer(what: str, value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise ValueError(f"{what} must be text that is not empty or a number, not {_shown(value)}")


def _solution(what: str, value: object) -> str | None:
    if value is None or isinstance(value, str):
        return (value or "").strip() or None
    raise ValueError(f"{what} must be text, not {_shown(value)}")


def _level(what: str, value: object) -> int | None:
    if isinstance(value, str) and (match := LEVEL.fullmatch(value.strip())):
        value = None if match[1] == "?" else int(match[1])
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise ValueError(
        f"{what} must be a whole number or text such as 'Level 5', not {_shown(value)}"
    )


def _id(where: str, value: object) -> str:
    if value is None:
        return where.rpartition("/")[2]  # the file may move to another folder between two runs
    if isinstance(value, int | str) and not isinstance(value, bool) and str(value).strip():
        return str(value)
    raise ValueError(
        f"{where}: id must be text that is not empty or an integer, not {_shown(value)}"
    )


def _all_text(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values)) or "none"


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
