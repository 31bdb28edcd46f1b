r"""Sets of real numbers: intervals and their unions, inequalities, `x \ne 3`, all reals.

A set is a list of pieces. The ends of a piece are texts, and the caller compares them.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from expo_fast.answers import algebra
from expo_fast.answers.quotients import ONE, as_number, linear_in_one_variable
from expo_fast.answers.structures import (
    ORDERS,
    bracketed,
    connective,
    labelled,
    list_items,
    split_top,
)

CUP = frozenset([r"\cup"])
MINUS = frozenset([r"\setminus", r"\backslash"])
FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
ALL_REALS = r"\mathbb{R}"
REALS = frozenset(["all real numbers", "all reals", "all real", "the real numbers"])
BUILDER = re.compile(
    r"\\\{ ?(?P<name>[a-zA-Z]) ?(?:\\in ?\\mathbb\{R\} ?)?(?:\||:|\\mid)(?P<rest>.*)\\\}"
)
OR = connective("or", r"\\(?:lor|vee)(?![A-Za-z])")
ABSOLUTE = re.compile(r"(?:\\lvert|\||\\vert)(?P<inside>[^|\\]+)(?:\\rvert|\||\\vert)")
BARE = re.compile(r"[A-Za-z](?:_ ?\w)?|\\(?:theta|alpha|beta|lambda|mu)|[A-Za-z] ?\( ?[A-Za-z] ?\)")


@dataclass(frozen=True)
class Piece:
    """An interval. A point is a closed interval with equal ends."""

    low: str
    high: str
    low_closed: bool
    high_closed: bool


@dataclass(frozen=True)
class RealSet:
    """A union of intervals, and the variable of the inequality, or "" if there was none."""

    pieces: tuple[Piece, ...]
    variable: str = ""

    @property
    def is_wide(self) -> bool:
        """Whether the set contains more than single points."""
        return any(piece.low != piece.high for piece in self.pieces)


LOWEST = r"-\infty"
HIGHEST = r"\infty"


def real_set(text: str) -> RealSet | None:
    """Return the set that a text describes, or None if it describes no set."""
    builder = BUILDER.fullmatch(text)
    if builder:
        found = real_set(builder["rest"].strip())
        return RealSet(found.pieces) if found else None
    named = labelled(text)
    if named.label:
        found = _union(named.value)
        return RealSet(found, named.label) if found else None
    alternatives = OR.sub(r"\\cup ", text)
    if OR.search(text) and split_top(text, ORDERS)[1]:
        return _alternatives(alternatives)
    if split_top(text, ORDERS)[1]:
        return _inequality(text)
    found = _union(text)
    return RealSet(found) if found else None


def _alternatives(text: str) -> RealSet | None:
    """Return the union of inequalities in one variable: x < 2 or x > 5."""
    pieces: list[Piece] = []
    variables = set()
    for part in split_top(text, CUP)[0]:
        found = _inequality(part.strip(" ,"))
        if found is None:
            return None
        pieces += found.pieces
        variables.add(found.variable)
    return RealSet(tuple(pieces), variables.pop()) if len(variables) == 1 else None


def _union(text: str) -> tuple[Piece, ...] | None:
    """Return the pieces of a union of intervals and sets of points."""
    if text == ALL_REALS or text.lower() in REALS:
        return (Piece(LOWEST, HIGHEST, False, False),)
    without, signs = split_top(text, MINUS)
    if signs:
        points = bracketed(without[1])
        if without[0] != ALL_REALS or len(without) != 2 or not points or not points.is_set:
            return None
        return _without_points(list_items(points.content, in_brackets=True))
    pieces: list[Piece] = []
    for part in split_top(text, CUP)[0]:
        found = _piece(part)
        if found is None:
            return None
        pieces += found
    return tuple(pieces)


def _piece(text: str) -> list[Piece] | None:
    """Return an interval, or the points of a set."""
    brackets = bracketed(text)
    if brackets is None:
        return None
    items = list_items(brackets.content, in_brackets=True)
    if brackets.is_set:
        return [Piece(item, item, True, True) for item in items]
    if len(items) != 2 or r"\{" in (brackets.opening, brackets.closing):
        return None
    low, high = items
    # [-\infty, 5) is a slip of the pen: no set of reals holds infinity
    low_closed = brackets.opening == "[" and low.replace(" ", "") != LOWEST
    high_closed = brackets.closing == "]" and high.lstrip("+ ") != HIGHEST
    return [Piece(low, high, low_closed, high_closed)]


def _without_points(points: list[str]) -> tuple[Piece, ...] | None:
    """Return the reals without some rational points."""
    values = []
    for point in points:
        expression = algebra.parse(point)
        value = expression and as_number(expression.value)
        if value is None:
            return None
        values.append((value, point))
    ends = [LOWEST, *(point for _, point in sorted(values)), HIGHEST]
    return tuple(Piece(low, high, False, False) for low, high in pairwise(ends))


def _inequality(text: str) -> RealSet | None:
    """Return the solutions of `x > 2`, `2 < x`, `1 <= x < 2`, `-2x > 4` or `x != 3`."""
    sides, signs = split_top(text, ORDERS)
    if len(signs) == 2:
        return _between(sides, signs)
    if len(signs) != 1:
        return None
    left, right = sides
    sign = signs[0]
    if ABSOLUTE.fullmatch(left.strip()) or ABSOLUTE.fullmatch(right.strip()):
        return _distance(left.strip(), right.strip(), sign)
    if BARE.fullmatch(right) and not BARE.fullmatch(left):
        left, right, sign = right, left, FLIPPED[sign]
    if not BARE.fullmatch(left):
        solved = _solve(left, right, sign)
        if solved is None:
            return None
        left, sign, right = solved
    if sign == r"\ne":
        pieces = _without_points([right])
        return RealSet(pieces, left) if pieces else None
    closed = sign in (r"\le", r"\ge")
    if sign in ("<", r"\le"):
        return RealSet((Piece(LOWEST, right, False, closed),), left)
    return RealSet((Piece(right, HIGHEST, closed, False),), left)


def turned_around(text: str) -> str:
    """Return `y > x` for `x < y`, a relation of two variables. Return "" for another text."""
    sides, signs = split_top(text, ORDERS)
    if len(signs) != 1 or not all(map(BARE.fullmatch, sides)):
        return ""
    return f"{sides[1]} {FLIPPED[signs[0]]} {sides[0]}"


def _distance(left: str, right: str, sign: str) -> RealSet | None:
    """Return the solutions of `|x| < 3` or `|2x - 1| >= 3`, with a positive number on one side."""
    if ABSOLUTE.fullmatch(right):
        left, right, sign = right, left, FLIPPED[sign]
    absolute = ABSOLUTE.fullmatch(left)
    inside = absolute and algebra.parse(absolute["inside"])
    parsed = algebra.parse(right)
    limit = parsed and as_number(parsed.value)
    if not inside or not limit or inside.opaque or inside.value.bottom.keys() != {ONE}:
        return None
    linear = linear_in_one_variable(inside.value.top)
    if linear is None or limit < 0 or sign == r"\ne":
        return None
    name, slope, constant = linear
    slope, constant = (each / inside.value.bottom[ONE] for each in (slope, constant))
    ends = sorted([(-limit - constant) / slope, (limit - constant) / slope])
    low, high = map(str, ends)
    closed = sign in (r"\le", r"\ge")
    if sign in ("<", r"\le"):
        return RealSet((Piece(low, high, closed, closed),), name)
    below = Piece(LOWEST, low, False, closed)
    above = Piece(high, HIGHEST, closed, False)
    return RealSet((below, above), name)


def _between(sides: list[str], signs: list[str]) -> RealSet | None:
    """Return the solutions of `1 <= x < 2` or `2 > x >= 1`."""
    low, name, high = sides
    if not BARE.fullmatch(name):
        return None
    if set(signs) <= {">", r"\ge"}:
        low, high = high, low
        signs = [FLIPPED[sign] for sign in reversed(signs)]
    if not set(signs) <= {"<", r"\le"}:
        return None
    return RealSet((Piece(low, high, signs[0] == r"\le", signs[1] == r"\le"),), name)


def _solve(left: str, right: str, sign: str) -> tuple[str, str, str] | None:
    """Return (x, sign, number) of an inequality that is linear in one variable, else None."""
    side = algebra.side_difference(left, right)
    if side is None or side.opaque or side.value.bottom.keys() != {ONE}:
        return None
    linear = linear_in_one_variable(side.value.top)
    if linear is None:
        return None
    name, slope, constant = linear
    denominator = side.value.bottom[ONE]
    end = Fraction(-constant, slope)
    if slope * denominator < 0:
        sign = FLIPPED[sign]
    return name, sign, str(end)
