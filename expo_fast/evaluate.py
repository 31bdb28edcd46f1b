"""Accuracy on held-out problems: python -m expo_fast.evaluate --model M --data SRC.

The last line of stdout is a JSON object with `Evaluation.summary` and the names of model and data.
"""

if __name__ == "__main__":  # before the imports below, because one of their packages may be missing
    from expo_fast.cli.exit_status import run_command

    raise SystemExit(run_command("evaluate"))

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch

from expo_fast.algorithms.explanation_filter import leaks
from expo_fast.algorithms.rollout import Verifier
from expo_fast.algorithms.training_data import check_answers, check_ids
from expo_fast.cli.flags import parse
from expo_fast.config import Evaluate
from expo_fast.data.answer_grading import last_boxed
from expo_fast.data.problems import Problem, load_problems, split_examples
from expo_fast.data.prompts import Prompter, check_length, request_seed
from expo_fast.generate import Generator, Request
from expo_fast.modeling.decoder import Decoder
from expo_fast.reporting.accuracy import Graded, accuracy, by_level, by_problem
from expo_fast.reward import grader_hash, score_answers
from expo_fast.storage.files import output_file, replace_file
from expo_fast.weights import load_model


@dataclass(frozen=True)
class Evaluation:
    """The graded samples of an evaluation, and the settings that produced them."""

    graded: Sequence[Graded]  # K consecutive samples for each problem
    samples: int  # K
    k: tuple[int, ...]  # values of k for pass@k, in addition to 1 and K
    template: str  # Prompter.template_hash
    grader: str | None  # grader_hash; None if the verifier is not score_answers
    seconds: float

    def summary(self) -> dict[str, Any]:
        """Return accuracies, in total and by level, and statistics of the samples, as JSON values.

        Keys contain the value of k: `pass@1`, `pass@1/interval`.
        """
        graded = self.graded
        problems = by_problem(graded, self.samples)
        ks = sorted({1, *self.k, self.samples})
        levels = []
        for level, some in by_level(problems).items():
            head = {"level": level, "problems": len(some)}
            levels.append(head | accuracy(some, ks))
        return {
            "problems": len(problems),
            "samples": self.samples,
            **accuracy(problems, ks),
            "levels": levels,
            "undecided": [x.verdict for x in graded].count(None),
            "boxed_ratio": fmean([last_boxed(x.completion) is not None for x in graded]),
            "leak_rate": fmean([leaks(x.completion) for x in graded]),
            "mean_length": fmean([x.tokens for x in graded]),
            "clipped_ratio": fmean([x.finish_reason == "length" for x in graded]),
            "template": self.template,
            "grader": self.grader,
            "tokens": sum(x.tokens for x in graded),
            "seconds": round(self.seconds, 3),
        }


def evaluate(
    generator: Generator,
    prompter: Prompter,
    problems: Sequence[Problem],
    verify: Verifier,
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    k: tuple[int, ...] = (),
) -> Evaluation:
    """Sample K completions of every problem's plain question, and verify their answers.

    verify: returns a verdict for each pair of reference answer and completion.
    samples: K.
    k: values of k for pass@k, in addition to 1 and K. Each is from 1 to K.
    """
    assert all(1 <= each <= samples for each in k), k
    start = time.monotonic()
    asked = [(problem, i) for problem in problems for i in range(samples)]
    prompts = {problem.id: prompter.solve(problem) for problem in problems}
    requests = [
        Request(
            prompts[problem.id],
            max_new_tokens,
            temperature=temperature,
            seed=request_seed(seed, "evaluate", problem.id, i),
            stop_strings=prompter.stop_strings,
        )
        for problem, i in asked
    ]
    completions = generator.sample(requests)
    texts = [prompter.text(completion.token_ids) for completion in completions]
    answers = [problem.answer for problem, _ in asked]
    complete = [p.prefill + text for (p, _), text in zip(asked, texts, strict=True)]
    verdicts = verify(answers, complete)
    results = zip(asked, completions, texts, verdicts, strict=True)
    graded = [
        Graded(
            id=problem.id,
            sample=i,
            level=problem.level,
            completion=text,
            verdict=verdict,
            finish_reason=completion.finish_reason,
            tokens=len(completion.token_ids),
        )
        for (problem, i), completion, text, verdict in results
    ]
    return Evaluation(
        graded,
        samples,
        k,
        template=prompter.template_hash,
        grader=grader_hash() if verify is score_answers else None,
        seconds=time.monotonic() - start,
    )


def main(argv: Sequence[str]) -> None:
    """Run the command line. Raise ValueError or OSError for an error that a user can correct."""
    config = parse(Evaluate, argv)
    output = None if config.output is None else output_file(config.output)
    problems, shots = load_data(config)
    dtype = getattr(torch, config.dtype)
    model, tokenizer = load_model(config.model, dtype=dtype, device=config.device)
    prompter = Prompter(
        tokenizer,
        shots,
        config.system_prompt,
        config.instruction,
        ends=model.eos_ids,
    )
    check_prompts(config, model, prompter, problems)
    result = evaluate(
        Generator(model, tokenizer=tokenizer),
        prompter,
        problems,
        score_answers,
        samples=config.samples,
        temperature=config.temperature,
        max_new_tokens=config.max_completion_length,
        seed=config.seed,
        k=config.k,
    )
    if output is not None:
        lines = [json.dumps(asdict(row)) + "\n" for row in result.graded]
        replace_file(output, "".join(lines).encode())
    summary = {"model": config.model, "data": config.data} | result.summary()
    print(json.dumps(summary), flush=True)


def load_data(config: Evaluate) -> tuple[list[Problem], tuple[Problem, ...]]:
    """Return the problems and the few-shot examples. No example is among the problems.

    The examples of built-in data are from the train split.
    """
    levels = config.levels
    problems = load_problems(config.data, levels=levels, limit=config.limit)
    check_answers(config.data, problems)
    train_split = re.sub(r"^(builtin:[^:]+):eval$", r"\1:train", config.data)
    source = config.shots_data or train_split
    candidates = load_problems(source, levels=levels)
    shots, problems = split_examples(candidates, config.shots, problems)
    return problems, shots


def check_prompts(
    config: Evaluate, model: Decoder, prompter: Prompter, problems: Sequence[Problem]
) -> None:
    """Raise ValueError if there is no problem, or if a problem does not fit the model."""
    if not problems:
        raise ValueError(
            f"{config.data} has only the {config.shots} worked examples: need at least one more "
            "problem"
        )
    for problem in problems:
        prompt = prompter.solve(problem)
        check_ids(problem, prompt, prompter, model.shape.vocabulary)
        new_tokens = config.max_completion_length
        check_length(problem, prompt, new=new_tokens, context=model.shape.context)
