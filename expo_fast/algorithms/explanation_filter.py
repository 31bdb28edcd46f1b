"""Which texts are unfit to be learnt from, right as their answer may be.

A fit one boxes the right answer once, last, and names no other, does not speak of a given answer,
does not start from it, reaches it before it boxes it, and calculates right on the way.
"""

import re
from fractions import Fraction

from expo_fast.data.answer_grading import (
    Number,
    last_boxed_span,
    plain_number,
    same_number,
    tidy,
)
from expo_fast.data.problems import Problem, last_question

MASK = "?"  # stands for the answer where the lift is to come from the reasoning
OPENING_WORDS = 8  # an answer stated among the first words is copied, not derived

_NUMBER = re.compile(r"(?<![\w.])(?:\d{1,3}(?:(?:,|\{,\})\d{3})+(?!\d)|\d+)(?:\.\d+)?")
_GROUPING = re.compile(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))|\\?\$")  # 1,200 and $12
_EQUATION = re.compile(
    r"""
    (?<![\w.)]) (?<![-+*/=]) (?<![-+*/=x]\s)  # not amid a longer expression
    (\d+(?:\.\d+)?) \s? ([-+*/x\u00d7\u00f7]) \s? (\d+(?:\.\d+)?) \s? = \s? (\d+(?:\.\d+)?)
    (?! [\d%] | \.\d | \s?[-+*/x\u00d7\u00f7]\s?\d )
    """,
    re.VERBOSE,
)
_CLAIM = re.compile(r"\banswer(?: is|:)[^.\n=]*(?=\.(?!\d)|\n|$)", re.IGNORECASE)  # and no equation
_NAMED = re.compile(  # the answer is $25, but not: the answer is 18 - 10 = 8
    rf"\banswer(?: is|:)[^\w\n=+*/-]*(?:\\(?:boxed|text\w*)\W*)?({_NUMBER.pattern})"
    r"(?!\s?[-+*/x^=%\u00d7\u00f7]|\.?\d)",
    re.IGNORECASE,
)
_CLAIMS = re.compile(r"\banswer(?: is|:)", re.IGNORECASE)
_CLAIMING = re.compile(  # with what leads to it: "\n3. So the final answer is 29"
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
    r"|\(the answer is\b"  # the very words in which it was told
    r"|\banswer (that (was|is) )?given\b"
    r"|\banswer to (this|the) (problem|question) (is|was) given\b"
    r"|\bworking? backwards?\b"
    r"|\b(reach|get to|arrive at|match|obtain) the (given|stated|provided|known|correct answer)\b",
    re.IGNORECASE,
)


def is_unfit(text: str, problem: Problem) -> bool:
    """Right, and yet no explanation to learn from."""
    early = answer_first(text, problem.answer, last_question(problem))
    unfounded = copied(text, problem.answer) or names_another(text, problem.answer)
    return leaks(text) or early or unfounded or repeats(text) or miscalculates(text)


def leaks(text: str) -> bool:
    """Does it speak of an answer that was given?"""
    return _LEAK.search(text) is not None


def answer_first(text: str, answer: str, question: str) -> bool:
    """Is the answer among the first words, and neither an equation's result nor the question's?"""
    opening = " ".join(text.split()[:OPENING_WORDS])
    before = [opening[:at].rstrip(" $:") for at, _ in stated(opening, answer)]
    if stated(question, answer):
        early = any(b.endswith("answer is") for b in before)
    else:
        early = not all(b.endswith("=") for b in before)
    return early or "\\boxed" in opening


def copied(text: str, answer: str) -> bool:
    """Does it box a number that its reasoning never reached? Other answers have many spellings.

    "The answer is 7" is a claim, and reaches nothing.
    """
    span = last_boxed_span(text)
    if span is None or _decimal(answer) is None:
        return False
    reasoning = _CLAIM.sub(" ", text[: span[0]]).rstrip(" $")
    return not stated(reasoning, answer) and not reasoning.endswith("=")


def names_another(text: str, answer: str) -> bool:
    """Does it say "the answer is" of another number than the answer?"""
    if _decimal(answer) is None:
        return False
    return not all(stated(number, answer) for number in _NAMED.findall(text))


def repeats(text: str) -> bool:
    """Does it box, or say "the answer is", more than once? Whoever learns that never ends."""
    return text.count("\\boxed") > 1 or len(_CLAIMS.findall(text)) > 1


def before_claim(text: str, answer: str) -> str:
    """What stands before the first "the answer is" of the answer; a sentence that it leaves without
    a number goes with it.
    """
    claims = [m.start() for m in _CLAIMING.finditer(text) if stated(m[1], answer)]
    if not claims:
        return text.rstrip()
    text = text[: claims[0]]
    begun = re.split(r"[.\n](?!\d)", text)[-1]
    return text.removesuffix(begun if _NUMBER.search(begun) is None else "").rstrip()


def miscalculates(text: str) -> bool:
    """Does it hold a false equation of two plain numbers, such as 6 * 4 = 26?

    Decimals may be rounded, 2 / 3 = 0.67. Longer expressions and negative results are not judged.
    """
    return any(not _holds(*parts) for parts in _EQUATION.findall(_GROUPING.sub("", text)))


def _holds(x: str, sign: str, y: str, claimed: str) -> bool:
    left, right = Fraction(x), Fraction(y)
    if sign in "/\u00f7" and not right:
        return False
    results = {"+": left + right, "-": left - right, "/": left / right if right else left}
    result = results.get({"\u00f7": "/"}.get(sign, sign), left * right)
    places = len(claimed.partition(".")[2])
    tolerance = Fraction(1, 2 * 10**places) if places else 0
    return abs(result - Fraction(claimed)) <= tolerance


def masked(text: str, answer: str) -> str:
    """The text with MASK wherever it states the answer."""
    for start, end in reversed(stated(text, answer)):
        text = text[:start] + MASK + text[end:]
    return text


def stated(text: str, answer: str) -> list[tuple[int, int]]:
    """Where the text has the answer; of a number any spelling, and either sign: - is minus too."""
    number = _decimal(answer)
    if number is None:
        literal = rf"(?<![\w.,]){re.escape(answer)}(?!\w|[.,]\d)"
        return [m.span() for m in re.finditer(literal, text)]
    found = ((m.span(), _decimal(m[0])) for m in _NUMBER.finditer(text))
    return [span for span, x in found if x and same_number(x, number)]


def _decimal(text: str) -> Number | None:
    """The magnitude of an integer or decimal, however it is spelt, and its decimal places."""
    text = tidy(text).lstrip("+-")
    return plain_number(text) if _NUMBER.fullmatch(text) else None
