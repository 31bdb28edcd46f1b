"""Compare an answer with its reference: a table of rules, the first that applies decides.

A rule returns a verdict, None where the leaves under it are not decided, or `PASS` where it does
not apply. A leaf is an expression that the rules cannot take apart. The caller judges those that
exact algebra leaves open: in the trainer nothing does, so that the verdict is None, and in a worker
process math-verify does.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, pairwise
from typing import Literal

from expo_fast.answers import algebra
from expo_fast.answers.numbers import plain_number, same_number
from expo_fast.answers.real_sets import Piece, RealSet, real_set
from expo_fast.answers.spelling import squash
from expo_fast.answers.structures import (
    COMMA,
    FUNCTION,
    MAX_ITEMS,
    RELATIONS,
    Bracketed,
    bracketed,
    expand_signs,
    labelled,
    list_items,
    matrix_rows,
    split_top,
)
from expo_fast.answers.units import Quantity, same_dimension, split_unit

MAX_DEPTH = 8  # of structures within structures

Verdict = bool | None
Leaf = Callable[[str, str], Verdict]
Pass = Literal["pass"]
PASS: Pass = "pass"


@dataclass(frozen=True)
class Comparer:
    """How the parts of two answers are compared."""

    leaf: Leaf
    depth: int = 0

    def __call__(self, gold: str, box: str) -> Verdict:
        """Return the verdict of the first rule that applies, or that of the leaf."""
        if self.depth > MAX_DEPTH:
            return None
        deeper = Comparer(self.leaf, self.depth + 1)
        for rule in RULES:
            verdict = rule(gold, box, deeper)
            if verdict != PASS:
                return verdict
        return self.leaf(gold, box)


Rule = Callable[[str, str, Comparer], Verdict | Pass]


def every(verdicts: Iterable[Verdict]) -> Verdict:
    """Return False if one is False, else None if one is None, else True."""
    result: Verdict = True
    for verdict in verdicts:
        if verdict is False:
            return False
        if verdict is None:
            result = None
    return result


def some(verdicts: Iterable[Verdict]) -> Verdict:
    """Return True if one is True, else None if one is None, else False."""
    result: Verdict = False
    for verdict in verdicts:
        if verdict:
            return True
        if verdict is None:
            result = None
    return result


# Texts and numbers


def same_text(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Texts that differ at most in spaces are equal; an empty answer is wrong."""
    if not box:
        return False
    return True if gold == box or squash(gold) == squash(box) else PASS


def numbers(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Numbers are compared exactly; a decimal may be rounded."""
    x = plain_number(gold)
    y = plain_number(box)
    return same_number(x, y) if x and y else PASS


CLOCK = re.compile(
    r"(?P<hour>\d{1,2})(?: ?: ?(?P<minute>\d\d)(?: ?: ?(?P<second>\d\d))?)?"
    r" ?(?:\\text ?\{ ?)?(?P<half>[ap])?(?(half)\.? ?m\.?) ?\}?",
    re.IGNORECASE,
)


DAYTIME = re.compile(
    r"(?:\\text ?\{ ?)?in the (?:morning|afternoon|evening) ?\}?$",
    re.IGNORECASE,
)


def clock_times(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """3:30 PM is 15:30 and 3:30 p.m.; without "a.m." or "p.m." it may be either of a reference."""
    x = CLOCK.fullmatch(_in_digits(gold))
    y = CLOCK.fullmatch(_in_digits(box))
    if not x or not y or not (x["minute"] or x["half"]) or not (y["minute"] or y["half"]):
        return PASS
    exact = _minutes(x) == _minutes(y)
    if x["half"] and y["half"]:
        return exact
    if not x["half"] and not y["half"]:  # it may be a ratio
        return exact if x["second"] or y["second"] else PASS
    return exact or (int(x["hour"]) == int(y["hour"]) and x["minute"] == y["minute"])


def _in_digits(text: str) -> str:
    """Return noon as 12:00 pm, and 3:30 in the afternoon as 3:30 pm."""
    text = DAYTIME.sub(lambda match: "am" if "morning" in match[0] else "pm", text)
    return {"noon": "12:00 pm", "midnight": "12:00 am"}.get(text.lower(), text)


def _minutes(match: re.Match[str]) -> tuple[int, int, int]:
    """Return the hour of 24, the minute and the second of a time."""
    hour = int(match["hour"])
    if match["half"]:
        hour = hour % 12 + (12 if match["half"].lower() == "p" else 0)
    return hour, int(match["minute"] or 0), int(match["second"] or 0)


CHOICE = re.compile(
    r"(?:(?:\\text ?\{ ?)?(?i:option|choice|answer) ?\}? ?)?\(? ?(?:\\text ?\{ ?)?\(? ?([A-Z]) ?\)? ?\}? ?\)?\.?"
)
CHOICE_AND_TEXT = re.compile(
    r"(?:\(|\\text ?\{ ?\() ?([A-Z]) ?\) ?\}? ?[^\s,;%!].*|([A-Z]) ?[.:)] [^\s,;%!].*"
)


SMALL_CHOICES = ("a", "b", "c", "d")  # e and i are constants
CHOICE_MARK = re.compile(r"\( ?[A-Z] ?\)")


def choices(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Letters of a multiple choice: B is (B), and `(B) 12` too."""
    x = CHOICE.fullmatch(gold)
    if x is None:
        return PASS
    y = CHOICE.fullmatch(box.upper() if box.strip("()") in SMALL_CHOICES else box)
    if y:
        return x[1] == y[1]
    text = CHOICE_AND_TEXT.fullmatch(box)
    if text is None:
        return PASS
    return x[1] == (text[1] or text[2]) and len(CHOICE_MARK.findall(box)) <= 1


RATIO = frozenset(":")


def ratios(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """2:3 is compared part by part; 4:6 is another ratio, as 2:30 is another time than 4:60."""
    x, x_signs = split_top(gold, RATIO)
    y, y_signs = split_top(box, RATIO)
    if not x_signs or not y_signs or "=" in gold + box or "|" in gold + box:
        return PASS
    return every(map(equal, x, y)) if len(x) == len(y) else False


# Residues, numerals, units

MODULO = re.compile(
    r"(?P<value>.*?)(?:\(|\\text ?\{)? ?"
    r"(?:\\(?:pmod|pod) ?\{? ?|\\b?mod ?\{? ?|(?<![a-z\\])mod(?:ulo)? ?\}? ?)"
    r"(?P<modulus>\d+) ?\}? ?\)?"
)
RESIDUE = re.compile(r"(?:[A-Za-z] ?(?:\\equiv|=) ?)?(?P<residue>[+-]?\d+)")


def residues(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    r"""`x \equiv 3 \pmod 7`, `3 mod 7`, `10 \pmod 7` and `x = 3 + 7k` are one residue class."""
    x = MODULO.fullmatch(gold)
    y = MODULO.fullmatch(box)
    if not x and not y:
        return PASS
    if x and y:
        return _same_class(x, y)
    if y:  # the reference is the residue itself
        residue = RESIDUE.fullmatch(y["value"].strip())
        if residue is None:
            return PASS
        reduced = abs(int(residue["residue"])) < int(y["modulus"])
        return equal(gold, residue["residue"]) if reduced else False
    assert x is not None
    residue = RESIDUE.fullmatch(x["value"].strip())
    if residue is None:
        return PASS
    if labelled(box).label:
        return _is_progression(x, box)
    return equal(residue["residue"], box) or _is_progression(x, box)


def _same_class(x: re.Match[str], y: re.Match[str]) -> Verdict | Pass:
    a = RESIDUE.fullmatch(x["value"].strip())
    b = RESIDUE.fullmatch(y["value"].strip())
    if not a or not b:
        return PASS
    modulus = int(x["modulus"])
    if modulus != int(y["modulus"]) or not modulus:
        return False
    return int(a["residue"]) % modulus == int(b["residue"]) % modulus


def _is_progression(x: re.Match[str], box: str) -> Verdict | Pass:
    """Return whether an answer is 3 + 7k for the residue 3 modulo 7."""
    residue = RESIDUE.fullmatch(x["value"].strip())
    parsed = algebra.parse(split_top(labelled(box).value, COMMA)[0][0])  # 3+7k, k an integer
    if residue is None or parsed is None:
        return PASS
    linear = algebra.linear_in_one_variable(parsed.value.top)
    if linear is None or parsed.value.bottom != algebra.constant(1):
        return False
    name, step, start = linear
    modulus = int(x["modulus"])
    if name not in ("k", "n", "m", "t", "j") or abs(step) != modulus or not modulus:
        return False
    return (start - int(residue["residue"])) % modulus == 0


NUMERAL = re.compile(
    r"(?P<digits>[0-9A-Fa-f]{0,40}[0-9][0-9A-Fa-f]{0,40}?)"
    r"(?:_(?:base)?|(?:in)?base)(?P<base>\d+|[a-z]+)"
)
NUMERAL_MARKUP = re.compile(r"\\text|[ {}()]")
BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
BASES |= {"ten": 10, "eleven": 11, "twelve": 12, "sixteen": 16}
DIGITS = re.compile(r"[0-9A-F]+")


def numerals(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """101_2 is 101 in base two; a numeral without a base takes that of the other one."""
    x = _numeral(gold)
    y = _numeral(box)
    if x is None and y is None:
        return PASS
    if x and y:
        return x == y
    digits, _ = x or y or ("", 0)
    plain = box if x else gold
    other = re.sub(r"\\text ?\{([0-9A-F]+)\}|[ ,]", r"\1", plain)
    return DIGITS.fullmatch(other) is not None and digits == (other.lstrip("0") or "0")


def _numeral(text: str) -> tuple[str, int] | None:
    """Return the digits and the base of `101_2`, `101_{two}`, `101 base 2`; or None."""
    match = NUMERAL.fullmatch(NUMERAL_MARKUP.sub("", text))
    if match is None:
        return None
    base = BASES.get(match["base"]) or (int(match["base"]) if match["base"].isdigit() else 0)
    digits = match["digits"]
    if not 2 <= base <= 36 or (base <= 10 and not digits.isdigit()):
        return None
    return digits.upper().lstrip("0") or "0", base


def units(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Units may be missing on one side; two units are converted, and others are different."""
    x = split_unit(gold)
    y = split_unit(box)
    if x.glued:
        return PASS
    if not (x.unit or y.unit or x.percent or y.percent):
        return PASS
    verdict = _same_quantity(x, y, equal)
    if not verdict and (x.ambiguous or y.ambiguous) and not (x.percent or y.percent):
        return PASS
    return verdict


def _same_quantity(x: Quantity, y: Quantity, equal: Comparer) -> Verdict:
    if x.percent or y.percent:
        if x.unit or y.unit:
            return False
        return _same_percentage(x, y, equal)
    if x.unit is None or y.unit is None or x.unit == y.unit:
        return equal(x.value, y.value)
    if not same_dimension(x.unit, y.unit):
        return False
    a = plain_number(x.value)
    b = plain_number(y.value)
    if a is None or b is None:
        return equal(x.value, y.value) if x.unit.size == y.unit.size else False
    return a.value * x.unit.size == b.value * y.unit.size


def _same_percentage(x: Quantity, y: Quantity, equal: Comparer) -> Verdict:
    """50% is 50 and 0.5."""
    verdict = equal(x.value, y.value)
    if x.percent and (y.percent or verdict):
        return verdict
    percent = plain_number(x.value if x.percent else y.value)
    share = plain_number(y.value if x.percent else x.value)
    if percent is None or share is None:
        return False
    if verdict and abs(percent.value) >= 1:  # the reference may leave the sign out
        return True
    places = None if percent.places is None else percent.places + 2
    return same_number(percent._replace(value=percent.value / 100, places=places), share)


# Structures


def matrices(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Matrices in any brackets are compared cell by cell."""
    x = matrix_rows(gold)
    y = matrix_rows(box)
    if x is None and y is None:
        return PASS
    if x is None or y is None:  # it may be a product with a matrix, but no number
        return PASS if algebra.parse(box if x else gold) is None else False
    if x[0] != y[0] or [len(row) for row in x[1]] != [len(row) for row in y[1]]:
        return False
    cells = zip(chain.from_iterable(x[1]), chain.from_iterable(y[1]), strict=True)
    return every(equal(a, b) for a, b in cells)


SET_SIGNS = re.compile(r"[<>]|\\(?:le|ge|ne|cup|infty|in|mathbb|setminus)(?![A-Za-z])|all real")


def real_sets(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Inequalities, intervals and their unions are compared piece by piece, brackets included."""
    if not SET_SIGNS.search(gold) and not SET_SIGNS.search(box):
        return PASS
    x = _real_set(gold)
    y = _real_set(box)
    if x is None or y is None:
        found = x or y
        value = algebra.parse(box if x else gold)
        return False if found and value and found.is_wide else PASS
    if x.variable and y.variable and not same_label(x.variable, y.variable):
        return False
    if len(x.pieces) != len(y.pieces):
        return None if len(x.pieces) > 1 or len(y.pieces) > 1 else False
    if len(x.pieces) > MAX_ITEMS:
        return None
    return _same_members(x.pieces, y.pieces, partial(_same_piece, equal))


def _same_piece(equal: Comparer, a: Piece, b: Piece) -> Verdict:
    if (a.low_closed, a.high_closed) != (b.low_closed, b.high_closed):
        return False
    return every([equal(a.low, b.low), equal(a.high, b.high)])


@lru_cache(maxsize=1024)
def _real_set(text: str) -> RealSet | None:
    return real_set(text)


def _same_members(xs, ys, same: Callable) -> Verdict:
    """Return whether each item of one collection is in the other, and the other way round."""
    grid = [[same(x, y) for y in ys] for x in xs]
    columns = zip(*grid, strict=True)
    return every([*(some(row) for row in grid), *(some(column) for column in columns)])


@dataclass(frozen=True)
class Collection:
    """Items with their labels, and the brackets around them."""

    items: list[str]
    labels: list[str]
    brackets: Bracketed | None

    @property
    def is_tuple(self) -> bool:
        return self.brackets is not None and not self.brackets.is_set

    @property
    def named(self) -> bool:
        """Whether each item has a name of its own: x = 1, y = 2."""
        return len(set(self.labels)) == len(self.labels) and all(self.labels)


@lru_cache(maxsize=4096)
def collection(text: str) -> Collection:
    """Return the items of `(1, 2)`, `\\{1, 2\\}`, `1, 2`, `x = 1, y = 2`, `x = 1 or x = 2`."""
    outer = labelled(text)
    inner = bracketed(outer.value)
    if inner and len(list_items(outer.value)) == 1:
        items = list_items(inner.content) if inner.content else []
        if len(items) > 1 or inner.is_set:
            return Collection(_expanded(items), [""] * len(items), inner)
    items = []
    labels = []
    for item in list_items(text):
        named = labelled(item)
        for value in expand_signs(named.value):
            items.append(value)
            labels.append(named.label)
    if len(set(filter(None, labels))) == 1 and labels[0]:  # x = 1, 2
        labels = [""] * len(labels) if len(items) > 1 else labels
    return Collection(items, labels, None)


def _expanded(items: list[str]) -> list[str]:
    return [value for item in items for value in expand_signs(item)]


def collections(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Tuples are ordered, sets and lists are not; brackets must agree, and names where given."""
    x = collection(gold)
    y = collection(box)
    if len(x.items) < 2 and len(y.items) < 2 and not (x.brackets or y.brackets):
        return PASS
    if max(len(x.items), len(y.items)) > MAX_ITEMS:
        return None
    if x.brackets and y.brackets:
        sides = (x.brackets.opening, x.brackets.closing)
        if sides != (y.brackets.opening, y.brackets.closing):
            return False
    if x.is_tuple or y.is_tuple:
        return _same_tuple(x, y, equal)
    if x.named and y.named and len(x.items) > 1:
        return _same_names(x, y, equal)
    named = x if x.named else y
    if named.named and len(x.items) > 1 and len({name[0] for name in named.labels}) > 1:
        return _same_tuple(x, y, equal)
    if not x.items or not y.items:
        return len(x.items) == len(y.items)
    return _same_members(x.items, y.items, equal)


def _same_tuple(x: Collection, y: Collection, equal: Comparer) -> Verdict:
    """Compare in order; named items are put in the order of their names beside a tuple."""
    if len(x.items) != len(y.items):
        return False
    if x.named and y.named:
        return _same_names(x, y, equal)
    orders = [every(map(equal, x.items, y.items))]
    for named, other in ((x, y), (y, x)):
        if not named.named:
            continue
        pairs = sorted(zip(named.labels, named.items, strict=True))
        ordered = [item for _, item in pairs]
        verdict = every(
            map(equal, ordered, y.items) if named is x else map(equal, x.items, ordered)
        )
        if other.is_tuple:
            return verdict
        orders.append(verdict)
    return some(orders)


def _same_names(x: Collection, y: Collection, equal: Comparer) -> Verdict:
    """Compare items of the same name."""
    a = dict(zip(x.labels, x.items, strict=True))
    b = dict(zip(y.labels, y.items, strict=True))
    if a.keys() != b.keys():
        return False
    return every(equal(a[name], b[name]) for name in a)


# Equations


ARGUMENT = re.compile(r"\(([A-Za-z])\)$")
NAME = re.compile(r"\\[A-Za-z]+|[A-Za-z]")


def same_label(a: str, b: str) -> bool:
    """Return whether two names are the same, or both of a function: y, f(x)."""
    return a == b or bool(FUNCTION.fullmatch(a) and FUNCTION.fullmatch(b))


def equations(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Names before = may be missing on one side; equations may be multiples of each other."""
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
    """Return the value of f(t) in terms of the x of f(x)."""
    old = ARGUMENT.search(of)
    new = ARGUMENT.search(to)
    if old is None or new is None or old[1] == new[1]:
        return value
    return NAME.sub(lambda match: new[1] if match[0] == old[1] else match[0], value)


def _same_equation(x: list[str], y: list[str]) -> Verdict | Pass:
    """Return whether two equations have the same solutions because one is a multiple."""
    a = algebra.side_difference(*x)
    b = algebra.side_difference(*y)
    if a is None or b is None:
        return PASS
    if not a.value.top or not b.value.top:  # 3 = 3 and 4 = 4 say nothing
        return False
    if algebra.ratio(a.value.top, b.value.top) is not None:
        return True
    unknown = a.opaque or b.opaque or a.rounded or b.rounded
    return PASS if unknown else False


def _same_values(gold: str, box: str, equal: Comparer) -> Verdict:
    """Compare values that may be chains, such as `5 + 3 = 8`, of equal parts."""
    x, x_holds = _chain_value(gold, equal)
    y, y_holds = _chain_value(box, equal)
    return every([equal(x, y), x_holds, y_holds])


def _chain_value(text: str, equal: Comparer) -> tuple[str, Verdict]:
    r"""Return the value of `5 + 3 = 8` or `\frac13 \approx 0.33`, and whether the chain holds."""
    sides, signs = split_top(text, RELATIONS)
    if r"\approx" in signs:
        sides = sides[: signs.index(r"\approx") + 1]
    return sides[-1], every(_is_written_as(a, b, equal) for a, b in pairwise(sides))


def _is_written_as(value: str, number: str, equal: Comparer) -> Verdict:
    """Return whether two values are equal, or the second is rounded: 1/3 = 0.33."""
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
    """Words are compared without case, punctuation and articles; a formula never equals words."""
    x = _phrase(gold)
    y = _phrase(box)
    if EMPTY in (gold, box):
        return (y if gold == EMPTY else x) in NO_SOLUTION
    if x and y and (x == y or any(x in group and y in group for group in SYNONYMS)):
        return True
    # letters without \text may be products of variables, but not both of listen and silent
    prose = PROSE.fullmatch(gold) and PROSE.fullmatch(box) and LONG_WORD.search(f"{gold} {box}")
    return False if prose or r"\text" in gold + box else PASS


def _phrase(text: str) -> str:
    """Return words in lower case without punctuation; "" for a formula."""
    text = TEXT.sub(r" \1 ", text).strip()
    if not PHRASE.fullmatch(text) or not WORD.search(text):
        return ""
    plain = PUNCTUATION.sub(" ", text.casefold())
    return ARTICLE.sub("", " ".join(plain.split()))


def expressions(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Polynomials, fractions of them, roots, i and pi are compared exactly."""
    verdict = algebra.same_expression(gold, box)
    return PASS if verdict is None else verdict


RULES: tuple[Rule, ...] = (
    same_text,
    numbers,
    clock_times,
    choices,
    ratios,
    residues,
    numerals,
    units,
    matrices,
    real_sets,
    collections,
    equations,
    words,
    expressions,
)
