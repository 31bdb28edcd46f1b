"""Self-explanations (ExPO, arXiv:2507.02834): sampled with the answer shown, trained on without it.

An explanation c ~ pi(. | q, a*) becomes a positive sample of the plain question q: its token ids
are placed after q's own prompt and are never tokenised again. It is accepted only if it stops
before the length limit, ends with the right answer, and passes `explanation_filter`. Of a
question's accepted explanations, the best are kept. By default these are the likeliest under the
plain question, because the policy is unlikely to write a copied or wrong derivation by itself.

The algorithms make four calls, between which they sample and compute log-probs themselves:

    requests = explanation_requests(questions, ...)           for the generator
    found = accept_explanations(questions, completions, ...)
    samples = ranking_samples(found, ...)                     for completion_logprobs
    keep_best(found, logprobs, ...)
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from expo_fast.algorithms.explanation_filter import before_claim, is_unfit, leaks, masked, stated
from expo_fast.algorithms.logprobs import KnownLogprobs, TokenIds
from expo_fast.algorithms.rollout import Verifier, make_request, mean
from expo_fast.config import Train
from expo_fast.data.answer_grading import last_boxed_span
from expo_fast.data.problems import Problem
from expo_fast.data.prompts import Prompter, boxed, request_seed
from expo_fast.distributed.world import World
from expo_fast.generate import Completion, Request
from expo_fast.modeling.packing import Sample

ByProblem = dict[str, list[TokenIds]]  # token ids of explanations by problem id


@dataclass
class Explanations:
    """The accepted explanations of a batch of questions, with counts."""

    accepted: ByProblem = field(default_factory=dict)
    n_questions: int = 0
    n_sampled: int = 0
    n_right: int = 0
    """Explanations that stop before the length limit and box the right answer."""
    n_leaked: int = 0
    """Right explanations that mention a given answer."""
    n_unfit: int = 0
    """Right explanations that `is_unfit` rejects. They include those that mention the answer."""
    ranking: KnownLogprobs = field(default_factory=KnownLogprobs)
    """The log-probs that ranked the explanations, in a step whose diagnostics use them again."""

    @property
    def rate(self) -> float | None:
        """Fraction of the questions with an accepted explanation."""
        return len(self.accepted) / self.n_questions if self.n_questions else None

    @property
    def leak_rate(self) -> float | None:
        """Fraction of the right explanations that mention a given answer."""
        return self.n_leaked / self.n_right if self.n_right else None

    @property
    def unfit_rate(self) -> float | None:
        """Fraction of the right explanations that `is_unfit` rejects."""
        return self.n_unfit / self.n_right if self.n_right else None

    def metrics(self) -> dict[str, float | None]:
        lengths = [len(ids) for kept in self.accepted.values() for ids in kept]
        return {
            "exp/rate": self.rate,
            "exp/accepted": sum(len(kept) for kept in self.accepted.values()),
            "exp/right_ratio": self.n_right / self.n_sampled if self.n_sampled else None,
            "exp/leak_rate": self.leak_rate,
            "exp/unfit_rate": self.unfit_rate,
            "exp/mean_length": mean(lengths),
        }


@dataclass(frozen=True)
class _Candidate:
    """A complete explanation."""

    question: Problem
    ids: TokenIds
    text: str


@dataclass
class ExplanationCache:
    """Accepted explanations of earlier steps, for `explain_every` and the shuffled control."""

    fresh: dict[str, tuple[int, list[TokenIds]]] = field(default_factory=dict)
    """By problem id: the step that sampled the explanations, and the explanations."""
    earlier: ByProblem = field(default_factory=dict)
    """The last accepted explanations of each question. Used only with `shuffle_explanations`."""

    def is_fresh(self, problem_id: str, step: int, explain_every: int) -> bool:
        """Return whether a question's explanations may be reused at `step`."""
        if problem_id not in self.fresh:
            return False
        sampled_at, _ = self.fresh[problem_id]
        return explain_every == 0 or step - sampled_at < explain_every

    def update(self, accepted: ByProblem, step: int, explain_every: int) -> None:
        """Add the explanations accepted at `step`, and remove those that are no longer fresh."""
        for problem_id, explanations in accepted.items():
            self.fresh[problem_id] = (step, explanations)
        for problem_id in list(self.fresh):
            if not self.is_fresh(problem_id, step, explain_every):
                del self.fresh[problem_id]

    def copy(self) -> "ExplanationCache":
        """Return a cache with the same explanations, which later updates do not change."""
        return ExplanationCache(fresh=dict(self.fresh), earlier=dict(self.earlier))

    def state(self) -> dict[str, Any]:
        """Return JSON values for `load_state`."""
        fresh = {}
        for problem_id, (step, explanations) in self.fresh.items():
            fresh[problem_id] = [step, [list(ids) for ids in explanations]]
        earlier = {}
        for problem_id, explanations in self.earlier.items():
            earlier[problem_id] = [list(ids) for ids in explanations]
        return {"explanations": fresh, "earlier": earlier}

    def load_state(self, values: Mapping[str, Any]) -> None:
        self.fresh = {}
        for problem_id, (step, explanations) in values["explanations"].items():
            self.fresh[problem_id] = (step, [tuple(ids) for ids in explanations])
        self.earlier = {}
        for problem_id, explanations in values["earlier"].items():
            self.earlier[problem_id] = [tuple(ids) for ids in explanations]


def questions_to_sample(
    questions: Sequence[Problem], cache: ExplanationCache, config: Train, step: int
) -> list[Problem]:
    """Return the questions without a reusable explanation in the cache."""
    every = config.explain_every
    return [question for question in questions if not cache.is_fresh(question.id, step, every)]


def explanation_requests(
    questions: Sequence[Problem], prompter: Prompter, config: Train, step: int
) -> list[Request]:
    """Return K requests for each question, with the answer shown in the prompt."""
    requests = []
    for question in questions:
        prompt_ids = prompter.explain(question)
        for k in range(config.explanations_per_question):
            request = make_request(
                prompt_ids,
                prompter,
                config,
                temperature=config.explain_temperature,
                seed_key=("explain", step, question.id, k),
            )
            requests.append(request)
    return requests


def accept_explanations(
    questions: Sequence[Problem],
    completions: Sequence[Completion],
    prompter: Prompter,
    verify: Verifier,
    *,
    append_answer: bool,
) -> Explanations:
    """Return the explanations that are fit to train on, with counts of the others.

    completions: an equal number for each question, in the order of `explanation_requests`.
    append_answer: append the boxed answer to an explanation that states the answer without a box.
    The box replaces "the answer is 7" if the explanation says so. It is the a* of the paper's
    log pi(c, a* | q).
    """
    per_question = len(completions) // len(questions) if questions else 0
    explained = [question for question in questions for _ in range(per_question)]
    candidates: list[_Candidate] = []
    for question, completion in zip(explained, completions, strict=True):
        if completion.finish_reason != "stop":
            continue
        ids = prompter.ended(completion.token_ids, completion.finish_reason)
        text = prompter.text(ids)
        if append_answer and last_boxed_span(text) is None and stated(text, question.answer):
            ids = with_appended_answer(ids, text, question, prompter)
            text = prompter.text(ids)
        candidates.append(_Candidate(question, ids, text))
    # Judged as they are trained on, after the cut and with the appended answer.
    verdicts = verify([each.question.answer for each in candidates], [x.text for x in candidates])
    found = Explanations(n_questions=len(questions), n_sampled=len(explained))
    for each, verdict in zip(candidates, verdicts, strict=True):
        if verdict != 1.0:
            continue
        found.n_right += 1
        found.n_leaked += leaks(each.text)
        if is_unfit(each.text, each.question):
            found.n_unfit += 1
        else:
            found.accepted.setdefault(each.question.id, []).append(each.ids)
    return found


def with_appended_answer(
    ids: TokenIds, text: str, question: Problem, prompter: Prompter
) -> TokenIds:
    """Return the token ids of an explanation with its boxed answer at the end."""
    kept = before_claim(text, question.answer)
    return prompter.longer(prompter.cut(ids, kept), boxed(question.answer))


def ranking_samples(
    found: Explanations, questions: Sequence[Problem], prompter: Prompter, choose: str
) -> list[Sample]:
    """Return a sample for each accepted explanation. The sample's log-probs rank the explanation.

    choose: with `likelihood`, the sample is the explanation under the plain question. With `lift`,
    it is the answer after the explanation, in which the answer is masked. With `first`, no sample
    is needed and the list is empty.
    """
    if choose == "first":
        return []
    by_id = {question.id: question for question in questions}
    samples = []
    for problem_id, explanations in found.accepted.items():
        question = by_id[problem_id]
        prompt_ids = prompter.solve(question)
        for ids in explanations:
            if choose == "likelihood":
                samples.append(Sample(prompt_ids, ids))
            else:
                samples.append(answer_after(question, ids, prompter, mask=True))
    return samples


def ranks_of(logprobs: Sequence[Tensor], choose: str) -> list[float]:
    """Return the value to rank each explanation by: higher is better.

    logprobs: of the tokens of `ranking_samples`, in nats.
    choose: `likelihood` takes their mean over the explanation, `lift` their sum over the answer.
    """
    if choose == "likelihood":
        return [float(values.mean()) for values in logprobs]
    return [float(values.sum()) for values in logprobs]


def keep_best(
    found: Explanations, logprobs: Sequence[Tensor], *, choose: str, keep: int
) -> ByProblem:
    """Return the `keep` best explanations of each question, best first. keep=0 keeps all.

    logprobs: of the tokens of `ranking_samples`, in nats.
    choose: `first` keeps the order of sampling.

    In the first steps of the default job, a third of the accepted explanations had correct
    equations. By likelihood, one of these ranked above one of the others in 94% of comparisons
    (benchmarks/RESULTS.md).
    """
    ranks = ranks_of(logprobs, choose)
    kept: ByProblem = {}
    start = 0
    for problem_id, explanations in found.accepted.items():
        order = list(range(len(explanations)))
        if choose != "first":
            own = ranks[start : start + len(explanations)]
            order.sort(key=lambda i: -own[i])
        start += len(explanations)
        best = [explanations[i] for i in order]
        kept[problem_id] = best[:keep] if keep else best
    return kept


def tokens_of(requests: Sequence[Request], completions: Sequence[Completion]) -> int:
    """Return the number of tokens of prompts and completions."""
    prompts = sum(len(request.prompt_ids) for request in requests)
    return prompts + sum(len(completion.token_ids) for completion in completions)


def of_all_ranks(
    world: World,
    questions: Sequence[Problem],
    found: Explanations,
    best: ByProblem,
    n_tokens: int,
) -> tuple[Explanations, ByProblem, int]:
    """Return the explanations of all ranks, the best of them, and the number of tokens.

    questions: those of all ranks. The other arguments are of the questions of this rank.
    """
    if world.size == 1:
        return found, best, n_tokens
    parts = world.exchange((found, best, n_tokens))
    total = Explanations(n_questions=len(questions))
    accepted: ByProblem = {}
    kept: ByProblem = {}
    for part, best_of_part, _ in parts:
        total.n_sampled += part.n_sampled
        total.n_right += part.n_right
        total.n_leaked += part.n_leaked
        total.n_unfit += part.n_unfit
        total.ranking.values.update(part.ranking.values)
        accepted |= part.accepted
        kept |= best_of_part
    ids = [question.id for question in questions if question.id in accepted]
    total.accepted = {problem_id: accepted[problem_id] for problem_id in ids}
    kept = {problem_id: kept[problem_id] for problem_id in ids}
    return total, kept, sum(n for _, _, n in parts)


def select_explanations(
    found: Explanations,
    best: ByProblem,
    questions: Sequence[Problem],
    cache: ExplanationCache,
    config: Train,
    step: int,
) -> Explanations:
    """Return the explanations of all questions: those just sampled, and those in the cache.

    With `shuffle_explanations`, each question gets the explanations of another question.
    """
    cache.update(best, step, config.explain_every)
    accepted: ByProblem = {}
    for question in questions:
        if question.id in cache.fresh:
            _, accepted[question.id] = cache.fresh[question.id]
    if config.shuffle_explanations:
        cache.earlier |= accepted
        seed = request_seed(config.seed, "shuffle", step)
        accepted = shuffled(accepted, cache.earlier, seed)
    found.accepted = accepted
    found.n_questions = len(questions)
    return found


def shuffled(accepted: ByProblem, earlier: Mapping[str, list[TokenIds]], seed: int) -> ByProblem:
    """Return, for each question, the explanations of another question.

    This is the control for text that only looks right. The questions of the step exchange their
    explanations. A step with a single explained question uses those of a question of an earlier
    step, if there is one.
    """
    rng = random.Random(seed)
    problem_ids = sorted(accepted)
    if len(problem_ids) > 1:
        order = rng.sample(problem_ids, len(problem_ids))
        others = order[1:] + order[:1]
        return {mine: accepted[other] for mine, other in zip(order, others, strict=True)}
    others = [problem_id for problem_id in sorted(earlier) if problem_id not in accepted]
    return {mine: earlier[rng.choice(others)] for mine in problem_ids if others}


def answer_after(
    problem: Problem, completion_ids: Sequence[int], prompter: Prompter, *, mask: bool
) -> Sample:
    """Return a sample whose log-probs are those of the right answer, boxed after a completion.

    The prompt is the plain question and the completion up to its last box.
    mask: replace each statement of the answer in the completion.
    """
    codec = prompter.codec
    special = set(prompter.tokenizer.all_special_ids)  # transformers rebuilds it at each access
    ids = [token for token in prompter.written(completion_ids) if token not in special]
    span = last_boxed_span(codec.decode(ids))
    while span is not None and ids and len(codec.decode(ids)) > span[0]:
        ids.pop()
    text = codec.decode(ids)
    masked_text = masked(text, problem.answer)
    if mask and masked_text != text:
        ids = codec.encode(masked_text)
    box = codec.encode(" \\boxed{")
    # The closing brace is left out: "}." may be one token.
    answer = codec.encode(problem.answer)
    return Sample((*prompter.solve(problem), *ids, *box), tuple(answer))
