"""Verdicts with three values, and the comparer that applies the rules in order.

A rule returns a verdict, or `PASS` if it does not apply. The verdict is None if the leaves below
are undecided. A leaf is an expression that the rules cannot split, and that exact algebra cannot
decide. In the trainer, leaves are not decided, so that the verdict is None. In a worker process,
math-verify decides them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

MAX_DEPTH = 8  # of structures within structures

Verdict = bool | None
Leaf = Callable[[str, str], Verdict]
Pass = Literal["pass"]
PASS: Pass = "pass"


@dataclass(frozen=True)
class Comparer:
    """A function that compares two answers, or parts of them, by rules."""

    rules: "tuple[Rule, ...]"
    leaf: Leaf
    depth: int = 0

    def __call__(self, gold: str, box: str) -> Verdict:
        """Return the verdict of the first rule that applies, or else the verdict of the leaf."""
        if self.depth > MAX_DEPTH:
            return None
        deeper = replace(self, depth=self.depth + 1)
        for rule in self.rules:
            verdict = rule(gold, box, deeper)
            if verdict != PASS:
                return verdict
        return self.leaf(gold, box)


Rule = Callable[[str, str, Comparer], Verdict | Pass]


def every(verdicts: Iterable[Verdict]) -> Verdict:
    """Return False if any verdict is False, else None if any is None, else True."""
    result: Verdict = True
    for verdict in verdicts:
        if verdict is False:
            return False
        if verdict is None:
            result = None
    return result


def some(verdicts: Iterable[Verdict]) -> Verdict:
    """Return True if any verdict is True, else None if any is None, else False."""
    result: Verdict = False
    for verdict in verdicts:
        if verdict:
            return True
        if verdict is None:
            result = None
    return result
