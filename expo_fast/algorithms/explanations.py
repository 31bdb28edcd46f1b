"""Self-explanations (ExPO, arXiv:2507.02834): sampled with the answer shown, trained on without it.

An explanation c ~ pi(. | q, a*) becomes a positive sample of the plain question q: its token ids
are placed after q's own prompt and are never tokenised again. It is accepted only if it stops
before the length limit, ends with the right answer, and passes `explanation_filter`. Of a
question's accepted explanations, the best are kept. By default these are the likeliest under the
plain question, because the policy is unlikely to write a copied or wrong derivation by itself.

The algorithms make four calls, between which they compute log-probs themselves:

    accepted = sample_explanations(questions, generator, ...)
    samples = ranking_samples(accepted.texts, ...)            for completion_logprobs
    best = keep_best(accepted, logprobs, ...)
    positives = select_explanations(world, best, ...)
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from expo_fast.algorithms.explanation_filter import before_claim, is_unfit, leaks, masked, stated
from expo_fast.algorithms.logprobs import KnownLogprobs
from expo_fast.algorithms.metrics import Metrics
from expo_fast.algorithms.rollout import Verifier, make_request
from expo_fast.config import Train
from expo_fast.data.answer_grading import last_boxed_span
from expo_fast.data.chat_template import TokenIds
from expo_fast.data.problems import Problem
from expo_fast.data.prompts import Prompter, boxed, request_seed
from expo_fast.distributed.world import World
from expo_fast.generate import Completion, Generator, Request
from expo_fast.modeling.packing import Sample
from expo_fast.runtime import interruptions

ByProblem = dict[str, list[TokenIds]]  # token ids of texts by problem id


@dataclass(frozen=True)
class ExplanationCounts:
    """Counts of the explanations of a batch of questions. All are 0 if none are sampled."""

    n_sampled: int = 0
    n_tokens: int = 0
    """Tokens of their prompts and completions."""
    n_right: int = 0
    """Explanations that stop before the length limit and box the right answer."""
    n_leaked: int = 0
    """Right explanations that mention a given answer."""
    n_unfit: int = 0
    """Right explanations that `is_unfit` rejects. They include those that mention the answer."""
    n_questions: int = 0
    n_explained: int = 0
    """Questions with an explanation that is trained on."""
    n_kept: int = 0
    """Explanations that are trained on."""
    n_kept_tokens: int = 0

    def with_kept(self, kept: ByProblem, n_questions: int) -> "ExplanationCounts":
        """Return the counts with those of the explanations that are trained on."""
        lengths = [len(ids) for explanations in kept.values() for ids in explanations]
        return replace(
            self,
            n_questions=n_questions,
            n_explained=len(kept),
            n_kept=len(lengths),
            n_kept_tokens=sum(lengths),
        )

    def metrics(self) -> Metrics:
        return {
            "exp/rate": _ratio(self.n_explained, self.n_questions),
            "exp/accepted": self.n_kept,
            "exp/right_ratio": _ratio(self.n_right, self.n_sampled),
            "exp/leak_rate": _ratio(self.n_leaked, self.n_right),
            "exp/unfit_rate": _ratio(self.n_unfit, self.n_right),
            "exp/mean_length": _ratio(self.n_kept_tokens, self.n_kept),
        }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


@dataclass(frozen=True)
class Positives:
    """The positive samples of a batch of questions: explanations, solutions or other texts."""

    texts: ByProblem = field(default_factory=dict)
    """The texts to train on under the plain questions, the best of a question first."""
    counts: ExplanationCounts = field(default_factory=ExplanationCounts)
    """Counts of the explanations that the texts were chosen from."""
    known: KnownLogprobs = field(default_factory=KnownLogprobs)
    """The log-probs that ranked the texts, in a step whose diagnostics use them again."""


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


def sample_explanations(
    questions: Sequence[Problem],
    generator: Generator,
    prompter: Prompter,
    verify: Verifier,
    config: Train,
    step: int,
) -> Positives:
    """Sample explanations of the questions' answers, and return those that are accepted."""
    requests = explanation_requests(questions, prompter, config, step)
    completions = generator.sample(requests)
    with interruptions.immediate():
        found = accept_explanations(
            questions, completions, prompter, verify, append_answer=config.append_answer
        )
    n_tokens = sum(len(request.prompt_ids) for request in requests)
    n_tokens += sum(len(completion.token_ids) for completion in completions)
    return replace(found, counts=replace(found.counts, n_tokens=n_tokens))


def accept_explanations(
    questions: Sequence[Problem],
    completions: Sequence[Completion],
    prompter: Prompter,
    verify: Verifier,
    *,
    append_answer: bool,
) -> Positives:
    """Return the explanations that are fit to train on, with counts of those sampled.

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
    right = [each for each, verdict in zip(candidates, verdicts, strict=True) if verdict == 1.0]
    accepted: ByProblem = {}
    n_unfit = 0
    for each in right:
        if is_unfit(each.text, each.question):
            n_unfit += 1
        else:
            accepted.setdefault(each.question.id, []).append(each.ids)
    counts = ExplanationCounts(
        n_sampled=len(explained),
        n_right=len(right),
        n_leaked=sum(leaks(each.text) for each in right),
        n_unfit=n_unfit,
    )
    return Positives(accepted, counts.with_kept(accepted, len(questions)))


def with_appended_answer(
    ids: TokenIds, text: str, question: Problem, prompter: Prompter
) -> TokenIds:
    """Return the token ids of an explanation with its boxed answer at the end."""
    kept = before_claim(text, question.answer)
    return prompter.longer(prompter.cut(ids, kept), boxed(question.answer))


def ranking_samples(
    accepted: ByProblem, questions: Sequence[Problem], prompter: Prompter, choose: str
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
    for problem_id, explanations in accepted.items():
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


def keep_best(accepted: Positives, logprobs: Sequence[Tensor], config: Train) -> Positives:
    """Return the `keep_explanations` best of each question, best first. 0 keeps all.

    logprobs: of the tokens of `ranking_samples`, in nats. `choose_explanations` says how they rank;
    `first` keeps the order of sampling.

    In the first steps of the default job, a third of the accepted explanations had correct
    equations. By likelihood, one of these ranked above one of the others in 94% of comparisons
    (benchmarks/RESULTS.md).
    """
    choose = config.choose_explanations
    keep = config.keep_explanations
    ranks = ranks_of(logprobs, choose)
    kept: ByProblem = {}
    start = 0
    for problem_id, explanations in accepted.texts.items():
        order = list(range(len(explanations)))
        if choose != "first":
            own = ranks[start : start + len(explanations)]
            order.sort(key=lambda i: -own[i])
        start += len(explanations)
        best = [explanations[i] for i in order]
        kept[problem_id] = best[:keep] if keep else best
    return replace(accepted, texts=kept)


def of_all_ranks(world: World, questions: Sequence[Problem], own: Positives) -> Positives:
    """Return the explanations of all ranks.

    questions: those of all ranks.
    own: explanations of the questions of this rank.
    """
    if world.size == 1:
        return own
    parts = world.exchange(own)
    texts: ByProblem = {}
    known = KnownLogprobs()
    for part in parts:
        texts |= part.texts
        known.values.update(part.known.values)
    texts = {question.id: texts[question.id] for question in questions if question.id in texts}
    counts = ExplanationCounts(
        n_sampled=sum(part.counts.n_sampled for part in parts),
        n_right=sum(part.counts.n_right for part in parts),
        n_leaked=sum(part.counts.n_leaked for part in parts),
        n_unfit=sum(part.counts.n_unfit for part in parts),
        n_tokens=sum(part.counts.n_tokens for part in parts),
    )
    return Positives(texts, counts, known)


def select_explanations(
    world: World,
    best: Positives,
    questions: Sequence[Problem],
    cache: ExplanationCache,
    config: Train,
    step: int,
) -> Positives:
    """Update the cache, and return the explanations of all questions.

    They are those just sampled and those in the cache. With `shuffle_explanations`, each question
    gets the explanations of another question.

    best: the best of those that this rank sampled. The other arguments are of all ranks.
    """
    sampled = of_all_ranks(world, questions, best)
    cache.update(sampled.texts, step, config.explain_every)
    texts: ByProblem = {}
    for question in questions:
        if question.id in cache.fresh:
            _, texts[question.id] = cache.fresh[question.id]
    if config.shuffle_explanations:
        cache.earlier |= texts
        seed = request_seed(config.seed, "shuffle", step)
        texts = shuffled(texts, cache.earlier, seed)
    return replace(sampled, texts=texts, counts=sampled.counts.with_kept(texts, len(questions)))


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
