"""Find the boxed answer of a text, and decide whether it is right where exact rules suffice.

`expo_fast.answers` holds the rules. What they leave open goes to math-verify, in the processes of
`grader_pool.GraderPool`.
"""

import re

from expo_fast.answers.magnitude import BRACKETS, POLYNOMIAL, what_is_too_large
from expo_fast.answers.rules import compare
from expo_fast.answers.spelling import tidy

__all__ = [
    "MAX_CHARS",
    "decide",
    "last_boxed",
    "last_boxed_span",
    "reason_against_reference",
    "tidy",
]

MAX_CHARS = 1000  # of an answer
MAX_NESTING = 32  # of braces in an answer

# \boxed{...}, or without braces \boxed 6: up to the end of the formula if it has no blank, or a
# number, or a command with its arguments
BOX = re.compile(
    r"\\(?:boxed|fbox|framebox)(?:\s*(?P<brace>\{)|(?![A-Za-z])[ \t]*(?P<bare>"
    r"(?!\\(?:boxed|fbox|framebox))[-\d.A-Za-z\\(\[][^$\s]{0,200}?(?=[ \t]*(?:\$|\\\)|\\\]))"
    r"|-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?(?=[.,;:]?(?:\s|$))"
    r"|-?\\[A-Za-z]+(?:\{[^{}]{0,100}\}){1,2}(?=[.,;:]?\s*$)))"
)
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is text


def last_boxed_span(text: str) -> tuple[int, int] | None:
    r"""Return (start, end) of the last `\boxed{...}` after `</think>`; of nested boxes the inner.

    Returns None if there is no box, or if the last one is not closed, too long or nested too
    deeply. An earlier box is not taken instead, because the text did not end with it.
    """
    box = _last_box(text)
    if box is None:
        return None
    end = _end_of_box(text, box)
    return None if end is None else (box.start(), end)


def last_boxed(text: str) -> str | None:
    r"""Return the stripped content of the last `\boxed{...}`, None as `last_boxed_span`."""
    box = _last_box(text)
    if box is None:
        return None
    end = _end_of_box(text, box)
    if end is None:
        return None
    if box["bare"] is not None:
        return box["bare"].rstrip(" \t.,")
    return text[box.end() : end - 1].strip()


def _last_box(text: str) -> re.Match[str] | None:
    search_from = max(0, text.rfind("</think>"))
    last = None
    for box in BOX.finditer(text, search_from):
        last = box
    return last


def _end_of_box(text: str, box: re.Match[str]) -> int | None:
    """Return the end of a box, None if it is not closed, too long or nested too deeply."""
    if box["bare"] is not None:
        return box.end()
    limit = box.end() + MAX_CHARS + 1
    depth = 0
    for token in BRACE.finditer(text, box.end(), limit):
        if token[0] == "{":
            depth += 1
        elif token[0] == "}":
            depth -= 1
        if depth < 0:
            return token.end()
        if depth > MAX_NESTING:
            return None
    return None


def reason_against_reference(answer: str) -> str | None:
    """Return why no completion can be judged by this reference answer, or None if one can."""
    if _last_box(answer) and not last_boxed(answer):
        return "its last box is empty, not closed, too long or nested too deeply"
    expected = last_boxed(answer) or answer
    if len(expected) > MAX_CHARS:
        return f"it has {len(expected)} characters, need at most {MAX_CHARS}"
    if not _has_balanced_braces(expected):
        return "its braces are not balanced"
    tidied = tidy(expected)
    if not tidied:
        return "nothing is left of it without spaces and signs of LaTeX"
    # A text with n!! has the double factorial, which is small. math-verify would compute (n!)!.
    large = what_is_too_large(tidied.replace("!!", "!"))
    if large in (None, BRACKETS, POLYNOMIAL):  # these are judged by the exact rules only
        return None
    return f"{large} in it is too large to compute"


def _has_balanced_braces(text: str) -> bool:
    depth = 0
    for token in BRACE.finditer(text):
        depth += (token[0] == "{") - (token[0] == "}")
        if depth < 0:
            return False
    return depth == 0


def decide(gold: str, box: str) -> bool | None:
    """Return the verdict on two tidy answers without math-verify.

    None: only math-verify can tell, or there is no reference.
    """
    if not box:
        return False
    if not gold:
        return None
    return compare(gold, box, _open)


def _open(gold: str, box: str) -> None:
    """Leave a comparison of expressions to math-verify."""
