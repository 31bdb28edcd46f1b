"""Filter of explanations: rejects texts with the right answer that are unfit to train on.

A fit text boxes the right answer once, at the end, and names no other answer. It does not mention a
given answer, does not start from the answer, reaches the answer before it boxes it, and has no
false equation. To add a rule, write a function and call it in `is_unfit`.
"""

import re
from fractions import Fraction

from expo_fast.answers.numbers import Number, plain_number, same_number
from expo_fast.answers.spelling import tidy
from expo_fast.answers.units import split_unit
from expo_fast.data.answer_grading import last_boxed_span
from expo_fast.data.problems import Problem, last_question

MASK = "?"  # replaces the answer, so that a lift comes from the reasoning
OPENING_WORDS = 8  # an answer stated in the first 8 words is copied, not derived

_NUMBER = re.compile(r"(?<![\w.])(?:\d{1,3}(?:(?:,|\{,\})\d{3})+(?!\d)|\d+)(?:\.\d+)?")
_GROUPING = re.compile(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))|\\?\$")  # 1,200 and $12
# Other spellings of the signs that _EQUATION knows.
_SPELLINGS = {
    "\\times": "*",
    "\\cdot": "*",
    "\u00d7": "*",
    "\u00b7": "*",
    "\u22c5": "*",
    "\\div": "/",
    "\u00f7": "/",
    "\u2212": "-",
    "\\%": "%",
}
_EQUATION = re.compile(
    r"""
    (?<![\w.)]) (?<![-+*/=^]) (?<![-+*/=x^]\s)  # not inside a longer expression
    (\d+(?:\.\d+)?) \s? ([-+*/x]) \s? (\d+(?:\.\d+)?) \s? = \s? (\d+(?:\.\d+)?)
    (?! [\d%] | \.\d | \s?[-+*/x^]\s?[\d({\\] | \s?\\(?:[dt]?frac|sqrt|pi) )
    """,
    re.VERBOSE,
)
# "The answer is 7.", without an equation in it.
_CLAIM = re.compile(r"\banswer(?: is|:)[^.\n=]*(?=\.(?!\d)|\n|$)", re.IGNORECASE)
# "the answer is $25", but not "the answer is 18 - 10 = 8".
_NAMED = re.compile(
    rf"\banswer(?: is|:)[^\w\n=+*/-]*(?:\\(?:boxed|text\w*)\W*)?({_NUMBER.pattern})"
    r"(?!\s?(?:[-+*/x^=%\u00d7\u00b7\u22c5\u00f7\u2212]|\\(?:times|cdot|div|%|[dt]?frac))|\.?\d)",
    re.IGNORECASE,
)
_CLAIMS = re.compile(r"\banswer(?: is|:)", re.IGNORECASE)
# _NAMED with the words before it: "\n3. So the final answer is 29".
_CLAIMING = re.compile(
    r"[\s,;]*(?:(?<=\n)\d+\.\s*)?(?:\b(?:so|thus|therefore|hence|then),?\s+)?(?:\bthe\s+)?"
    rf"(?:\b(?:final|correct|right)\s+)?{_NAMED.pattern}",
    re.IGNORECASE,
)
_LEAK = re.compile(
    r"\b(given|provided|stated|known|expected|desired|reference) (final )?answer\b"
    r"|\b(since|because|as) the (correct |right |final )?answer is\b"
    r"|\banswer (is|was|has been) (already )?(given|provided|stated|known)\b"
    r"|\b(given|told|know|knowing) that the (correct |final )?answer\b"
    r"|\bas (given|stated|provided)\b(?! (in|by) the (problem|question|text))"
    r"|\(the answer is\b"  # the words of the explain prompt
    r"|\banswer (that (was|is) )?given\b"
    r"|\banswer to (this|the) (problem|question) (is|was) given\b"
    r"|\bworking? backwards?\b"
    r"|\b(reach|get to|arrive at|match|obtain) the (given|stated|provided|known|correct answer)\b",
    re.IGNORECASE,
)


def is_unfit(text: str, problem: Problem) -> bool:
    """Return whether a text with the right answer is unfit to train on."""
    answer = problem.answer
    return (
        leaks(text)
        or states_answer_first(text, answer, last_question(problem))
        or copies_answer(text, answer)
        or names_another_answer(text, answer)
        or repeats_answer(text)
        or miscalculates(text)
    )


def leaks(text: str) -> bool:
    """Return whether the text mentions an answer that was given."""
    return _LEAK.search(text) is not None


def states_answer_first(text: str, answer: str, question: str) -> bool:
    """Return whether the first words state the answer, or have a box.

    The result of an equation does not count. An answer that is also a number of the question counts
    only after "answer is".
    """
    opening = " ".join(text.split()[:OPENING_WORDS])
    if "\\boxed" in opening:
        return True
    before = [opening[:start].rstrip(" $:") for start, _ in stated(opening, answer)]
    if stated(question, answer):
        return any(words.endswith("answer is") for words in before)
    return not all(words.endswith("=") for words in before)


def copies_answer(text: str, answer: str) -> bool:
    """Return whether the text boxes a number that its reasoning did not reach.

    "The answer is 7" is a claim, not reasoning. Answers that are not numbers are not judged,
    because they have many spellings.
    """
    span = last_boxed_span(text)
    if span is None or _decimal(answer) is None:
        return False
    reasoning = _CLAIM.sub(" ", text[: span[0]]).rstrip(" $")
    return not stated(reasoning, answer) and not reasoning.endswith("=")


def names_another_answer(text: str, answer: str) -> bool:
    """Return whether the text says "the answer is X" with a number X other than the answer."""
    if _decimal(answer) is None:
        return False
    return not all(stated(number, answer) for number in _NAMED.findall(text))


def repeats_answer(text: str) -> bool:
    """Return whether the text has a box, or "the answer is", more than once.

    A model trained on such texts does not learn to stop.
    """
    return text.count("\\boxed") > 1 or len(_CLAIMS.findall(text)) > 1


def before_claim(text: str, answer: str) -> str:
    """Return the text before its first "the answer is ANSWER".

    The cut may leave part of a sentence. A part without a number is removed too.
    """
    claims = [match.start() for match in _CLAIMING.finditer(text) if stated(match[1], answer)]
    if not claims:
        return text.rstrip()
    text = text[: claims[0]]
    last_sentence = re.split(r"[.\n](?!\d)", text)[-1]
    if _NUMBER.search(last_sentence) is None:
        text = text.removesuffix(last_sentence)
    return text.rstrip()


def miscalculates(text: str) -> bool:
    """Return whether the text has a false equation of two plain numbers, such as 6 * 4 = 26.

    Decimals may be rounded: 2 / 3 = 0.67 is true. Longer expressions and negative results are not
    judged. Signs may be those of LaTeX.
    """
    plain = _GROUPING.sub("", text)
    for spelling, sign in _SPELLINGS.items():
        plain = plain.replace(spelling, sign)
    return any(not _holds(*parts) for parts in _EQUATION.findall(plain))


def _holds(x: str, sign: str, y: str, claimed: str) -> bool:
    left = Fraction(x)
    right = Fraction(y)
    if sign == "+":
        result = left + right
    elif sign == "-":
        result = left - right
    elif sign == "/":
        if right == 0:
            return False
        result = left / right
    else:
        result = left * right
    places = len(claimed.partition(".")[2])
    tolerance = Fraction(1, 2 * 10**places) if places else 0
    return abs(result - Fraction(claimed)) <= tolerance


def masked(text: str, answer: str) -> str:
    """Return the text with MASK in place of each statement of the answer."""
    for start, end in reversed(stated(text, answer)):
        text = text[:start] + MASK + text[end:]
    return text


def stated(text: str, answer: str) -> list[tuple[int, int]]:
    """Return the spans of the text that state the answer.

    A number is found in any spelling and with either sign, because "-" is also the operator minus.
    """
    number = _decimal(answer)
    if number is None:
        literal = rf"(?<![\w.,]){re.escape(answer)}(?!\w|[.,]\d)"
        return [match.span() for match in re.finditer(literal, text)]
    spans = []
    for match in _NUMBER.finditer(text):
        found = _decimal(match[0])
        if found and same_number(found, number):
            spans.append(match.span())
    return spans


def _decimal(text: str) -> Number | None:
    """Return the magnitude of an integer or decimal in any spelling, and its decimal places."""
    text = split_unit(tidy(text)).value.lstrip("+-")
    return plain_number(text) if _NUMBER.fullmatch(text) else None
