"""pass@1 and pass@K on held-out problems: python -m expo_fast.evaluate --model M --data SRC.

pass@k is estimated without bias from K samples of which c are right, 1 - C(K-c, k) / C(K, k)
(arXiv:2107.03374, eq. 1); its interval is a bootstrap over the problems. The last line of stdout is
one JSON object.
"""

import json
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import torch

from expo_fast.command import run
from expo_fast.config import Evaluate, parse
from expo_fast.explain import Score
from expo_fast.generate import Completion, Generator, Request
from expo_fast.prompts import Prompter, check_length, request_seed
from expo_fast.reward import last_boxed, score_answers
from expo_fast.tasks import Problem, load_problems, overlap, worked_examples
from expo_fast.weights import load_model

RESAMPLES = 1000  # of the bootstrap


@dataclass(frozen=True)
class Evaluation:
    """What K samples of each problem showed."""

    right: list[int]  # one a problem: how many of its K samples were right
    levels: list[int | None]  # one a problem
    samples: int  # K
    n_undecided: int  # samples that the verifier gave up on; they count as wrong
    mean_length: float  # tokens
    clipped_ratio: float  # share of completions cut at the length limit
    boxed_ratio: float  # share of completions with an answer in a box
    n_tokens: int  # sampled
    seconds: float

    def pass_at(self, k: int, level: int | None = None) -> float:
        return _mean(self._per_problem(k, level))

    def interval(self, k: int, level: int | None = None) -> tuple[float, float]:
        """95% bootstrap interval over the problems."""
        values, rng = self._per_problem(k, level), random.Random(0)
        means = sorted(_mean(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
        return means[RESAMPLES // 40], means[-RESAMPLES // 40 - 1]

    def _per_problem(self, k: int, level: int | None) -> list[float]:
        n = self.samples
        chosen = zip(self.right, self.levels, strict=True)
        return [1 - comb(n - c, k) / comb(n, k) for c, at in chosen if level in (None, at)]

    def summary(self) -> dict[str, Any]:
        """JSON-ready; K is spelt out in the keys."""
        row: dict[str, Any] = {"problems": len(self.right), "samples": self.samples}
        for k in dict.fromkeys((1, self.samples)):
            row[f"pass@{k}"] = self.pass_at(k)
            row[f"pass@{k}/interval"] = list(self.interval(k))
        row["all_fail"] = self.right.count(0) / len(self.right)
        levels = sorted({at for at in self.levels if at is not None})
        row["levels"] = [self._level_row(at) for at in levels]
        row |= {"undecided": self.n_undecided, "boxed_ratio": self.boxed_ratio}
        row |= {"mean_length": self.mean_length, "clipped_ratio": self.clipped_ratio}
        return row | {"tokens": self.n_tokens, "seconds": round(self.seconds, 3)}

    def _level_row(self, level: int) -> dict[str, Any]:
        ks = dict.fromkeys((1, self.samples))
        n = self.levels.count(level)
        return {"level": level, "problems": n} | {f"pass@{k}": self.pass_at(k, level) for k in ks}


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
) -> Evaluation:
    """Sample every problem K times under its plain question, and check the boxed answers."""
    start = time.monotonic()
    asked = [(p, k) for p in problems for k in range(samples)]
    prompts = {p.id: prompter.solve(p) for p in problems}
    requests = [
        Request(
            prompts[p.id],
            max_new_tokens,
            temperature=temperature,
            seed=request_seed(seed, "evaluate", p.id, k),
            stop_strings=prompter.stop_strings,
        )
        for p, k in asked
    ]
    completions = generator.sample(requests)
    texts = [prompter.text(c.token_ids) for c in completions]
    verdicts = score([p.answer for p, _ in asked], texts)
    right = [verdicts[i : i + samples].count(1.0) for i in range(0, len(asked), samples)]
    lengths = [len(c.token_ids) for c in completions]
    return Evaluation(
        right=right,
        levels=[p.level for p in problems],
        samples=samples,
        n_undecided=verdicts.count(None),
        mean_length=_mean(lengths),
        clipped_ratio=_mean([_is_cut(c) for c in completions]),
        boxed_ratio=_mean([last_boxed(t) is not None for t in texts]),
        n_tokens=sum(lengths),
        seconds=time.monotonic() - start,
    )


def _is_cut(completion: Completion) -> bool:
    return completion.finish_reason == "length"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main(argv: Sequence[str]) -> None:
    config = parse(Evaluate, argv)
    c = config
    problems = load_problems(c.data, levels=c.levels, limit=c.limit)
    source = c.shots_data or re.sub(r"^(builtin:[^:]+):eval$", r"\1:train", c.data)
    shots, _ = worked_examples(load_problems(source, levels=c.levels), c.shots)
    shown = overlap(shots, problems)
    problems = [p for p in problems if p not in shown]
    model, tokenizer = load_model(c.model, dtype=getattr(torch, c.dtype), device=c.device)
    prompter = Prompter(tokenizer, shots, c.system_prompt)
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
    )
    row = {"model": c.model, "data": c.data, "template": prompter.template_hash}
    print(json.dumps(row | result.summary()), flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
