"""Train a model: python -m expo_fast.train --method expo-grpo.

Without flags, it runs the default job. `run` is the same for Python programs and notebooks.
"""

if __name__ == "__main__":  # before the imports below, because one of their packages may be missing
    from expo_fast.cli.exit_status import run_command

    raise SystemExit(run_command("train"))

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from expo_fast.algorithms import dpo, grpo, sft
from expo_fast.algorithms.resume import (
    begin_record,
    check_run_dir,
    names_checkpoint,
    restore,
    save_checkpoint,
    with_defaults,
    write_base,
)
from expo_fast.algorithms.rollout import (
    MANY_UNDECIDED,
    NEARLY_ALL_CUT,
    cut_in_words,
    undecided_in_words,
)
from expo_fast.algorithms.trainer import StepResult, Trainer, make_trainer
from expo_fast.algorithms.training_data import (
    TrainingData,
    check_lengths,
    check_token_ids,
    in_words,
    load_training_data,
    warn_of_control_tokens,
)
from expo_fast.cli.flags import dump_toml, parse
from expo_fast.config import Train
from expo_fast.data.problems import Problem
from expo_fast.data.prompts import Prompter
from expo_fast.evaluate import evaluate
from expo_fast.generate import Generator
from expo_fast.inspection.memory import estimate_memory, memory_lines
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.lora import attach
from expo_fast.op_backends import dispatch
from expo_fast.reporting.jsonl import read_rows
from expo_fast.reporting.run_log import EVALUATIONS, METRICS, RunLog
from expo_fast.reporting.timing import Phases
from expo_fast.reporting.trackers import check_trackers
from expo_fast.reward import boxed_answer_reward, score_answers
from expo_fast.reward_functions import (
    Reward,
    RewardError,
    TrainerState,
    check_reward_functions,
    custom_reward,
    load_rewards,
)
from expo_fast.storage import checkpoint
from expo_fast.weights import load_model

FEW_QUESTIONS = 10  # fewer have no useful bootstrap interval
MAX_BROKEN_STEPS = 3  # consecutive steps, after which the run is stopped

StepFunction = Callable[[Trainer, int, Phases], StepResult]
LOOPS: dict[str, StepFunction] = {
    "grpo": grpo.run_step,
    "dpo": dpo.run_step,
    "sft": sft.run_step,
}


@dataclass(frozen=True)
class TrainResult:
    """The record of a run, and the model that it trained."""

    run_dir: Path
    model: Decoder = field(repr=False)
    """The model with the weights after the last step."""
    tokenizer: Any = field(repr=False)
    """Its tokenizer, of transformers."""
    generator: Generator = field(repr=False)
    """A generator that samples from these weights."""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One row for each step, also of the steps before a resume. Missing values are None."""
        return list(read_rows(self.run_dir / METRICS))

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """One row for each evaluation. `step` is 0 for the one before the first step."""
        return list(read_rows(self.run_dir / EVALUATIONS))

    @property
    def model_path(self) -> Path | None:
        """The newest checkpoint, which `load_model` and transformers load; None: there is none."""
        return checkpoint.newest(self.run_dir)

    def completions(self, step: int) -> list[dict[str, Any]]:
        """Return the texts of a step, with their rewards. Step 1 is the first one."""
        return list(read_rows(self.run_dir / "completions" / f"step-{step}.jsonl"))


def main(argv: Sequence[str]) -> None:
    """Run the command line. Raise ValueError or OSError for an error that a user can correct."""
    run(parse(Train, argv))


def run(config: Train) -> TrainResult:
    """Train a model, or resume its run, and return the result.

    With `config.dry_run`, everything is checked and no step runs.
    Raise ValueError or OSError for an error that a user can correct.
    """
    check_trackers(config.report_to)
    config = with_defaults(config)
    check_run_dir(config)
    data = load_training_data(config)
    config = config.resolve_epochs(len(data.problems))
    trainer = build_trainer(config, data)
    if trainer.model.device.type == "cpu":
        dispatch.compiles()  # called here to report a missing compiler before the run begins
    shape = trainer.model.shape
    prompter = trainer.prompter
    check_token_ids(config, prompter, data.problems, data.held_out, shape.vocabulary)
    check_lengths(config, prompter, data.problems, data.held_out, shape.context)
    warn_of_control_tokens(prompter, [*data.problems, *data.held_out])
    # A named checkpoint is read first, so that a wrong one leaves no new run directory.
    restored = None
    if config.dry_run or names_checkpoint(config):
        restored = restore(config, trainer)
        check_continuation(trainer, start=restored[1])
    if config.dry_run:
        print_dry_run(trainer, data)
        return result_of(trainer)
    with (
        checkpoint.run_lock(config.run_dir),
        open_log(config) as log,
    ):
        log.note(f"run directory: {config.run_dir}")
        check_run_dir(config)  # once more: another trainer may have begun a run here meanwhile
        resumed_from, start = restored or restore(config, trainer)
        check_continuation(trainer, start)
        if config.spec.loop == "dpo":
            dpo.open_pair_store(trainer, config.run_dir, start)
        begin_record(config, resumed_from, start, log)
        for line in data.notes:
            log.note(line)
        write_base(trainer, log)
        log.open_trackers()
        try:
            train(trainer, data.held_out, log, start)
        except KeyboardInterrupt:
            log.note(interruption_in_words(config.run_dir))
            raise
    return result_of(trainer)


def interruption_in_words(run_dir: Path) -> str:
    """Return where an interrupted run continues."""
    newest = checkpoint.newest(run_dir)
    if newest is None:
        return "interrupted before the first checkpoint: the same command starts the run again"
    return f"interrupted: the same command resumes the run from {newest}"


def result_of(trainer: Trainer) -> TrainResult:
    """Return the result of a run. It does not keep the optimizer's state in memory."""
    return TrainResult(
        run_dir=trainer.config.run_dir,
        model=trainer.model,
        tokenizer=trainer.prompter.tokenizer,
        generator=trainer.generator,
    )


def print_dry_run(trainer: Trainer, data: TrainingData) -> None:
    """Print the configuration as TOML.

    The data, the first prompt and an estimate of the memory are printed as comments.
    """
    config = trainer.config
    print(dump_toml(config), end="")
    for line in data_lines(data):
        print(f"# {line}")
    prompt_ids = trainer.prompter.solve(trainer.problems[0])
    prompt = json.dumps(trainer.prompter.tokenizer.decode(prompt_ids))
    print(f"# prompt of {trainer.problems[0].id}: {prompt}")
    estimate = estimate_memory(config, trainer.model.config, trainer.prompter, trainer.problems)
    for line in memory_lines(config, estimate):
        print(f"# {line}")


def open_log(config: Train) -> RunLog:
    """Return the log of the run."""
    return RunLog(
        config.run_dir,
        total_steps=config.steps,
        loop=config.spec.loop,
        config=dataclasses.asdict(config),
        report_to=config.report_to,
    )


def data_lines(data: TrainingData) -> Iterator[str]:
    """Yield lines about the problems of a run."""
    yield f"problems: {len(data.problems)}"
    if len(data.sources) > 1:
        yield f"problems by source: {', '.join(str(len(source)) for source in data.sources)}"
    yield f"worked examples: {len(data.shots)}"
    yield f"held-out problems: {len(data.held_out)}"
    yield from data.notes


def build_trainer(config: Train, data: TrainingData) -> Trainer:
    """Load the model and return the trainer of a new run."""
    progress = TrainerState(max_steps=config.steps)
    reward = build_reward(config, data, progress)
    dtype = getattr(torch, config.dtype)
    model, tokenizer = load_model(
        config.model,
        dtype=dtype,
        device=config.device,
        checkpointing=config.gradient_checkpointing,
    )
    if config.lora_rank:
        attach(model, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed)
    reference = None
    if config.needs_frozen_reference:
        reference, _ = load_model(config.model, dtype=dtype, device=config.device)
        reference.requires_grad_(False)
    prompter = Prompter(
        tokenizer,
        data.shots,
        config.system_prompt,
        config.instruction,
        ends=model.eos_ids,
        escape=config.escape_special_tokens,
    )
    return make_trainer(
        config,
        model,
        reference,
        prompter,
        data.problems,
        reward,
        verify=score_answers,
        progress=progress,
        sources=data.sources,
    )


def build_reward(config: Train, data: TrainingData, progress: TrainerState) -> Reward:
    """Return the reward: the boxed answer, or the weighted sum of the user's functions.

    Raise ValueError or FileNotFoundError if a function is missing, or does not fit the data.
    """
    if not config.reward_functions:
        return boxed_answer_reward
    functions = load_rewards(config.reward_functions)
    check_reward_functions(functions, in_words(config.data_sources), data.problems)
    return custom_reward(
        functions,
        config.reward_weights,
        progress,
        timeout_s=config.reward_timeout,
    )


def check_continuation(trainer: Trainer, start: int) -> None:
    """Raise ValueError if the run cannot continue from step `start` (from 0)."""
    if trainer.config.spec.loop == "dpo":
        dpo.check_pairs(trainer, trainer.config.run_dir, start)


def train(trainer: Trainer, held_out: Sequence[Problem], log: RunLog, start: int) -> None:
    """Run steps start .. config.steps - 1, with their evaluations and checkpoints."""
    config = trainer.config
    run_step = LOOPS[config.spec.loop]
    told_of_cut = False
    told_of_undecided = False
    eval_every = config.eval_every if held_out else 0
    if start == 0 and eval_every:
        log_evaluation(trainer, held_out, log, step=0)
    for step in range(start, config.steps):
        done = step + 1
        phases = Phases()
        skipped_before = trainer.optimizer.skipped
        trainer.progress.global_step = step
        trainer.progress.epoch = step * config.prompts_per_step / len(trainer.problems)
        try:
            metrics, texts = run_step(trainer, step, phases)
        except RewardError:
            raise
        except ValueError as error:
            # Bad input was refused before the run. This is a bug, so the traceback is needed.
            raise RuntimeError(f"step {done} failed") from error
        row = {
            "step": done,
            **metrics,
            "skipped_steps": trainer.optimizer.skipped,
            "num_tokens": trainer.sampled_tokens + trainer.data_tokens,
            **phases.seconds(),
        }
        log.write_completions(done, texts)
        log.write_step(row)
        clipped_ratio = metrics.get("completions/clipped_ratio") or 0.0
        if clipped_ratio >= NEARLY_ALL_CUT and not told_of_cut:
            told_of_cut = True
            log.note(f"warning: step {done}: {cut_in_words(clipped_ratio, config.max_new_tokens)}")
        if (metrics.get("verdicts/undecided") or 0.0) >= MANY_UNDECIDED and not told_of_undecided:
            told_of_undecided = True
            log.note(f"warning: step {done}: {undecided_in_words(metrics)}")
        no_finite_logits = metrics.get("completions/error_ratio") == 1
        if no_finite_logits or trainer.optimizer.skipped > skipped_before:
            trainer.broken_steps += 1
            last = no_finite_logits and done == config.steps
            keep_broken_batch(config.run_dir, done, trainer.broken_steps, last=last)
        else:
            trainer.broken_steps = 0
        if is_due(done, eval_every, config.steps):
            log_evaluation(trainer, held_out, log, step=done)
        if is_due(done, config.checkpoint_every, config.steps) and not no_finite_logits:
            save_checkpoint(trainer, done)
    for line in summary(config):
        log.note(line)


def is_due(done: int, every: int, last: int) -> bool:
    return every > 0 and (done % every == 0 or done == last)


def log_evaluation(
    trainer: Trainer, held_out: Sequence[Problem], log: RunLog, *, step: int
) -> None:
    """Measure the accuracy on the held-out problems.

    The seeds are the same at every step, so that only the weights make a difference.
    """
    config = trainer.config
    result = evaluate(
        trainer.generator,
        trainer.prompter,
        held_out,
        score_answers,
        samples=config.eval_samples,
        temperature=config.eval_temperature,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
    )
    log.write_evaluation({"step": step} | result.summary())


def keep_broken_batch(run_dir: Path, step: int, in_a_row: int, *, last: bool) -> None:
    """Copy the completions of a broken step to RUN/skipped.

    in_a_row: number of consecutive broken steps up to this one.
    Raise RuntimeError after MAX_BROKEN_STEPS consecutive broken steps, and if `last` is true.
    """
    batch = run_dir / "completions" / f"step-{step}.jsonl"
    if batch.exists():
        (run_dir / "skipped").mkdir(exist_ok=True)
        shutil.copy(batch, run_dir / "skipped")
    if in_a_row >= MAX_BROKEN_STEPS or last:
        raise RuntimeError(
            f"step {step}: a non-finite gradient, or non-finite logits in every completion (steps "
            f"in a row: {in_a_row}): lower --learning-rate, or use --dtype float32; the batches "
            f"are in {run_dir / 'skipped'}"
        )


def summary(config: Train) -> Iterator[str]:
    """Yield lines with the accuracy before and after the run, and the folder of the model."""
    evaluations = config.run_dir / "evaluations.jsonl"
    lines = evaluations.read_text().splitlines() if evaluations.exists() else []
    by_step = {row["step"]: row for row in map(json.loads, lines)}
    for name, step in (("before", 0), ("after", config.steps)):
        if step not in by_step:
            continue
        row = by_step[step]
        cells = [f"{name:<7}"]
        few = row["problems"] < FEW_QUESTIONS
        for k in dict.fromkeys((1, config.eval_samples)):
            low, high = row[f"pass@{k}/interval"]
            interval = "" if few else f" [{low:.3f}, {high:.3f}]"
            cells.append(f"pass@{k} {row[f'pass@{k}']:.3f}{interval}")
        questions = f"{row['problems']} questions" if few else "questions"
        cells.append(f"all samples fail: {row['all_fail']:.0%} of {questions}")
        yield "  ".join(cells)
    model = checkpoint.newest(config.run_dir)
    if model is not None:
        yield f"model: {model}"
