"""Accuracy on held-out problems: python -m expo_fast.evaluate --model M --data SRC.

pass@k is estimated without bias from K samples of which c are right, 1 - C(K-c, k) / C(K, k)
(arXiv:2107.03374, eq. 1); majority is the share of problems whose most common answer is right
(arXiv:2203.11171). Their intervals are a bootstrap over the problems. The last line of stdout is
one JSON object.
"""

import json
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb
from statistics import fmean
from typing import Any

import torch

from expo_fast.algorithms.explanation_filter import leaks
from expo_fast.algorithms.explanations import Score
from expo_fast.cli.exit_status import run
from expo_fast.cli.flags import parse
from expo_fast.config import Evaluate
from expo_fast.data.answer_grading import decide, last_boxed, tidy
from expo_fast.data.problems import Problem, load_problems, overlap, worked_examples
from expo_fast.data.prompts import Prompter, check_length, request_seed
from expo_fast.generate import Generator, Request
from expo_fast.reward import grader_hash, score_answers
from expo_fast.storage.files import output_file, replace_file
from expo_fast.weights import load_model

RESAMPLES = 1000  # of the bootstrap


@dataclass(frozen=True)
class Graded:
    """One completion and what the verifier says of it: a row of --output."""

    id: str  # of the problem
    sample: int  # of the problem's K
    level: int | None  # of the problem
    completion: str
    verdict: float | None  # 1.0 right, 0.0 wrong, None undecided, which counts as wrong
    finish_reason: str
    tokens: int  # sampled


@dataclass(frozen=True)
class Evaluation:
    """What K samples of each problem showed."""

    graded: Sequence[Graded]  # the K of a problem behind one another
    samples: int  # K
    k: tuple[int, ...]  # of pass@k, beside 1 and K
    template: str  # Prompter.template_hash
    grader: str | None  # grader_hash; None: another score than score_answers
    seconds: float

    def summary(self) -> dict[str, Any]:
        """JSON-ready; k is spelt out in the keys."""
        g, n = self.graded, self.samples
        groups = [g[i : i + n] for i in range(0, len(g), n)]
        levels = sorted({x.level for x in g if x.level is not None})
        row: dict[str, Any] = {"problems": len(groups), "samples": n} | self._accuracy(groups)
        row["levels"] = [self._level_row(at, groups) for at in levels]
        row["undecided"] = [x.verdict for x in g].count(None)
        row["boxed_ratio"] = fmean([last_boxed(x.completion) is not None for x in g])
        row["leak_rate"] = fmean([leaks(x.completion) for x in g])
        row["mean_length"] = fmean([x.tokens for x in g])
        row["clipped_ratio"] = fmean([x.finish_reason == "length" for x in g])
        row |= {"template": self.template, "grader": self.grader}
        return row | {"tokens": sum(x.tokens for x in g), "seconds": round(self.seconds, 3)}

    def _level_row(self, level: int, groups: Sequence[Sequence[Graded]]) -> dict[str, Any]:
        mine = [group for group in groups if group[0].level == level]
        return {"level": level, "problems": len(mine)} | self._accuracy(mine)

    def _accuracy(self, groups: Sequence[Sequence[Graded]]) -> dict[str, Any]:
        right = [[x.verdict for x in group].count(1.0) for group in groups]
        row: dict[str, Any] = {}
        for k in sorted({1, *self.k, self.samples}):
            row |= _measured(f"pass@{k}", [pass_at(k, self.samples, c) for c in right])
        row["all_fail"] = right.count(0) / len(right)
        return row | _measured("majority", [float(vote_is_right(group)) for group in groups])


def pass_at(k: int, n: int, c: int) -> float:
    """Chance that k of n samples, of which c are right, hold a right one."""
    return 1 - comb(n - c, k) / comb(n, k)


def vote_is_right(group: Sequence[Graded]) -> bool:
    """Is the answer that most samples box right? Of two as common, the one boxed first.

    Two spellings that the verifier takes for one without math-verify are one answer, and right
    where a sample that votes for it is. A sample without an answer in a box does not vote.
    """
    answers: list[tuple[str, list[Graded]]] = []  # (first spelling, who voted), as first boxed
    for x in group:
        box = tidy(last_boxed(x.completion) or "")
        same = (voters for first, voters in answers if decide(first, box))
        if (voters := next(same, None)) is not None:
            voters.append(x)
        elif box:
            answers.append((box, [x]))
    voters = max((voters for _, voters in answers), key=len, default=[])
    return any(x.verdict == 1.0 for x in voters)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval of the mean, over the problems that have these values."""
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return means[RESAMPLES // 40], means[-RESAMPLES // 40 - 1]


def _measured(name: str, values: Sequence[float]) -> dict[str, Any]:
    return {name: fmean(values), f"{name}/interval": list(interval(values))}


def evaluate(
    generator: Generator,
    prompter: Prompter,
    problems: Sequence[Problem],
    score: Score,
    *,
    samples: int,  # K
    temperature: float,
    max_new_tokens: int,
    seed: int,
    k: tuple[int, ...] = (),  # of pass@k, beside 1 and K
) -> Evaluation:
    """Sample every problem K times under its plain question, and check the boxed answers."""
    assert all(1 <= each <= samples for each in k), k
    start = time.monotonic()
    asked = [(p, i) for p in problems for i in range(samples)]
    prompts = {p.id: prompter.solve(p) for p in problems}
    requests = [
        Request(
            prompts[p.id],
            max_new_tokens,
            temperature=temperature,
            seed=request_seed(seed, "evaluate", p.id, i),
            stop_strings=prompter.stop_strings,
        )
        for p, i in asked
    ]
    completions = generator.sample(requests)
    texts = [prompter.text(c.token_ids) for c in completions]
    verdicts = score([p.answer for p, _ in asked], texts)
    graded = [
        Graded(p.id, i, p.level, text, verdict, c.finish_reason, len(c.token_ids))
        for (p, i), text, verdict, c in zip(asked, texts, verdicts, completions, strict=True)
    ]
    grader = grader_hash() if score is score_answers else None
    seconds = time.monotonic() - start
    return Evaluation(graded, samples, k, prompter.template_hash, grader, seconds)


def check_answers(source: str, problems: Sequence[Problem]) -> None:
    """ValueError where an attempt at a problem can't be judged."""
    for p in problems:
        if not p.answer:
            raise ValueError(f"{source}: problem {p.id} has no 'answer' to judge attempts by")


def main(argv: Sequence[str]) -> None:
    config = parse(Evaluate, argv)
    c = config
    output = None if c.output is None else output_file(c.output)
    problems = load_problems(c.data, levels=c.levels, limit=c.limit)
    check_answers(c.data, problems)
    source = c.shots_data or re.sub(r"^(builtin:[^:]+):eval$", r"\1:train", c.data)
    shots, _ = worked_examples(load_problems(source, levels=c.levels), c.shots)
    shown = overlap(shots, problems)
    problems = [p for p in problems if p not in shown]
    model, tokenizer = load_model(c.model, dtype=getattr(torch, c.dtype), device=c.device)
    prompter = Prompter(tokenizer, shots, c.system_prompt, c.instruction)
    if not problems:
        raise ValueError(f"{c.data} has no problem beside the {c.shots} worked examples")
    for problem in problems:
        new, context = c.max_completion_length, model.shape.context
        check_length(problem, prompter.solve(problem), new=new, context=context)
    result = evaluate(
        Generator(model, tokenizer=tokenizer),
        prompter,
        problems,
        score_answers,
        samples=c.samples,
        temperature=c.temperature,
        max_new_tokens=c.max_completion_length,
        seed=c.seed,
        k=c.k,
    )
    if output is not None:
        rows = (json.dumps(asdict(x)) + "\n" for x in result.graded)
        replace_file(output, "".join(rows).encode())
    print(json.dumps({"model": c.model, "data": c.data} | result.summary()), flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
