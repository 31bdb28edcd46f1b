"""Verdicts of three values, and the comparer that asks one rule after the other.

A rule returns a verdict, None where the leaves under it are not decided, or `PASS` where it does
not apply. A leaf is an expression that the rules cannot take apart, and that exact algebra leaves
open. In the trainer nothing decides leaves, so that the verdict is None; in a worker process
math-verify does.
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
    """How the parts of two answers are compared."""

    rules: "tuple[Rule, ...]"
    leaf: Leaf
    depth: int = 0

    def __call__(self, gold: str, box: str) -> Verdict:
        """Return the verdict of the first rule that applies, or that of the leaf."""
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
