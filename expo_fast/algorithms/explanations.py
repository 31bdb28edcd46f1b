"""Self-explanations (ExPO, arXiv:2507.02834): sampled with the answer shown, trained without it.

c~ ~ pi(. | q, a*) becomes a positive sample of the plain question q: its token ids are re-attached
behind q's own prompt, and never re-tokenised. It is accepted only if it ends by itself with the
right answer and `fitness` finds nothing wrong with its text. What a question brings beyond the
wanted number is cut by likelihood under the plain question: the copied and the wrongly reasoned are
what the policy would hardly write itself.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expo_fast.algorithms.explanation_filter import before_claim, is_unfit, leaks, masked, stated
from expo_fast.data.answer_grading import last_boxed_span
from expo_fast.data.problems import Problem
from expo_fast.data.prompts import Prompter, boxed
from expo_fast.generate import Generator, Request
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.packing import Sample, forward
from expo_fast.ops import linear_logprob

Score = Callable[[list[str], list[str]], list[float | None]]  # (answers, texts) -> 1 | 0 | None

# (problem, completion ids) of each candidate -> how good it is
Ranking = Callable[[list[tuple[Problem, tuple[int, ...]]]], list[float]]
ScoreTokens = Callable[[Sequence[Sample]], list[Tensor]]  # log-probs of completions' tokens, nats


@dataclass
class Explanations:
    """What one round of explaining a batch of questions brought."""

    accepted: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)  # by problem id
    n_questions: int = 0
    n_sampled: int = 0
    n_tokens: int = 0  # of prompts and completions sampled
    n_right: int = 0  # ended by themselves with the right box
    n_leaked: int = 0  # of the right ones, those that speak of a given answer
    n_unfit: int = 0  # of the right ones, those that `is_unfit` rejects, the leaking among them

    @property
    def rate(self) -> float | None:
        """Share of questions with an accepted explanation (`exp/rate`)."""
        return len(self.accepted) / self.n_questions if self.n_questions else None

    @property
    def leak_rate(self) -> float | None:
        """Share of the right explanations that speak of a given answer."""
        return self.n_leaked / self.n_right if self.n_right else None

    @property
    def unfit_rate(self) -> float | None:
        """Share of the right explanations that were rejected for their content."""
        return self.n_unfit / self.n_right if self.n_right else None


def explain(
    problems: Sequence[Problem],
    prompter: Prompter,
    generator: Generator,
    score: Score,
    request: Callable[[Problem, int, tuple[int, ...]], Request],
    per_question: int,
    append: bool = False,
) -> Explanations:
    """Sample per_question explanations of each problem and keep what may be trained on.

    append: one that states the answer and ends without a box gets it, in the place of "the answer
    is 7" if it says so: the a* of the paper's log pi(c~, a* | q). It must be fit otherwise.

    score: (answers, completions) -> 1.0 | 0.0 | None, the verifier of the reward.
    request: (problem, sample, prompt ids) -> what to sample, with its seed.
    """
    asked = [(p, k) for p in problems for k in range(per_question)]
    prompts = {p.id: prompter.explain(p) for p in problems}
    completions = generator.sample([request(p, k, prompts[p.id]) for p, k in asked])
    texts = [prompter.text(c.token_ids) for c in completions]
    verdicts = score([p.answer for p, _ in asked], texts)
    n_tokens = sum(len(prompts[p.id]) for p, _ in asked)
    n_tokens += sum(len(c.token_ids) for c in completions)
    found = Explanations(n_questions=len(problems), n_sampled=len(asked), n_tokens=n_tokens)
    for (p, _), completion, text, verdict in zip(asked, completions, texts, verdicts, strict=True):
        if completion.finish_reason != "stop":
            continue
        ids = prompter.ended(completion.token_ids, completion.finish_reason)
        if append and stated(text, p.answer) and last_boxed_span(text) is None:
            kept = before_claim(text, p.answer)
            ids = prompter.longer(prompter.cut(ids, len(kept)), boxed(p.answer))
            text = prompter.text(ids)
        elif verdict != 1.0:
            continue
        found.n_right += 1
        found.n_leaked += leaks(text)
        if is_unfit(text, p):
            found.n_unfit += 1
        else:
            found.accepted.setdefault(p.id, []).append(ids)
    return found


def keep_best(
    accepted: dict[str, list[tuple[int, ...]]],
    problems: Mapping[str, Problem],
    keep: int,
    rank: Ranking,
) -> dict[str, list[tuple[int, ...]]]:
    """Of each problem's explanations the `keep` that rank highest, best first; all for 0."""
    named = [(key, ids) for key, each in accepted.items() for ids in each]
    ranks = rank([(problems[key], ids) for key, ids in named])
    order = sorted(range(len(named)), key=lambda i: -ranks[i])
    kept: dict[str, list[tuple[int, ...]]] = {key: [] for key in accepted}
    for key, ids in (named[i] for i in order):
        if not keep or len(kept[key]) < keep:
            kept[key].append(ids)
    return kept


def ranking(name: str, prompter: Prompter, score: ScoreTokens) -> Ranking:
    """likelihood: mean log-prob under the plain question. lift: log-prob of the answer behind the
    explanation with its statements of it masked. first: as sampled.

    Of the accepted explanations of the default job's first steps a third had sound equations; these
    ranked above the others by likelihood in 94% of the pairs (benchmarks/RESULTS.md).
    """

    def by_likelihood(candidates: list[tuple[Problem, tuple[int, ...]]]) -> list[float]:
        samples = [Sample(prompter.solve(p), ids) for p, ids in candidates]
        return [float(logp.mean()) for logp in score(samples)]

    def by_lift(candidates: list[tuple[Problem, tuple[int, ...]]]) -> list[float]:
        samples = [answer_behind(p, ids, prompter, mask=True) for p, ids in candidates]
        return [float(logp.sum()) for logp in score(samples)]

    def as_sampled(candidates: list[tuple[Problem, tuple[int, ...]]]) -> list[float]:
        return [-float(i) for i in range(len(candidates))]

    return {"likelihood": by_likelihood, "lift": by_lift, "first": as_sampled}[name]


def answer_behind(
    problem: Problem, completion_ids: Sequence[int], prompter: Prompter, *, mask: bool
) -> Sample:
    """The right answer in the box behind a chain of thought, under the plain question.

    What the chain itself boxes is cut off; one that boxes nothing gets its box at the end.
    """
    tokenizer = prompter.tokenizer
    ids = [t for t in completion_ids if t not in tokenizer.all_special_ids]
    span = last_boxed_span(tokenizer.decode(ids))
    while span is not None and ids and len(tokenizer.decode(ids)) > span[0]:
        ids.pop()
    text = tokenizer.decode(ids)
    if mask and masked(text, problem.answer) != text:
        hidden = masked(text, problem.answer)
        ids = tokenizer(hidden, add_special_tokens=False).input_ids
    box = tokenizer(" \\boxed{", add_special_tokens=False).input_ids
    answer = tokenizer(problem.answer, add_special_tokens=False).input_ids  # "}." may be one token
    return Sample((*prompter.solve(problem), *ids, *box), tuple(answer))


def shuffled(
    accepted: dict[str, list[tuple[int, ...]]],
    earlier: Mapping[str, list[tuple[int, ...]]],  # accepted before, by problem id
    seed: int,
) -> dict[str, list[tuple[int, ...]]]:
    """Each question gets another's explanations: the control for text that only looks right.

    Those of this step change places; a single one gets earlier ones, if there are any.
    """
    draw, keys = random.Random(seed), sorted(accepted)
    if len(keys) > 1:
        keys = draw.sample(keys, len(keys))
        return {key: accepted[other] for key, other in zip(keys, keys[1:] + keys[:1], strict=True)}
    others = [key for key in sorted(earlier) if key not in accepted]
    return {key: earlier[draw.choice(others)] for key in keys if others}


def sft_samples(
    chosen: Sequence[tuple[Problem, Sequence[tuple[int, ...]]]],
    prompter: Prompter,
    *,
    coef: float,
    n_questions: int,  # P: all questions of the batch, explained or not
    reduction: str,  # "token_mean" | "seq_sum"
) -> list[Sample]:
    """The ExP-SFT term: -coef/P sum_q 1/K_q sum_k log pi(c_k, a* | q), a mean over |c_k| tokens.

    The condition is the plain question; seq_sum leaves out the mean, as the paper prints it.
    """
    samples = []
    for problem, completions in chosen:
        for ids in completions:
            tokens = len(ids) if reduction == "token_mean" else 1
            weight = coef / (n_questions * len(completions) * tokens)
            samples.append(Sample(prompter.solve(problem), tuple(ids), 1.0, weight, on_policy=True))
    return samples


@torch.no_grad()
def score_tokens(
    model: Decoder, samples: Sequence[Sample], temperature: float, max_tokens: int
) -> list[Tensor]:
    """For each sample (len(completion_ids),) fp32 nats: log pi of its completion's tokens."""
    out: list[Tensor] = [torch.empty(0)] * len(samples)
    for p, hidden in forward(model, samples, max_tokens):
        logp = linear_logprob(hidden, model.head_weight, p.targets, temperature=temperature).logp
        for i, values in p.split(logp.cpu()):  # one copy a pack, not one a sample
            out[i] = values
    return out
