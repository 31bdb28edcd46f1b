"""Verdicts on the two properties of a good positive sample (ExPO, arXiv:2507.02834, section 3).

A verdict has a word and counts of the steps that measured the property, in all runs of a
configuration. It claims nothing beyond these numbers.
"""

from collections.abc import Sequence
from statistics import fmean

from expo_fast.reporting.runs import Group, numbers


def in_distribution(group: Group) -> str:
    """Return whether explanations are likelier than expert solutions, as HTML.

    Both NLLs are under the plain question.
    """
    differences = numbers(group.steps, "exp/nll_over_expert")
    if not differences:
        return "In-distribution: not measured."
    verdict = _verdict(
        "In-distribution",
        [x < 0 for x in differences],
        reason="the explanation's NLL is {} the expert's",
        side="below",
    )
    return f"{verdict}. Mean difference {fmean(differences):+.3g} nats per token."


def learning_signal(group: Group) -> str:
    """Return, as HTML, whether explanations make the answer likelier than own attempts do."""
    lift = numbers(group.steps, "exp/lift")
    stated = numbers(group.steps, "exp/lift_stated")
    if not lift:
        return "Learning signal: not measured."
    what = "Learning signal"
    if not stated:
        what += " (the files do not say whether the answer was masked)"
    verdict = _verdict(what, [x > 0 for x in lift], reason="the lift is {} 0", side="above")
    low = f"lowest {min(lift):.3g}"
    high = f"highest {max(lift):.3g}"
    text = f"{verdict}. Mean {fmean(lift):.3g} nats, {low}, {high}"
    if stated:
        text += f"; with the answer stated, mean {fmean(stated):.3g}"
    return text + "."


def _verdict(what: str, holds: Sequence[bool], *, reason: str, side: str) -> str:
    n_steps = len(holds)
    n_holds = sum(holds)
    if 2 * n_holds > n_steps:
        word, n = "holds", n_holds
    else:
        word, n = "fails", n_steps - n_holds
        side = f"not {side}"
    shown = f'<b class="{word}">{word}</b>'
    return f"{what}: {shown} in {n} of {n_steps} measured steps: {reason.format(side)}"
