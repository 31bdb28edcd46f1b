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
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from expo_fast.data.answer_grading import reason_against_reference
from expo_fast.data.columns import (
    Message,
    read_id,
    read_level,
    read_prompt,
    read_reply,
    shown,
)
from expo_fast.data.files import Row
from expo_fast.data.row_forms import (
    QUESTION_COLUMNS,
    Answer,
    extract_question,
    find_answer,
    parse_names,
    remove_nulls,
    rename,
)
from expo_fast.data.sources import read_rows

RENDERING_COLUMNS = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Problem:
    """A question with its known answer."""

    id: str
    # The question, or chat messages (see read_prompt); "" if the solution is plain text.
    prompt: str | tuple[Message, ...]
    answer: str  # the final answer alone; "" if the row has none
    solution: str | None = None  # the expert's chain of thought, or another text to train on
    level: int | None = None
    columns: Mapping[str, object] = field(default_factory=dict)  # the other columns of the row
    pair: tuple[str, str] | None = None  # a chosen and a rejected answer, if the row has them

    @property
    def is_text(self) -> bool:
        """Whether the problem is plain text to train on, without a question."""
        return self.prompt == ""

    @property
    def prefill(self) -> str:
        """The beginning of the answer, which the prompt ends with; "" if there is none."""
        if isinstance(self.prompt, str) or self.prompt[-1]["role"] != "assistant":
            return ""
        return self.prompt[-1]["content"]


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
) -> list[Problem]:
    """Read, check and select the problems of `source` (see the module's docstring).

    Raises FileNotFoundError for a missing file. Raises ValueError for a bad row, an empty data set,
    a level that no problem has, an unknown built-in data set, and a hub data set that cannot be
    loaded.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: ask for at least one problem of {source}")
    names = {} if source.startswith("builtin:") else parse_names(columns)
    rows = read_rows(source, levels=levels, limit=limit, seed=seed, data_dir=data_dir)
    read = (
        (row.where, _problem(row, names, all_columns=all_columns, answers=answers)) for row in rows
    )
    problems = _with_distinct_ids(read)
    if not problems:
        raise ValueError(f"{source}: holds no problem; give a data set with at least one row")
    return subset(_of_levels(problems, levels, source), limit, seed)


def _with_distinct_ids(read: Iterable[tuple[str, Problem]]) -> list[Problem]:
    """Return the problems, given with their places.

    An id that another file of the source has gets the number of its file: `7@2`. Raise ValueError
    if a file has an id twice.
    """
    first: dict[str, str] = {}  # id -> where it was seen
    files: dict[str, int] = {}  # file -> its number
    problems = []
    for where, problem in read:
        file = where.rpartition(":")[0]
        number = files.setdefault(file, len(files) + 1)
        if problem.id in first and first[problem.id].rpartition(":")[0] != file:
            problem = replace(problem, id=f"{problem.id}@{number}")
        if problem.id in first:
            raise ValueError(
                f"{where}: id {problem.id!r} is that of {first[problem.id]}; ids must differ"
            )
        first[problem.id] = where
        problems.append(problem)
    return problems


def join_sources(parts: Sequence[Sequence[Problem]]) -> list[list[Problem]]:
    """Return the problems of several sources with distinct ids.

    An id that an earlier source has gets the number of its source: `7@2`.
    """
    seen: set[str] = set()
    joined = []
    for number, part in enumerate(parts, 1):
        distinct = []
        for problem in part:
            if problem.id in seen:
                problem = replace(problem, id=f"{problem.id}@{number}")
            distinct.append(problem)
        seen |= {problem.id for problem in distinct}
        joined.append(distinct)
    return joined


def hold_out(problems: Sequence[Problem], fraction: float, limit: int) -> list[Problem]:
    """Return the problems to hold out for evaluation, in the order of the data.

    A question is held out if its hash is among the lowest `fraction` of all hashes, so the choice
    does not change if rows are added or in another order. Of more than `limit` questions, those
    with the lowest hashes are held out. At least one is. Each question is held out once.
    """
    by_question: dict[str, Problem] = {}  # the first problem of several
    for problem in problems:
        by_question.setdefault(question_text(problem), problem)
    places = {question: _place(question) for question in by_question}
    order = sorted(by_question, key=places.__getitem__)
    n_below = sum(place < fraction for place in places.values())
    chosen = set(order[: min(limit, max(1, n_below))])
    return [problem for question, problem in by_question.items() if question in chosen]


def _place(question: str) -> float:
    """Return the place of a question's hash among all hashes, from 0 to 1."""
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def worked_examples(
    problems: Sequence[Problem], k: int
) -> tuple[tuple[Problem, ...], list[Problem]]:
    """Return k problems to show with their solutions, and the other problems.

    The examples are spread evenly over the shortest third of the solutions, so they are short and
    yet of different kinds. No question of an example is among the other problems.

    Raises ValueError if fewer than k problems have a solution.
    """
    if k < 0:
        raise ValueError(f"{k} worked examples: ask for 0 or more")
    solved: dict[str, Problem] = {}  # by question; the first of several
    for problem in problems:
        if problem.solution and not problem.is_text:
            solved.setdefault(question_text(problem), problem)
    if len(solved) < k:
        raise ValueError(
            f"{k} worked examples: only {len(solved)} problems have a solution; "
            f"use --shots {len(solved)}, or data with more of them"
        )
    by_length = sorted(solved.values(), key=_solution_length)
    short = by_length[: max(k, len(by_length) // 3)]
    shots = []
    for i in range(k):
        # the middle of the i-th of k equal parts
        shots.append(short[(2 * i + 1) * len(short) // (2 * k)])
    questions = {question_text(shot) for shot in shots}
    rest = [problem for problem in problems if question_text(problem) not in questions]
    return tuple(shots), rest


def split_examples(
    candidates: Sequence[Problem], k: int, problems: Sequence[Problem]
) -> tuple[tuple[Problem, ...], list[Problem]]:
    """Return k worked examples of the candidates, and the problems that are none of them."""
    shots, _ = worked_examples(candidates, k)
    shown = overlap(shots, problems)
    return shots, [problem for problem in problems if problem not in shown]


def _solution_length(problem: Problem) -> tuple[int, str]:
    return len(problem.solution or ""), problem.id


def fingerprint(problems: Iterable[Problem]) -> str:
    """Return the sha256 (hex) of everything that the problems hold, in order.

    A column that JSON cannot express counts by its `str`.
    """
    digest = hashlib.sha256()
    for problem in problems:
        line = json.dumps(asdict(problem), sort_keys=True, default=str)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def overlap(train: Iterable[Problem], evaluation: Iterable[Problem]) -> list[Problem]:
    """Return the problems of `evaluation` whose question is also in `train`.

    Case and spaces are ignored.
    """
    seen = {question_text(problem) for problem in train}
    return [problem for problem in evaluation if question_text(problem) in seen]


def question_text(problem: Problem) -> str:
    """Return the question, or the plain text, without case and spaces, to recognize equal ones.

    The question of a chat is all its turns, because the last one may be the same in many chats
    ("Now the final answer."). Messages of the system do not count, nor does the beginning of the
    answer.
    """
    text = problem.solution or "" if problem.is_text else _turns_asked(problem)
    text = unicodedata.normalize("NFC", text)
    return "".join(text.casefold().split())


def _turns_asked(problem: Problem) -> str:
    if isinstance(problem.prompt, str):
        return problem.prompt
    asked = problem.prompt[:-1] if problem.prefill else problem.prompt
    return "\n".join(turn["content"] for turn in asked if turn["role"] != "system")


def last_question(problem: Problem) -> str:
    """Return the question as it is, and of a chat the user's last message."""
    prompt = problem.prompt
    if isinstance(prompt, str):
        return prompt
    return prompt[-2 if problem.prefill else -1]["content"]


def _of_levels(
    problems: list[Problem],
    levels: Sequence[int],
    source: str,
) -> list[Problem]:
    if not levels:
        return problems
    kept = [problem for problem in problems if problem.level in levels]
    if kept:
        return kept
    present = {problem.level for problem in problems if problem.level is not None}
    wanted = ", ".join(map(str, levels))
    found = ", ".join(map(str, sorted(present))) or "none"
    raise ValueError(f"{source}: no problem of level {wanted}; levels present: {found}")


def subset(problems: list[Problem], limit: int | None, seed: int) -> list[Problem]:
    """Return a random subset of the size `limit`, in order; None: all. Subsets are nested."""
    order = list(range(len(problems)))
    random.Random(seed).shuffle(order)
    chosen = sorted(order[:limit])
    return [problems[i] for i in chosen]


def _problem(row: Row, names: Mapping[str, str], *, all_columns: bool, answers: bool) -> Problem:
    where = row.where
    if not isinstance(row.value, Mapping):
        raise ValueError(f"{where}: a row must be a JSON object, not {shown(row.value)}")
    columns: dict[str, object] = dict(row.value)
    rename(where, columns, names, required=all_columns)
    remove_nulls(columns)
    question = extract_question(where, columns)
    if question is None and "text" in columns:
        return _plain_text(where, columns, answers=answers)
    pair = _pair(where, columns)
    missing = _missing(question, columns)
    answer = find_answer(where, columns, required=answers and pair is None)
    if question is None or (answers and answer is None and not pair):
        raise ValueError(f"{where}: {missing}")
    answer = answer or Answer("")
    if answers and answer.text:
        _check_answer(where, answer.text)
    prompt = read_prompt(f"{where}: {question}", columns.pop(question))
    if not isinstance(prompt, str):
        _refuse_rendering_options(where, columns)
    level = read_level(f"{where}: level", columns.pop("level", None))
    return Problem(
        id=_id(where, columns.pop("id", None)),
        prompt=prompt,
        answer=answer.text,
        solution=answer.solution,
        level=level,
        columns=columns,
        pair=pair,
    )


def _check_answer(where: str, answer: str) -> None:
    """Raise ValueError if attempts cannot be judged by an answer."""
    reason = reason_against_reference(answer)
    if reason is not None:
        raise ValueError(
            f"{where}: no attempt can be judged by the answer {shown(answer)}: {reason}; correct "
            "it, or remove the row"
        )


def _plain_text(where: str, columns: dict[str, object], *, answers: bool) -> Problem:
    """Return the problem of a row with `text` and no question."""
    if answers:
        raise ValueError(
            f"{where}: the row has 'text' and no question: only --method sft trains on plain text"
        )
    text = columns.pop("text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: text must be text that is not empty, not {shown(text)}")
    id_ = _id(where, columns.pop("id", None))
    level = read_level(f"{where}: level", columns.pop("level", None))
    return Problem(id_, prompt="", answer="", solution=text, level=level, columns=columns)


def _refuse_rendering_options(where: str, columns: Mapping[str, object]) -> None:
    """Raise ValueError for columns with which TRL renders the chat messages of a row."""
    for name in RENDERING_COLUMNS:
        if columns.get(name):
            raise ValueError(
                f"{where}: TRL renders chat messages with the column {name!r}, which is not "
                f"supported: remove it, or rename it to keep it for reward functions"
            )


def _missing(question: str | None, columns: Mapping[str, object]) -> str:
    wanted = "'answer'" if question else " or ".join(map(repr, QUESTION_COLUMNS))
    present = ", ".join(map(repr, columns)) or "none"
    name = "answer" if question else "prompt"
    advice = f"--columns {name}=COLUMN names a column that is called otherwise"
    return f"no column {wanted}; the row has {present}; {advice}"


def _pair(where: str, columns: dict[str, object]) -> tuple[str, str] | None:
    """Remove a preference pair from the columns and return it, None if there is none."""
    if not {"chosen", "rejected"} <= columns.keys():
        return None
    chosen = read_reply(f"{where}: chosen", columns.pop("chosen"))
    rejected = read_reply(f"{where}: rejected", columns.pop("rejected"))
    if chosen == rejected:
        raise ValueError(f"{where}: chosen and rejected are the same text: {shown(chosen)}")
    return chosen, rejected


def _id(where: str, value: object) -> str:
    if value is None:
        return where.rpartition("/")[2]  # without the folder, which may change between two runs
    return read_id(f"{where}: id", value)
