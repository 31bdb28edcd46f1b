r"""Convert data rows of other trainers to one form: a question, and an answer or a pair.

- Other names of columns, as the option `columns` gives them.
- Conversations: the last turn of `messages`, if it is the assistant's, answers the turns before.
- Alpaca's rows: `instruction` and `input` are the question, `output` is its solution.
- `completion`: the solution, as TRL's SFT has it. It is trained on as it is.
- Plain text: a row with `text` and no question.
- Implicit prompts: `chosen` and `rejected` are complete conversations, or texts, that begin with
  the same prompt. The row has no question, or repeats it as text (UltraFeedback).
- TRL's rows for GRPO: `prompt` and `solution`, which contains the answer, in a box or alone.
- verl's rows: the answer is `reward_model["ground_truth"]`, or `ground_truth`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expo_fast.data.answer_grading import last_boxed, last_boxed_span
from expo_fast.data.columns import (
    GSM8K_ANSWER,
    is_number,
    read_answer,
    read_reply,
    read_solution,
    shown,
    split_gsm8k,
)

LONGEST_ANSWER = 100  # characters of a solution without a box that counts as the answer

QUESTION_COLUMNS = ("prompt", "problem", "question")  # the first one that a row has is taken
ANSWER_COLUMNS = ("answer", "solution", "completion", "ground_truth", "reward_model")
KNOWN_COLUMNS = (  # what the option `columns` may name
    *QUESTION_COLUMNS,
    *ANSWER_COLUMNS,
    "chosen",
    "rejected",
    "messages",
    "instruction",
    "input",
    "output",
    "text",
    "level",
    "id",
)


# Names of columns


def rename(
    where: str, columns: dict[str, Any], names: Mapping[str, str], *, required: bool = True
) -> None:
    """Give columns the names that the trainer reads.

    names: the row's own name of a column, by the name that the trainer reads. `a.b` is the value b
    of the object a. A question becomes `prompt`, which is read before a `question` or `problem` of
    the row.

    A row that has no such column of its own may have a column that is read anyway, as that of other
    data for the evaluation does. Raise ValueError if it has neither.

    required: False leaves out a column that a row lacks, such as the solution of other data.
    """
    found = {}
    for name, own in names.items():
        read_as = QUESTION_COLUMNS[0] if name in QUESTION_COLUMNS else name
        if own in columns:
            found[read_as] = columns.pop(own)
        elif "." in own and _has_path(columns, own):
            found[read_as] = _at_path(columns, own)
        elif required and not columns.keys() & _same_use(name):
            present = ", ".join(map(repr, columns)) or "none"
            raise ValueError(f"{where}: no column {own!r} for {name!r}; the row has {present}")
    columns |= found


def parse_names(columns: Sequence[str]) -> dict[str, str]:
    """Return the option `columns`, NAME=COLUMN, as the own name of each column.

    Raise ValueError for a name that the trainer does not read, and for two columns of one use.
    """
    names: dict[str, str] = {}
    for each in columns:
        name, _, own = each.partition("=")
        if name not in KNOWN_COLUMNS:
            known = ", ".join(KNOWN_COLUMNS)
            raise ValueError(f"columns: {each!r}: {name!r} is none of {known}")
        twice = [f"{other}={names[other]}" for other in names if other in _same_use(name)]
        if twice:
            raise ValueError(f"columns: {twice[0]!r} and {each!r} name the same: give one of them")
        names[name] = own
    return names


def remove_nulls(columns: dict[str, Any]) -> None:
    """Remove a question that is null, and a pair of two nulls.

    Tables of rows in several forms have them, such as a file that pandas or datasets wrote.
    """
    for name in QUESTION_COLUMNS:
        if name in columns and columns[name] is None:
            del columns[name]
    if all(name in columns and columns[name] is None for name in ("chosen", "rejected")):
        del columns["chosen"], columns["rejected"]


def _same_use(name: str) -> set[str]:
    """Return the names of columns that are read in the place of a column."""
    return {*QUESTION_COLUMNS} if name in QUESTION_COLUMNS else {name}


def _has_path(columns: Mapping[str, Any], path: str) -> bool:
    value: Any = columns
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return False
        value = value[name]
    return True


def _at_path(columns: Mapping[str, Any], path: str) -> Any:
    value: Any = columns
    for name in path.split("."):
        value = value[name]
    return value


# Questions


def extract_question(where: str, columns: dict[str, Any]) -> str | None:
    """Move the question of any form into one column, and a completion into `completion`.

    Return the name of the question's column, None if there is none.
    """
    question = next((name for name in QUESTION_COLUMNS if name in columns), None)
    question = extract_prompt(where, columns, question)
    if has_conversation(columns, question):
        if question is not None:
            del columns[question]  # as text; the conversation has it as a message
        split_conversation(columns)
        return "prompt"
    if question is None and "instruction" in columns:
        join_instruction(where, columns)
        return "prompt"
    return question


def has_conversation(columns: Mapping[str, Any], question: str | None) -> bool:
    """Return whether `messages` is the question, and perhaps its answer.

    A row of UltraChat repeats the first message in `prompt`.
    """
    if not isinstance(columns.get("messages"), list):
        return False
    if question is None:
        return True
    answered = any(columns.get(name) is not None for name in (*ANSWER_COLUMNS, "chosen"))
    return isinstance(columns[question], str) and not answered


def split_conversation(columns: dict[str, Any]) -> None:
    """Split `messages` into `prompt` and, if the last turn is the assistant's, `completion`."""
    messages = columns.pop("messages")
    columns["prompt"] = messages
    last = messages[-1] if messages else None
    if isinstance(last, dict) and last.get("role") == "assistant":
        columns["prompt"] = messages[:-1]
        columns["completion"] = [last]


def join_instruction(where: str, columns: dict[str, Any]) -> None:
    """Join Alpaca's `instruction` and `input` to `prompt`, and rename `output` to `completion`."""
    instruction = columns.pop("instruction")
    context = columns.pop("input", None)
    if context is not None and not isinstance(context, str):
        raise ValueError(f"{where}: input must be text, not {shown(context)}")
    if isinstance(instruction, str) and context and context.strip():
        instruction = f"{instruction}\n\n{context}"
    columns["prompt"] = instruction
    if "output" in columns:
        columns["completion"] = columns.pop("output")


# Implicit prompts


def extract_prompt(where: str, columns: dict[str, Any], question: str | None) -> str | None:
    """Move an implicit prompt from `chosen` and `rejected` into `prompt`, as TRL does.

    question: the name of the row's question column, or None if it has none.

    Return the name of the question column, or None if there is none. Raise ValueError if there is
    no common prompt, or if the last message of the common prompt is not the user's.
    """
    if not has_implicit_prompt(columns, question):
        return question
    chosen = columns["chosen"]
    rejected = columns["rejected"]
    n = common_length(chosen, rejected)
    prompt = chosen[:n]
    if isinstance(prompt, str):
        found = bool(prompt.strip())
    else:
        found = bool(prompt) and prompt[-1].get("role") == "user"
    if not found:
        raise ValueError(
            f"{where}: chosen and rejected have no common prompt that an answer follows: they are "
            f"{shown(chosen)} and {shown(rejected)}"
        )
    if question is not None:
        del columns[question]  # its text is also a message of the conversations
    columns["prompt"] = prompt
    columns["chosen"] = chosen[n:]
    columns["rejected"] = rejected[n:]
    return "prompt"


def has_implicit_prompt(columns: Mapping[str, Any], question: str | None) -> bool:
    """Return whether `chosen` and `rejected` include the prompt."""
    chosen = columns.get("chosen")
    rejected = columns.get("rejected")
    if is_conversation(chosen) and is_conversation(rejected):
        return question is None or isinstance(columns[question], str)
    both_texts = isinstance(chosen, str) and isinstance(rejected, str)
    return question is None and both_texts


def is_conversation(value: object) -> bool:
    """Return whether a value is a list of several messages."""
    if not isinstance(value, list) or len(value) < 2:
        return False
    return all(isinstance(message, dict) and "role" in message for message in value)


def common_length(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Return the number of messages or characters of the common prompt, as TRL's extract_prompt.

    A space before the first difference belongs to the answers. So does the last message or
    character of the shorter sequence.
    """
    longest = min(len(chosen), len(rejected)) - 1
    n = 0
    while n < longest and chosen[n] == rejected[n]:
        n += 1
    differs = chosen[n : n + 1] != rejected[n : n + 1]
    if differs and n > 0 and chosen[n - 1] == " ":
        n -= 1
    return n


# Answers


@dataclass(frozen=True)
class Answer:
    """The answer of a row, and the expert's reasoning for it."""

    text: str
    """Empty if the row has none."""
    solution: str | None = None


def find_answer(where: str, columns: dict[str, Any], *, required: bool) -> Answer | None:
    """Return the answer and solution of a row, None if it has neither.

    The answer is in `answer`, `reward_model`, `ground_truth` or `solution`, or in the box of
    `completion`. Remove `answer`, `completion` and a `solution` with reasoning from the columns. A
    `solution` that is only the answer stays, for the reward functions that read it.

    required: whether a row without an answer has no use, so that an empty one is an error.
    """
    completion = None
    if columns.get("completion") is not None:
        completion = read_reply(f"{where}: completion", columns["completion"])
    columns.pop("completion", None)
    is_there = "answer" in columns
    answer = columns.pop("answer", None)
    if answer is None and is_number(columns.get("solution")):
        columns["solution"] = read_answer(f"{where}: solution", columns["solution"])
    solution = read_solution(f"{where}: solution", columns.get("solution"))
    if answer is not None and (required or answer != ""):
        columns.pop("solution", None)
        found = read_answer(f"{where}: answer", answer)
        return with_solution(where, found, completion or solution)
    truth = find_ground_truth(where, columns, required=required)
    if truth is not None:
        columns.pop("solution", None)
        return with_solution(where, truth, completion or solution)
    if solution is not None:
        found = answer_in_solution(where, solution)
        if found.solution is not None:
            del columns["solution"]
        return found if completion is None else Answer(found.text, completion)
    columns.pop("solution", None)
    if completion is not None:
        return Answer(last_boxed(completion) or "", completion)
    if is_there and required:
        read_answer(f"{where}: answer", answer)  # raises ValueError
    return None


def find_ground_truth(where: str, columns: Mapping[str, Any], *, required: bool) -> str | None:
    """Return `reward_model["ground_truth"]` or `ground_truth` as text, None if there is none.

    If no answer is required, one that is neither text nor a number is left to the reward functions.
    """
    reward_model = columns.get("reward_model")
    inside = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
    what = "reward_model.ground_truth"
    truth = inside
    if truth is None:
        what = "ground_truth"
        truth = columns.get("ground_truth")
    is_answer = isinstance(truth, str | int | float)
    if truth is None or (not required and not is_answer):
        return None
    return read_answer(f"{where}: {what}", truth)


def with_solution(where: str, answer: str, solution: str | None) -> Answer:
    """Return an answer with its solution. If there is none, look for it in the answer (GSM8K)."""
    if solution is None:
        solution, answer = split_gsm8k(f"{where}: answer", answer)
    return Answer(answer, solution)


def answer_in_solution(where: str, solution: str) -> Answer:
    """Return the answer of a solution: its last box, the text after ####, or one short line.

    The text of the answer is empty if there is none.
    """
    boxed = last_boxed(solution) if "box" in solution else None
    if boxed:
        start, end = last_boxed_span(solution) or (0, 0)
        reasoning = re.search(r"\w", solution[:start] + solution[end:])
        return Answer(boxed, solution if reasoning else None)
    if "####" in solution and GSM8K_ANSWER.fullmatch(solution):
        return with_solution(where, solution, None)
    if len(solution) <= LONGEST_ANSWER and "\n" not in solution:
        return Answer(solution)
    return Answer("", solution)
