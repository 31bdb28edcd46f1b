"""The two properties of a good positive sample (arXiv:2507.02834, section 3), measured every step.

    in-distribution:  nll(c) = -1/|c| log pi(c, a | q), of explanation, own attempt, expert solution
    learning signal:  lift   = log pi(a* | q, c~) - log mean_i pi(a* | q, c_i),  c_i own attempts

All under the plain question; diagnostics, not theorems. The first two nll fall out of the update
and of sampling; here are the others, on a few questions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from expo_fast.generate import Completion
from expo_fast.pack import Sample
from expo_fast.prompts import Prompter
from expo_fast.reward import last_boxed_span
from expo_fast.tasks import Problem

OWN = 2  # own attempts measured per question


@dataclass(frozen=True)
class Subject:
    """One question and the texts to compare."""

    problem: Problem
    own: Sequence[Completion]  # with at least one token each
    explanation: Sequence[int] | None  # token ids of an accepted one


def diagnose(
    subjects: Sequence[Subject],
    prompter: Prompter,
    score: Callable[[list[Sample]], list[Tensor]],  # log-probs of the completion's tokens, nats
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
            named.append((("behind exp", i), _answer(s.problem, s.explanation, prompter)))
            named += [(("behind own", i), _answer(s.problem, c.token_ids, prompter)) for c in own]
    found: dict[tuple[str, int], list[Tensor]] = {}
    logps = score([sample for _, sample in named])
    for (key, _), logp in zip(named, logps, strict=True):
        found.setdefault(key, []).append(logp)
    expert = [-float(x[0].mean()) for (name, _), x in found.items() if name == "expert"]
    return {"expert/nll": mean(expert), "exp/lift": _mean_lift(found)} | _gap(subjects, found)


def _answer(problem: Problem, completion_ids: Sequence[int], prompter: Prompter) -> Sample:
    """The right answer in the box behind a chain of thought.

    What the chain itself boxes is cut off; one that boxes nothing gets its box at the end.
    """
    tokenizer = prompter.tokenizer
    ids = [t for t in completion_ids if t not in tokenizer.all_special_ids]
    span = last_boxed_span(tokenizer.decode(ids))
    while span is not None and ids and len(tokenizer.decode(ids)) > span[0]:
        ids.pop()
    box = tokenizer(" \\boxed{", add_special_tokens=False).input_ids
    answer = tokenizer(problem.answer, add_special_tokens=False).input_ids  # "}." may be one token
    return Sample((*prompter.solve(problem), *ids, *box), tuple(answer))


def _mean_lift(found: dict[tuple[str, int], list[Tensor]]) -> float | None:
    lifts = []
    for (name, i), (explained, *_) in found.items():
        own = [float(x.sum()) for x in found.get(("behind own", i), [])]
        if name == "behind exp" and own:
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
    ]
    n = sum(map(len, gaps))
    return {
        "logp_gap/max": max((float(g.max()) for g in gaps), default=None),
        "logp_gap/mean": sum(float(g.sum()) for g in gaps) / n if n else None,
    }


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
