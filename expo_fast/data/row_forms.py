r"""Convert data rows of TRL and verl to one form: a question, and an answer or a pair.

- Implicit prompts: `chosen` and `rejected` are complete conversations, or texts, that begin with
  the same prompt. The row has no question, or repeats it as text (UltraFeedback).
- TRL's rows for GRPO: `prompt` and `solution`, which contains the answer, in a box or alone.
- verl's rows: the answer is `reward_model["ground_truth"]`.
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
    read_solution,
    shown,
    split_gsm8k,
)

LONGEST_ANSWER = 100  # characters of a solution without a box that counts as the answer


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
    """Return the answer in `answer`, `reward_model` or `solution`, or None if the row has none.

    Remove `answer` and a `solution` with reasoning from the columns. Keep a `solution` that is only
    the answer, for reward functions that read it.
    """
    is_there = "answer" in columns
    answer = columns.pop("answer", None)
    if answer is None and is_number(columns.get("solution")):
        columns["solution"] = read_answer(f"{where}: solution", columns["solution"])
    solution = read_solution(f"{where}: solution", columns.get("solution"))
    if answer is not None and (required or answer != ""):
        columns.pop("solution", None)
        return with_solution(where, read_answer(f"{where}: answer", answer), solution)
    reward_model = columns.get("reward_model")
    if isinstance(reward_model, Mapping) and reward_model.get("ground_truth") is not None:
        columns.pop("solution", None)
        what = f"{where}: reward_model.ground_truth"
        return with_solution(where, read_answer(what, reward_model["ground_truth"]), solution)
    if solution is None:
        columns.pop("solution", None)
        if is_there and required:
            read_answer(f"{where}: answer", answer)  # raises ValueError
        return None
    found = answer_in_solution(where, solution)
    if found.solution is not None:
        del columns["solution"]
    return found


def with_solution(where: str, answer: str, solution: str | None) -> Answer:
    """Return an answer with its solution. If there is none, look for it in the answer (GSM8K)."""
    if solution is None:
        solution, answer = split_gsm8k(f"{where}: answer", answer)
    return Answer(answer, solution)


def answer_in_solution(where: str, solution: str) -> Answer:
    """Return the answer of a solution: its last box, the text after ####, or one short line.

    The text of the answer is empty if there is none.
    """
    boxed = last_boxed(solution)
    if boxed:
        start, end = last_boxed_span(solution) or (0, 0)
        reasoning = re.search(r"\w", solution[:start] + solution[end:])
        return Answer(boxed, solution if reasoning else None)
    if GSM8K_ANSWER.fullmatch(solution):
        return with_solution(where, solution, None)
    if len(solution) <= LONGEST_ANSWER and "\n" not in solution:
        return Answer(solution)
    return Answer("", solution)
