"""The two properties of a good positive sample (arXiv:2507.02834, section 3).

    in-distribution:  nll(c) = -1/|c| log pi(c, a | q), of explanation, attempt, expert solution
    learning signal:  lift   = log pi(a* | q, c) - log mean_i pi(a* | q, c_i),  c_i the attempts

All log-probs are under the plain question. These are diagnostics, not theorems. An explanation that
states a* has a lift because a* can be copied. `exp/lift` therefore masks a* in c and c_i, and
`exp/lift_stated` does not. `exp/nll_over_expert` is the explanation's NLL minus the expert
solution's, on questions that have both. The NLLs of explanations and attempts come from the update
and from sampling. The other metrics are measured here, on a few questions
of every `diagnose_every`-th step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from expo_fast.algorithms.explanations import answer_after
from expo_fast.algorithms.metrics import Metrics, mean
from expo_fast.data.problems import Problem
from expo_fast.data.prompts import Prompter
from expo_fast.generate import Completion
from expo_fast.modeling.packing import Sample

ATTEMPTS = 2  # attempts measured per question


@dataclass(frozen=True)
class DiagnosedQuestion:
    """A question and the texts to compare."""

    problem: Problem
    attempts: Sequence[Completion]
    """Each has at least one token. Attempts without log-probs are left out of `logp_gap`."""
    explanation: Sequence[int] | None
    """Token ids of an accepted explanation."""


@dataclass(frozen=True)
class DiagnosticSample:
    """A sample, and what its log-probs measure."""

    question: int
    """Index of its question in the list."""
    kind: str
    """Kind of text: `attempt`, `expert` or `explanation`."""
    sample: Sample
    is_answer: bool = False
    """Whether the completion is the right answer after the text, and not the text itself."""
    masked: bool = False
    """Whether the answer is masked in the text before it."""


@dataclass
class _Measured:
    """Log-probs of the samples of one question."""

    texts: dict[str, list[Tensor]] = field(default_factory=dict)
    answers: dict[tuple[str, bool], list[Tensor]] = field(default_factory=dict)


def diagnostic_samples(
    questions: Sequence[DiagnosedQuestion], prompter: Prompter
) -> list[DiagnosticSample]:
    """Return the samples whose log-probs `diagnostic_metrics` needs."""
    samples = []
    for i, question in enumerate(questions):
        problem = question.problem
        prompt_ids = prompter.solve(problem)
        attempts = [tuple(attempt.token_ids) for attempt in question.attempts[:ATTEMPTS]]
        texts = [("attempt", ids) for ids in attempts]
        expert = expert_ids(problem, prompter)
        if expert is not None:
            texts.append(("expert", expert))
        if question.explanation is not None:
            texts.append(("explanation", tuple(question.explanation)))
        for kind, ids in texts:
            samples.append(DiagnosticSample(i, kind, Sample(prompt_ids, ids)))
        if question.explanation is None:
            continue
        for mask in (True, False):
            before = [("explanation", tuple(question.explanation))]
            before += [("attempt", ids) for ids in attempts]
            for kind, ids in before:
                sample = answer_after(problem, ids, prompter, mask=mask)
                samples.append(DiagnosticSample(i, kind, sample, is_answer=True, masked=mask))
    return samples


def expert_ids(problem: Problem, prompter: Prompter) -> tuple[int, ...] | None:
    """Return the expert's solution, None if there is none or the template cannot render it."""
    if problem.solution is None:
        return None
    try:
        return prompter.expert(problem)
    except ValueError:
        return None  # a run that trains on solutions has been refused before


def diagnostic_metrics(
    questions: Sequence[DiagnosedQuestion],
    samples: Sequence[DiagnosticSample],
    logprobs: Sequence[Tensor],
) -> Metrics:
    """Return means over the questions. A metric is None if no question has its kind of text.

    logprobs: of the samples' completion tokens under the trained model, in nats. `logp_gap` is
    their absolute difference from the generator's log-probs, on the attempts' tokens.
    """
    measured = [_Measured() for _ in questions]
    for sample, values in zip(samples, logprobs, strict=True):
        question = measured[sample.question]
        if sample.is_answer:
            question.answers.setdefault((sample.kind, sample.masked), []).append(values)
        else:
            question.texts.setdefault(sample.kind, []).append(values)
    expert_nlls = []
    nlls_over_expert = []
    for question in measured:
        expert = _nll(question, "expert")
        explanation = _nll(question, "explanation")
        if expert is not None:
            expert_nlls.append(expert)
            if explanation is not None:
                nlls_over_expert.append(explanation - expert)
    metrics = {
        "expert/nll": mean(expert_nlls),
        "exp/nll_over_expert": mean(nlls_over_expert),
        "exp/lift": _mean_lift(measured, masked=True),
        "exp/lift_stated": _mean_lift(measured, masked=False),
    }
    return metrics | _logp_gap(questions, measured)


def _nll(question: _Measured, kind: str) -> float | None:
    if kind not in question.texts:
        return None
    return -float(question.texts[kind][0].mean())


def _mean_lift(measured: Sequence[_Measured], *, masked: bool) -> float | None:
    lifts = []
    for question in measured:
        after_attempts = question.answers.get(("attempt", masked), [])
        if not after_attempts:
            continue
        attempts = [float(values.sum()) for values in after_attempts]
        largest = max(attempts)
        mean_ratio = mean([math.exp(logp - largest) for logp in attempts])
        log_mean = largest + math.log(mean_ratio or 0.0)
        (after_explanation,) = question.answers[("explanation", masked)]
        lifts.append(float(after_explanation.sum()) - log_mean)
    return mean(lifts)


def _logp_gap(questions: Sequence[DiagnosedQuestion], measured: Sequence[_Measured]) -> Metrics:
    gaps = []
    for question, found in zip(questions, measured, strict=True):
        attempts = question.attempts[:ATTEMPTS]
        for attempt, logp in zip(attempts, found.texts.get("attempt", []), strict=True):
            if len(attempt.logp):
                gaps.append((attempt.logp - logp).abs())
    n_tokens = sum(len(gap) for gap in gaps)
    total = sum(float(gap.sum()) for gap in gaps)
    return {
        "logp_gap/max": max((float(gap.max()) for gap in gaps), default=None),
        "logp_gap/mean": total / n_tokens if n_tokens else None,
    }
