"""Compare an answer with its reference by a table of rules. The first rule that applies decides."""

import re
from itertools import pairwise

from expo_fast.answers import algebra
from expo_fast.answers.aggregates import collections, matrices, real_sets
from expo_fast.answers.notations import (
    choices,
    clock_times,
    numerals,
    ratios,
    residues,
    units,
)
from expo_fast.answers.numbers import plain_number, same_number
from expo_fast.answers.quotients import approximation, linear_in_one_variable, ratio, rational
from expo_fast.answers.spelling import squash
from expo_fast.answers.structures import RELATIONS, labelled, same_label, split_top
from expo_fast.answers.units import split_unit
from expo_fast.answers.verdicts import PASS, Comparer, Leaf, Pass, Rule, Verdict, every

# Texts and numbers


def same_text(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Accept texts that differ at most in spaces. Reject an empty answer."""
    if not box:
        return False
    return True if gold == box or squash(gold) == squash(box) else PASS


def numbers(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Compare numbers exactly. A decimal may be rounded."""
    x = plain_number(gold)
    y = plain_number(box)
    return same_number(x, y) if x and y else PASS


INTEGRAL = re.compile(r"(?P<value>.*[^-+*/^_({ ]) ?\+ ?C")
CONSTANT_OF_INTEGRATION = re.compile(
    r"(?P<value>.*[^-+*/^_({ ]) ?\+ ?(?P<name>[CcKk])(?:_ ?\{? ?\d ?\}?)?"
)


def antiderivatives(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Accept another name for the constant C of integration after a term with a variable."""
    x = INTEGRAL.fullmatch(gold)
    y = CONSTANT_OF_INTEGRATION.fullmatch(box)
    if x is None or y is None or box.endswith("C"):
        return PASS
    letters = "".join(re.findall(r"\\[A-Za-z]+|([A-Za-z])", x["value"]))
    taken = re.findall(r"\\[A-Za-z]+|[A-Za-z]", y["value"])
    if not letters.islower() or y["name"] in taken:  # C is a variable among others
        return PASS
    return equal(x["value"], y["value"])


# Equations


ARGUMENT = re.compile(r"\(([A-Za-z])\)$")
NAME = re.compile(r"\\[A-Za-z]+|[A-Za-z]")


def equations(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Compare equations, and values with a name.

    The name before = may be missing on one side. Equations may be multiples of each other.
    """
    x_sides, x_signs = split_top(gold, RELATIONS)
    y_sides, y_signs = split_top(box, RELATIONS)
    if (not x_signs and not y_signs) or not set(x_signs + y_signs) <= {"=", r"\approx"}:
        return PASS
    x = labelled(gold)
    y = labelled(box)
    if x.label and y.label and same_label(x.label, y.label):
        value = _renamed(y.value, of=y.label, to=x.label)
        return _same_values(x.value, value, equal)
    if x_signs == y_signs == ["="]:
        return _same_equation(x_sides, y_sides)
    if (x.label and y.label) or (x_signs and y_signs and not (x.label or y.label)):
        return PASS
    return _same_values(x.value, y.value, equal)


def _renamed(value: str, of: str, to: str) -> str:
    """Return a value with the argument of `of` renamed to that of `to`, such as f(t) to f(x)."""
    old = ARGUMENT.search(of)
    new = ARGUMENT.search(to)
    if old is None or new is None or old[1] == new[1]:
        return value
    return NAME.sub(lambda match: new[1] if match[0] == old[1] else match[0], value)


def _same_equation(x: list[str], y: list[str]) -> Verdict | Pass:
    """Return whether one equation is a multiple of the other, so that the solutions are equal."""
    a = algebra.side_difference(*x)
    b = algebra.side_difference(*y)
    if a is None or b is None:
        return PASS
    if not a.value.top or not b.value.top:  # 3 = 3 and 4 = 4 hold for all values
        return False
    if ratio(a.value.top, b.value.top) is not None:
        return True
    unknown = a.opaque or b.opaque or a.rounded or b.rounded
    return PASS if unknown else False


def _same_values(gold: str, box: str, equal: Comparer) -> Verdict:
    """Compare values. Each may be a chain of equal parts, such as `5 + 3 = 8`."""
    x, x_holds = _chain_value(gold, equal)
    y, y_holds = _chain_value(box, equal)
    return every([equal(x, y), x_holds, y_holds])


def _chain_value(text: str, equal: Comparer) -> tuple[str, Verdict]:
    r"""Return the value of `5 + 3 = 8` or `\frac13 \approx 0.33`, and whether the chain holds."""
    sides, signs = split_top(text, RELATIONS)
    if r"\approx" in signs:
        exact = signs.index(r"\approx")
        if not all(_may_be_rounded_to(sides[exact], each) for each in sides[exact + 1 :]):
            return sides[exact], False
        sides = sides[: exact + 1]
    return sides[-1], every(_is_written_as(a, b, equal) for a, b in pairwise(sides))


def _may_be_rounded_to(value: str, number: str) -> bool:
    """Return whether a value may be rounded to a number: 2.5 to 3, 1234 to 1200, but not 8 to 9.

    True for a value or a number that is not read here, and for two units.
    """
    exact = split_unit(value)
    about = split_unit(number)
    parsed = algebra.parse(exact.value)
    y = plain_number(about.value)
    rounded = y and approximation(rational(y.value))
    other_units = exact.percent != about.percent or (
        exact.unit and about.unit and exact.unit != about.unit
    )
    if parsed is None or parsed.opaque or y is None or rounded is None or other_units:
        return True
    x = approximation(parsed.value)
    if x is None:  # it has a variable or i, or is beyond fp64
        return False
    gap = abs(x - rounded)
    if y.places:
        return gap < 10.0**-y.places
    if y.value.denominator > 1:
        return 2 * gap <= 1 / y.value.denominator
    digits = str(abs(y.value))
    zeros = len(digits) - len(digits.rstrip("0"))
    return 2 * gap <= 10**zeros


def _is_written_as(value: str, number: str, equal: Comparer) -> Verdict:
    """Return whether two values are equal, or the second is the first rounded: 1/3 = 0.33."""
    verdict = equal(value, number)
    x = plain_number(value)
    y = plain_number(number)
    if verdict is False and x and y and y.places:
        return abs(x.value - y.value) * 10**y.places < 1
    return verdict


# Words and expressions

TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
PHRASE = re.compile(r"[A-Za-z0-9'\"(][A-Za-z0-9 ,.;:'\"()&-]*")
WORD = re.compile(r"[A-Za-z]{2,}")
PUNCTUATION = re.compile(r"[,.;:'\"()]|(?<=[A-Za-z])-(?=[A-Za-z])")
PROSE = re.compile(r"[A-Za-z][A-Za-z ',.-]*")
LONG_WORD = re.compile(r"[A-Za-z]{4}")
ARTICLE = re.compile(r"^(?:the|an?|it is|on) ")
SYNONYMS = [
    {"no solution", "no solutions", "none", "no real solution", "no real solutions", "empty set"},
    {"undefined", "does not exist", "dne", "not defined"},
    {"infinitely many", "infinitely many solutions", "infinite", "infinite solutions"},
]
EMPTY = r"\emptyset"
NO_SOLUTION = SYNONYMS[0]


def words(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Compare words without case, punctuation and articles. A formula never equals words."""
    x = _phrase(gold)
    y = _phrase(box)
    if EMPTY in (gold, box):
        return (y if gold == EMPTY else x) in NO_SOLUTION
    if x and y and (x == y or any(x in group and y in group for group in SYNONYMS)):
        return True
    # Letters without \text may be a product of variables. Longer words are compared as words,
    # because as products "listen" would equal "silent".
    prose = PROSE.fullmatch(gold) and PROSE.fullmatch(box) and LONG_WORD.search(f"{gold} {box}")
    return False if prose or r"\text" in gold + box else PASS


def _phrase(text: str) -> str:
    """Return words in lower case without punctuation, or "" for a formula."""
    text = TEXT.sub(r" \1 ", text).strip()
    if not PHRASE.fullmatch(text) or not WORD.search(text):
        return ""
    plain = PUNCTUATION.sub(" ", text.casefold())
    return ARTICLE.sub("", " ".join(plain.split()))


ENDS_IN_UNIT = re.compile(r".*\d ?[ij]")


def complex_numbers(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Take j for the imaginary unit, as in 3 + 4j. 4j alone may be a vector or a variable."""
    if not ENDS_IN_UNIT.fullmatch(gold) or not ENDS_IN_UNIT.fullmatch(box):
        return PASS
    units = [_unit_of_complex_number(text) for text in (gold, box)]
    if sorted(filter(None, units)) != ["i", "j"]:
        return PASS
    return equal(*(text[:-1] + "i" for text in (gold, box)))


def _unit_of_complex_number(text: str) -> str | None:
    """Return the i or j of a number with both parts; None for another text."""
    parsed = algebra.parse(text)
    linear = parsed and linear_in_one_variable(parsed.value.top)
    if not linear or not linear[2]:
        return None
    return linear[0] if text.count(linear[0]) == 1 else None


def expressions(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Compare polynomials, their quotients, roots, i and pi exactly."""
    verdict = algebra.same_expression(gold, box)
    return PASS if verdict is None else verdict


RULES: tuple[Rule, ...] = (
    same_text,  # (1, 2) and ( 1,2 )
    numbers,  # 0.5, 1/2, 5e-1
    antiderivatives,  # x^2 + C, x^2 + K
    complex_numbers,  # 3 + 4i, 3 + 4j
    clock_times,  # 3:30 PM, 15:30
    choices,  # (B), B
    ratios,  # 2:3
    residues,  # x = 3 (mod 7), 3 + 7k
    numerals,  # 101_2
    units,  # 3 m, 300 cm, 3; 50%, 0.5
    matrices,  # in any brackets
    real_sets,  # [1, 2), 1 <= x < 2
    collections,  # (1, 2), {1, 2}, x = 1 and y = 2
    equations,  # x = 1; x + y = 3, 2x + 2y = 6
    words,  # No solution
    expressions,  # 2 sqrt 2, sqrt 8
)


def compare(gold: str, box: str, leaf: Leaf) -> Verdict:
    """Return the verdict on two tidy answers. `leaf` judges the parts that no rule decides."""
    return Comparer(RULES, leaf)(gold, box)
