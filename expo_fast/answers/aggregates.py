"""Rules for answers with several parts: matrices, sets of reals, tuples, sets and lists."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain

from expo_fast.answers import algebra
from expo_fast.answers.real_sets import OR, Piece, RealSet, real_set, turned_around
from expo_fast.answers.spelling import squash
from expo_fast.answers.structures import (
    MAX_ITEMS,
    Bracketed,
    bracketed,
    expand_signs,
    labelled,
    list_items,
    matrix_rows,
    same_label,
)
from expo_fast.answers.verdicts import PASS, Comparer, Pass, Verdict, every, some


def matrices(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Compare matrices cell by cell. Their brackets may differ."""
    x = matrix_rows(gold)
    y = matrix_rows(box)
    if x is None and y is None:
        return PASS
    # The other answer may be a product with a matrix. It is wrong if it is a plain expression.
    if x is None or y is None:
        return PASS if algebra.parse(box if x else gold) is None else False
    if x[0] != y[0] or [len(row) for row in x[1]] != [len(row) for row in y[1]]:
        return False
    cells = zip(chain.from_iterable(x[1]), chain.from_iterable(y[1]), strict=True)
    return every(equal(a, b) for a, b in cells)


SET_SIGNS = re.compile(r"[<>]|\\(?:le|ge|ne|cup|infty|in|mathbb|setminus)(?![A-Za-z])|all real")


def real_sets(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Compare inequalities, intervals and their unions piece by piece, with their brackets."""
    if not SET_SIGNS.search(gold) and not SET_SIGNS.search(box):
        return PASS
    turned = turned_around(box)
    if turned and squash(gold) == squash(turned):  # x < y, y > x
        return True
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


def _same_members(xs, ys, same: Callable, counted: bool = False) -> Verdict:
    """Return whether each item of either collection is also in the other.

    If `counted`, it must be there as often.
    """
    if counted and len(xs) != len(ys):
        return False
    grid = [[same(x, y) for y in ys] for x in xs]
    columns = list(zip(*grid, strict=True))
    verdict = every([*(some(row) for row in grid), *(some(column) for column in columns)])
    if not counted or not verdict:
        return verdict
    # Row i has a True for each y that equals x_i, and the column of such a y for each x like x_i.
    return all(
        row.count(True) == column.count(True)
        for i, row in enumerate(grid)
        for column in columns
        if column[i] is True
    )


@dataclass(frozen=True)
class Collection:
    """Items with their labels, and the brackets around them."""

    items: list[str]
    labels: list[str]
    brackets: Bracketed | None
    may_repeat: bool  # a set, solutions of an equation, or both cases of a sign

    @property
    def is_tuple(self) -> bool:
        return self.brackets is not None and not self.brackets.is_set

    @property
    def named(self) -> bool:
        """Whether each item has a different name, as in x = 1, y = 2."""
        return len(set(self.labels)) == len(self.labels) and all(self.labels)


@lru_cache(maxsize=4096)
def collection(text: str) -> Collection:
    """Return the items of `(1, 2)`, `\\{1, 2\\}`, `1, 2`, `x = 1, y = 2` or `x = 1 or x = 2`."""
    outer = labelled(text)
    inner = bracketed(outer.value)
    if inner and len(list_items(outer.value)) == 1:
        items = list_items(inner.content, in_brackets=True) if inner.content else []
        if len(items) > 1 or inner.is_set:
            return Collection(_expanded(items), [""] * len(items), inner, inner.is_set)
    items = []
    labels = []
    for item in list_items(text):
        named = labelled(item)
        for value in expand_signs(named.value):
            items.append(value)
            labels.append(named.label)
    may_repeat = any(labels) or r"\pm" in text or r"\mp" in text
    if len(set(filter(None, labels))) == 1 and labels[0]:  # x = 1, 2 has one name for all items
        labels = [""] * len(labels) if len(items) > 1 else labels
    return Collection(items, labels, None, may_repeat)


def _expanded(items: list[str]) -> list[str]:
    return [value for item in items for value in expand_signs(item)]


def collections(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Compare tuples in order, and sets and lists in any order.

    Sets and solutions, such as x = 1 or x = 1, may repeat an item, and so may a list with a sign
    for both cases, such as 1 \\pm 0. Other lists must have each item as often.
    Brackets must agree. Names must agree if both answers have names.
    """
    x = collection(gold)
    y = collection(box)
    if len(x.items) < 2 and len(y.items) < 2 and not (x.brackets or y.brackets):
        return PASS
    if max(len(x.items), len(y.items)) > MAX_ITEMS:
        return None
    alternatives = not y.brackets and OR.search(box)  # 1 or 2 is no point
    if not _same_brackets(x.brackets, y.brackets) or (x.is_tuple and alternatives):
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
    counted = not (x.may_repeat or y.may_repeat or OR.search(gold) or OR.search(box))
    return _same_members(x.items, y.items, equal, counted)


def _same_brackets(x: Bracketed | None, y: Bracketed | None) -> bool:
    """Return whether brackets agree.

    If one side has no brackets, the other may have ( ) or { }: 1, 2 equals (1, 2), not [1, 2).
    """
    if x and y:
        return (x.opening, x.closing) == (y.opening, y.closing)
    brackets = x or y
    return brackets is None or brackets.is_set or brackets.is_round


def _same_tuple(x: Collection, y: Collection, equal: Comparer) -> Verdict:
    """Compare items in order.

    If only one side has names, its items are sorted by name beside a tuple. Beside a list, either
    order may be right.
    """
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
    """Compare the items that have the same name."""
    a = dict(zip(x.labels, x.items, strict=True))
    b = dict(zip(y.labels, y.items, strict=True))
    if a.keys() != b.keys():
        return False
    return every(equal(a[name], b[name]) for name in a)
