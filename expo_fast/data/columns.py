"""Check and convert the columns of one data row.

Every function takes `what`, which names the place of the value in errors ("data.jsonl:7: answer"),
and raises ValueError in one sentence for a value that cannot be used.
"""

import json
import math
import re
from decimal import Decimal

GSM8K_ANSWER = re.compile(r"(?P<solution>.*?)\s*####\s*(?P<answer>[^#\n]*?)\s*", re.DOTALL)
GSM8K_CALCULATOR = re.compile(r"<<[^<>]*>>")  # calls of a calculator: "4*6=<<4*6=24>>24"
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
# Two rows of MATH have "Level ?". pandas writes a column with gaps to a CSV file as "3.0".
LEVEL = re.compile(r"(?:level )?(\d{1,9}|\?)(?:\.0)?", re.IGNORECASE)

Message = dict[str, str]  # a chat message: role, content


def read_prompt(what: str, value: object) -> str | tuple[Message, ...]:
    """Return a question as text, or as chat messages.

    The last message is the user's, or the assistant's after it: the beginning of the answer.
    """
    if isinstance(value, str) and value.strip():
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{what} must be text that is not empty or a list of chat messages, not {shown(value)}"
        )
    messages = tuple(_message(what, message) for message in value)
    last = messages[-1]
    asked = messages
    if last["role"] == "assistant" and last["content"].strip():
        asked = messages[:-1]
    if not asked or asked[-1]["role"] != "user" or not asked[-1]["content"].strip():
        raise ValueError(
            f"{what}: the last message must be the user's question, or after it the beginning of "
            f"the assistant's answer: {shown(value[-1])}"
        )
    return messages


def _message(what: str, value: object) -> Message:
    """Return a chat message without its null values, which tables of the hub are full of."""
    parts = value if isinstance(value, dict) else {}
    message = {name: part for name, part in parts.items() if part is not None}
    complete = {"role", "content"} <= message.keys()
    all_text = all(isinstance(part, str) for part in message.values())
    if not complete or not all_text:
        raise ValueError(
            f"{what}: a chat message needs text in role and content, and no other kind of value "
            f"beside them: {shown(value)}"
        )
    return message


def read_reply(what: str, value: object) -> str:
    """Return an answer of a preference pair: text, or a list of the one message that answers."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        message = value[0]
        if message.get("role", "assistant") == "assistant":
            value = message.get("content")
    if isinstance(value, str) and value.strip():
        return value
    raise ValueError(
        f"{what} must be text that is not empty, or a list of one chat message that answers the "
        f"prompt, not {shown(value)}"
    )


def read_answer(what: str, value: object) -> str:
    """Return a final answer as text: a number is written out, 42.0 as 42 and 1e-7 as 0.0000001."""
    if _is_int(value):
        return str(value)
    if isinstance(value, Decimal) and value.is_finite():  # of a Parquet file
        return format(value, "f")
    if isinstance(value, float) and math.isfinite(value):
        # the shortest decimal that is this float, which is how the data wrote it
        digits = format(Decimal(repr(value)), "f")
        return "0" if not value else digits.removesuffix(".0")
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise ValueError(f"{what} must be text that is not empty or a number, not {shown(value)}")


def split_gsm8k(what: str, answer: str) -> tuple[str | None, str]:
    """Split "... reasoning ... #### 2,400" into the solution, None if empty, and the answer.

    The calls of a calculator are removed from the solution. Another text is the answer itself.
    """
    match = GSM8K_ANSWER.fullmatch(answer) if "####" in answer else None
    if match is None:
        return None, answer
    solution = GSM8K_CALCULATOR.sub("", match["solution"]).strip()
    final = THOUSANDS.sub("", match["answer"])
    return solution or None, read_answer(what, final)


def read_solution(what: str, value: object) -> str | None:
    """Return a solution, None if there is none."""
    if value is None or isinstance(value, str):
        return (value or "").strip() or None
    raise ValueError(f"{what} must be text, not {shown(value)}")


def read_level(what: str, value: object) -> int | None:
    """Return a level from 3, 3.0, "3", "3.0" or "Level 3". None for none and for "Level ?"."""
    if value is None:
        return None
    if isinstance(value, str):
        match = LEVEL.fullmatch(value.strip())
        if match:
            return None if match[1] == "?" else int(match[1])
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(
        f"{what} must be a whole number or text such as 'Level 5', not {shown(value)}: rename the "
        "column to keep it for reward functions"
    )


def read_id(what: str, value: object) -> str:
    """Return an id as text."""
    if _is_int(value) or (isinstance(value, str) and value.strip()):
        return str(value)
    raise ValueError(f"{what} must be text that is not empty or an integer, not {shown(value)}")


def shown(value: object) -> str:
    """Return a value as JSON of at most 80 characters, for an error message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_number(value: object) -> bool:
    """Return whether a value is one that JSON writes as a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
