"""The two properties of a good positive sample (arXiv:2507.02834, section 3), measured every step.

    in-distribution:  nll(c) = -1/|c| log pi(c, a | q), of explanation, own attempt, expert solution
                      (`exp/nll_over_expert`: the explanation's less the expert's, same questions)
    learning signal:  lift   = log pi(a* | q, c~) - log mean_i pi(a* | q, c_i),  c_i own attempts

All under the plain question; diagnostics, not theorems. An explanation that states a* has its lift
by copying (`exp/lift_stated`), so the one to look at has a* masked in c~ and c_i (`exp/lift`). The
first two nll fall out of the update and of sampling; here are the others, on a few questions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from expo_fast.algorithms.explanations import ScoreTokens, answer_behind
from expo_fast.data.problems import Problem
from expo_fast.data.prompts import Prompter
from expo_fast.generate import Completion
from expo_fast.modeling.packing import Sample

OWN = 2  # own attempts measured per question


@dataclass(frozen=True)
class Subject:
    """One question and the texts to compare."""

    problem: Problem
    own: Sequence[Completion]  # with at least one token each; without log-probs it has no gap
    explanation: Sequence[int] | None  # token ids of an accepted one


def diagnose(
    subjects: Sequence[Subject],
    prompter: Prompter,
    score: ScoreTokens,
) -> dict[str, float | None]:
    """Means over the subjects; None where no text of the kind is at hand.

    logp_gap compares the generator's log-probs with the trainer's, on the own attempts' tokens.
    """
    named: list[tuple[tuple[str, int], Sample]] = []
    for i, s in enumerate(subjects):
        prompt, own = prompter.solve(s.problem), s.own[:OWN]
        named += [(("own", i), Sample(prompt, tuple(c.token_ids))) for c in own]
        if s.problem.solution is not None:
            named.append((("expert", i), Sample(prompt, prompter.expert(s.problem))))
        if s.explanation is not None:
            named.append((("exp", i), Sample(prompt, tuple(s.explanation))))
        for mask in (True, False) if s.explanation is not None else ():
            texts = [("exp", s.explanation), *(("own", c.token_ids) for c in own)]
            for whose, ids in texts:
                sample = answer_behind(s.problem, ids, prompter, mask=mask)
                named.append(((f"{whose} {mask}", i), sample))
    found: dict[tuple[str, int], list[Tensor]] = {}
    logps = score([sample for _, sample in named])
    for (key, _), logp in zip(named, logps, strict=True):
        found.setdefault(key, []).append(logp)
    nll = {key: -float(x[0].mean()) for key, x in found.items()}
    expert = {i: x for (name, i), x in nll.items() if name == "expert"}
    over = [x - expert[i] for (name, i), x in nll.items() if name == "exp" and i in expert]
    likelihoods = {"expert/nll": mean([*expert.values()]), "exp/nll_over_expert": mean(over)}
    lifts = {"exp/lift": _mean_lift(found, True), "exp/lift_stated": _mean_lift(found, False)}
    return likelihoods | lifts | _gap(subjects, found)


def _mean_lift(found: dict[tuple[str, int], list[Tensor]], mask: bool) -> float | None:
    lifts = []
    for (name, i), (explained, *_) in found.items():
        own = [float(x.sum()) for x in found.get((f"own {mask}", i), [])]
        if name == f"exp {mask}" and own:
            top = max(own)
            log_mean = top + math.log(mean([math.exp(x - top) for x in own]) or 0.0)
            lifts.append(float(explained.sum()) - log_mean)
    return mean(lifts)


def _gap(
    subjects: Sequence[Subject], found: dict[tuple[str, int], list[Tensor]]
) -> dict[str, float | None]:
    gaps = [
        (c.logp - logp).abs()
        for i, s in enumerate(subjects)
        for c, logp in zip(s.own[:OWN], found.get(("own", i), []), strict=True)
        if len(c.logp)
    ]
    n = sum(map(len, gaps))
    return {
        "logp_gap/max": max((float(g.max()) for g in gaps), default=None),
        "logp_gap/mean": sum(float(g.sum()) for g in gaps) / n if n else None,
    }


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
