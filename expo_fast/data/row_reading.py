"""Make a problem of a data row, in any of the forms that row_forms.py lists."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expo_fast.data.answer_grading import reason_against_reference
from expo_fast.data.columns import read_id, read_level, read_prompt, read_reply, shown
from expo_fast.data.files import Row
from expo_fast.data.problem import Problem
from expo_fast.data.row_forms import (
    KNOWN_COLUMNS,
    QUESTION_COLUMNS,
    Answer,
    extract_question,
    find_answer,
    remove_nulls,
    rename,
)

RENDERING_COLUMNS = ("tools", "chat_template_kwargs")

USUAL_COLUMNS = {*QUESTION_COLUMNS, "answer", "solution", "level", "id"}
# Columns that may contain the question, the answer or the solution
OTHER_FORMS = frozenset(KNOWN_COLUMNS) - USUAL_COLUMNS - {"input", "output", "text"}


@dataclass(frozen=True)
class RowOptions:
    """Options that decide which columns of a row are read, and which ones it needs."""

    names: Mapping[str, str]
    """The row's own name of a column, by the name that is read, as `parse_names` returns them."""
    all_columns: bool = True
    """Whether a row needs every column of `names`."""
    answers: bool = True
    """Whether a row needs an answer to judge by, or a pair."""


def read_row(row: Row, options: RowOptions) -> Problem:
    """Return the problem of a row. Raise ValueError, with its place, for a bad row."""
    where = row.where
    usual = None if options.names else _usual_row(where, row.value, options)
    if usual is not None:
        return usual
    answers = options.answers
    if not isinstance(row.value, Mapping):
        raise ValueError(f"{where}: a row must be a JSON object, not {shown(row.value)}")
    columns: dict[str, object] = dict(row.value)
    rename(where, columns, options.names, required=options.all_columns)
    remove_nulls(columns)
    question = extract_question(where, columns)
    if question is None and "text" in columns:
        return _plain_text(where, columns, answers=answers)
    pair = _pair(where, columns)
    present = tuple(columns)
    answer = find_answer(where, columns, required=answers and pair is None)
    if question is None:
        _refuse_null_question(where, row.value)
    if question is None or (answers and answer is None and not pair):
        raise ValueError(f"{where}: {_missing(question, present)}")
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


def _usual_row(where: str, row: object, options: RowOptions) -> Problem | None:
    """Return the problem of a row with texts in `answer` and one column for the question.

    Return None for a row of another form. This is three times as fast as the forms together, which
    matters for a million rows.
    """
    if type(row) is not dict or not OTHER_FORMS.isdisjoint(row):
        return None
    asked = [name for name in QUESTION_COLUMNS if name in row]
    answer = row.get("answer")
    solution = row.get("solution")
    if len(asked) != 1 or type(answer) is not str or "####" in answer:
        return None
    question = row[asked[0]]
    answer = answer.strip()
    if type(question) is not str or not question.strip() or not answer:
        return None
    if type(solution) is not str and solution is not None:
        return None
    if options.answers:
        _check_answer(where, answer)
    columns = {name: value for name, value in row.items() if name not in USUAL_COLUMNS}
    return Problem(
        id=_id(where, row.get("id")),
        prompt=question,
        answer=answer,
        solution=(solution or "").strip() or None,
        level=read_level(f"{where}: level", row.get("level")),
        columns=columns,
    )


def _check_answer(where: str, answer: str) -> None:
    """Raise ValueError if attempts cannot be judged by an answer."""
    if answer.isdigit() and len(answer) < 20:  # the common case, in which a check takes longest
        return
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


def _refuse_null_question(where: str, row: Mapping[str, object]) -> None:
    """Raise ValueError if a row without a question has a column for it."""
    for name in QUESTION_COLUMNS:
        if name in row:
            raise ValueError(f"{where}: {name} is null: write the question, or remove the row")


def _missing(question: str | None, columns: Sequence[str]) -> str:
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
