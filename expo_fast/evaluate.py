"""Accuracy on held-out problems: python -m expo_fast.evaluate --model M --data SRC.

The last line of stdout is a JSON object with `Evaluation.summary` and the names of model and data.
"""

if __name__ == "__main__":  # before the imports below, because one of their packages may be missing
    from expo_fast.cli.exit_status import run_command

    raise SystemExit(run_command("evaluate"))

import json
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch

from expo_fast import reward
from expo_fast.algorithms.alarms import NEARLY_ALL_CUT, cut_in_words
from expo_fast.algorithms.as_trained import (
    PROMPT_OPTIONS,
    TrainedModel,
    difference,
    find_trained,
    problems_of_run,
    with_record,
)
from expo_fast.algorithms.explanation_filter import leaks
from expo_fast.algorithms.rollout import Verifier
from expo_fast.algorithms.training_data import (
    check_answers,
    check_ids,
    in_words,
    warn_of_control_tokens,
)
from expo_fast.cli.flags import parse
from expo_fast.config import Evaluate
from expo_fast.data.answer_grading import last_boxed
from expo_fast.data.problems import Problem, load_problems, subset, without, worked_examples
from expo_fast.data.prompts import Prompter, check_length, request_seed
from expo_fast.generate import Generator, Request
from expo_fast.modeling.decoder import Decoder
from expo_fast.reporting.accuracy import Graded, accuracy, by_level, by_problem
from expo_fast.reporting.lm_eval import lm_eval_results
from expo_fast.reward import grader_hash, score_answers
from expo_fast.runtime import interruptions
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
        votes = sorted({*self.k} - {1})
        levels = []
        for level, some in by_level(problems).items():
            head = {"level": level, "problems": len(some)}
            levels.append(head | accuracy(some, ks, votes))
        return {
            "problems": len(problems),
            "samples": self.samples,
            **accuracy(problems, ks, votes),
            "levels": levels,
            "undecided": [x.verdict for x in graded].count(None),
            "verdicts": dict(Counter(x.reason for x in graded if x.reason is not None)),
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
    reasons: Sequence[str | None] = [None] * len(asked)
    with interruptions.immediate():
        if verify is reward.score_answers:
            judged = reward.grade_answers(answers, complete)
            verdicts = [each.verdict for each in judged]
            reasons = [each.reason for each in judged]
        else:
            verdicts = verify(answers, complete)
    results = zip(asked, completions, texts, verdicts, reasons, strict=True)
    graded = [
        Graded(
            id=problem.id,
            sample=i,
            level=problem.level,
            completion=text,
            verdict=verdict,
            finish_reason=completion.finish_reason,
            tokens=len(completion.token_ids),
            reason=reason,
        )
        for (problem, i), completion, text, verdict, reason in results
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
    lm_eval_output = None
    if config.lm_eval_output is not None:
        lm_eval_output = output_file(config.lm_eval_output, "--lm-eval-output")
    trained = find_trained(config.model)
    if trained is not None:
        config = with_record(config, trained)
        for line in notes(config, trained):
            print(line, file=sys.stderr)
    problems, shots = load_data(config, trained)
    dtype = getattr(torch, config.dtype)
    model, tokenizer = load_model(config.model, dtype=dtype, device=config.device)
    prompter = Prompter.of(config, tokenizer, shots, ends=model.eos_ids)
    check_prompts(config, model, prompter, problems)
    check_template(config, trained, prompter)
    result = evaluate(
        Generator(model, tokenizer=tokenizer),
        prompter,
        problems,
        score_answers,
        samples=config.samples,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        k=config.k,
    )
    if output is not None:
        lines = [json.dumps(asdict(row)) + "\n" for row in result.graded]
        replace_file(output, "".join(lines).encode())
    summary = result.summary()
    data = data_name(config, trained)
    if lm_eval_output is not None:
        groups = by_problem(result.graded, result.samples)
        values = lm_eval_results(config, groups, data=data, summary=summary, date=time.time())
        replace_file(lm_eval_output, (json.dumps(values, indent=2) + "\n").encode())
    if summary["clipped_ratio"] >= NEARLY_ALL_CUT:
        cut = cut_in_words(summary["clipped_ratio"], config.max_new_tokens)
        warnings.warn(cut, stacklevel=2)
    print(json.dumps({"model": config.model, "data": data} | summary), flush=True)


def notes(config: Evaluate, trained: TrainedModel) -> Iterator[str]:
    """Yield a line about the options that are as in training, and one about those that differ.

    Before them, warn of a damaged record.
    """
    if trained.damage is not None:
        yield f"warning: {trained.damage}: the options are those of the newest checkpoint"
    same = [
        name for name in PROMPT_OPTIONS if getattr(config, name) == getattr(trained.config, name)
    ]
    values = ", ".join(f"{name}={getattr(config, name)!r}" for name in same)
    yield f"as in training of {trained.run_dir}: {values}"
    differs = difference(config, trained)
    if differs is not None:
        yield differs


def data_name(config: Evaluate, trained: TrainedModel | None) -> str:
    """Return the name of the problems for the summary."""
    if config.data is not None or trained is None:
        return config.source
    return in_words(trained.config.eval_sources) or (
        f"held out of {in_words(trained.config.data_sources)}"
    )


def load_data(
    config: Evaluate, trained: TrainedModel | None
) -> tuple[Sequence[Problem], tuple[Problem, ...]]:
    """Return the problems and the few-shot examples. No example is among the problems.

    The problems and the examples of a run are those of its training, unless options name others.
    The examples of built-in data are from the train split.
    """
    own_shots = trained is None or config.shots_data is not None or config.n_shots == 0
    # Other data may lack a column that the run names, such as that of the solutions.
    all_columns = trained is None or config.columns != trained.config.columns
    if trained is None or (config.data is not None and own_shots):
        problems = load_evaluated(config, all_columns=all_columns)
        shots = worked_examples_of(config, all_columns=all_columns)
    else:
        data = problems_of_run(config, trained)
        shots = data.shots
        if config.data is not None:
            problems = load_evaluated(config, all_columns=all_columns)
        elif data.held_out:
            problems = subset(data.held_out, config.limit, seed=0)
        else:
            raise ValueError(f"{trained.run_dir} has no held-out problems: name some with --data")
    return without(problems, shots), shots


def load_evaluated(config: Evaluate, *, all_columns: bool) -> Sequence[Problem]:
    """Return the problems of `data`.

    all_columns: as for `load_problems`.
    """
    problems = load_problems(
        config.source,
        levels=config.levels or (),
        limit=config.limit,
        columns=config.columns,
        all_columns=all_columns,
        data_dir=config.data_dir,
    )
    check_answers(config.source, problems)
    return problems


def worked_examples_of(config: Evaluate, *, all_columns: bool) -> tuple[Problem, ...]:
    """Return the few-shot examples of `shots_data`, or of the data.

    all_columns: as for `load_problems`.
    """
    if config.n_shots == 0:
        return ()
    train_split = re.sub(r"^(builtin:[^:]+):eval$", r"\1:train", config.source)
    candidates = load_problems(
        config.shots_data or train_split,
        levels=config.levels or (),
        columns=config.columns,
        all_columns=all_columns,
        data_dir=config.data_dir,
    )
    shots, _ = worked_examples(candidates, config.n_shots)
    return shots


def check_template(config: Evaluate, trained: TrainedModel | None, prompter: Prompter) -> None:
    """Print a line if the prompts differ from those of training, though the options are equal."""
    if trained is None or trained.template_hash is None:
        return
    if difference(replace(config, dtype=trained.config.dtype), trained):
        return
    if prompter.template_hash != trained.template_hash:
        print(
            f"the prompts differ from those of training in {trained.run_dir}: template "
            f"{prompter.template_hash}, in training {trained.template_hash}",
            file=sys.stderr,
        )


def check_prompts(
    config: Evaluate, model: Decoder, prompter: Prompter, problems: Sequence[Problem]
) -> None:
    """Raise ValueError if there is no problem, or if a problem does not fit the model."""
    if not problems:
        raise ValueError(
            f"{config.source} has only the {config.n_shots} worked examples: need at least one "
            "more problem"
        )
    for problem in problems:
        prompt = prompter.solve(problem)
        check_ids(problem, prompt, prompter, model.shape.vocabulary)
        new_tokens = config.max_new_tokens
        check_length(problem, prompt, new=new_tokens, context=model.shape.context)
    warn_of_control_tokens(prompter, problems)
