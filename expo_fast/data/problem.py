"""One problem: a question with its known answer, and the texts that a method trains on."""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field

from expo_fast.data.columns import Message


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
