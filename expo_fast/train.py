"""Train a model: python -m expo_fast.train --method expo-grpo.

Without flags, it runs the default job. `run` is the same for Python programs and notebooks.
"""

if __name__ == "__main__":  # before the imports below, because one of their packages may be missing
    from expo_fast.cli.exit_status import run_command

    raise SystemExit(run_command("train"))

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from expo_fast.algorithms import dpo, grpo, sft
from expo_fast.algorithms.alarms import Alarms, FirstWarnings, has_no_finite_logits
from expo_fast.algorithms.publish import push_model
from expo_fast.algorithms.ranks import RankClock, check_shared_folder
from expo_fast.algorithms.resume import (
    begin_record,
    check_run_dir,
    names_checkpoint,
    restore,
    with_recorded_options,
)
from expo_fast.algorithms.saved_model import write_base
from expo_fast.algorithms.saving import Saver
from expo_fast.algorithms.trainer import (
    StepResult,
    Trainer,
    check_same_options,
    make_trainer,
)
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
from expo_fast.data.prompts import Prompter
from expo_fast.distributed import session
from expo_fast.distributed.world import ALONE, World
from expo_fast.evaluate import evaluate
from expo_fast.generate import Generator
from expo_fast.inspection.disk import disk_lines
from expo_fast.inspection.memory import estimate_memory, memory_lines
from expo_fast.inspection.pack_size import with_pack_tokens
from expo_fast.inspection.ranks_memory import (
    Gather,
    choose_gather,
    memory_of_rank,
    ranks_lines,
)
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.lora import attach
from expo_fast.modeling.sharding import Place
from expo_fast.op_backends import dispatch
from expo_fast.reporting.accuracy import by_problem
from expo_fast.reporting.jsonl import json_value, read_rows
from expo_fast.reporting.quiet_log import QuietLog
from expo_fast.reporting.run_log import EVALUATIONS, METRICS, RunLog
from expo_fast.reporting.timing import Phases
from expo_fast.reporting.trackers import check_trackers
from expo_fast.reward import boxed_answer_reward, score_answers
from expo_fast.reward_functions import (
    Reward,
    RewardError,
    RewardFunction,
    TrainerState,
    check_reward_functions,
    custom_reward,
    load_rewards,
    source_hash,
)
from expo_fast.runtime import interruptions
from expo_fast.runtime.endings import Collapsed, Stopped
from expo_fast.runtime.interruptions import Interruptions
from expo_fast.storage import checkpoint, hub
from expo_fast.weights import find_device, load_model

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
    tokenizer: Any = field(repr=False)
    """The tokenizer of the model, of transformers."""
    _generator: Generator | None = field(repr=False)
    """None: no rank has all weights."""
    _model: Decoder | None = field(repr=False)

    @property
    def model(self) -> Decoder:
        """The model with the weights after the last step.

        Raise RuntimeError after a run in which ranks gathered layer by layer.
        """
        if self._model is None:
            raise self._no_weights()
        return self._model

    @property
    def generator(self) -> Generator:
        """A generator that samples from these weights. Raise RuntimeError as `model` does."""
        if self._generator is None:
            raise self._no_weights()
        return self._generator

    def _no_weights(self) -> RuntimeError:
        return RuntimeError(
            "with --gather layers, no rank has all weights after the run: load the model from the "
            f"checkpoint that TrainResult.model_path names, {self.model_path}"
        )

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
    try:
        config = parse(Train, argv)
    except ValueError as error:
        session.tell_other_ranks(error)
        raise
    run(config)


def run(config: Train) -> TrainResult:
    """Train a model, or resume its run, and return the result.

    With `config.dry_run`, everything is checked and no step runs. Under `torchrun`, all its
    processes have to call it.
    Raise ValueError or OSError for an error that a user can correct.
    """
    with session.started(config.collective_timeout, config.device) as world:
        return run_in(world, config)


def run_in(world: World, config: Train) -> TrainResult:
    """Train a model on the ranks of a world. See `run`."""
    with world.agreed():
        check_trackers(config.report_to)
        hub.check_target(config.push_to_hub)
        config = with_pack_tokens(with_recorded_options(config))
        check_run_dir(config)
        data = load_training_data(config)
        config = config.resolve_epochs(len(data.problems))
        trainer = build_trainer(config, data, world)
        config = trainer.config  # with what each rank gathers
        if trainer.model.device.type == "cpu":
            dispatch.compiles()  # called here to report a missing compiler before the run begins
        check_texts(trainer)
    # A named checkpoint is read first, so that a wrong one leaves no new run directory.
    restored = None
    if config.dry_run or names_checkpoint(config):
        restored = restore(trainer)
        check_continuation(trainer, start=restored.step)
    if config.dry_run:
        if world.is_main:
            print_dry_run(trainer, data)
        return result_of(trainer)
    check_shared_folder(world, config.run_dir)
    with contextlib.ExitStack() as stack:
        with world.agreed():
            if world.is_main:
                stack.enter_context(checkpoint.run_lock(config.run_dir))
        log = stack.enter_context(open_log(config, world))
        log.note(f"run directory: {config.run_dir}")
        with world.agreed():
            check_run_dir(config)  # once more: another trainer may have begun a run here meanwhile
        restored = restored or restore(trainer)
        start = restored.step
        check_continuation(trainer, start)
        if config.spec.loop == "dpo":
            dpo.open_pair_store(trainer, config.run_dir, start)
        with world.agreed():
            if world.is_main:
                begin_record(trainer, restored, log)
                for line in (*data.notes, *trainer.notes):
                    log.note(line)
                write_base(trainer, log)
                log.open_trackers()
        with interruptions.watching(config.stop_within) as signals:
            signals.together = world.size > 1
            train(trainer, log, start, signals)
        with world.agreed():
            if world.is_main:
                push_model(trainer, log)
    return result_of(trainer)


def check_texts(trainer: Trainer) -> None:
    """Raise ValueError if a text of the run does not fit the model. Warn of control tokens."""
    config = trainer.config
    shape = trainer.model.shape
    prompter = trainer.prompter
    check_token_ids(config, prompter, trainer.problems, trainer.held_out, shape.vocabulary)
    check_lengths(config, prompter, trainer.problems, trainer.held_out, shape.context)
    warn_of_control_tokens(prompter, trainer.problems)
    warn_of_control_tokens(prompter, trainer.held_out)


def result_of(trainer: Trainer) -> TrainResult:
    """Return the result of a run. It does not keep the optimizer's state in memory."""
    model = trainer.model if trainer.config.lora_rank else trainer.layout.sampling_model
    has_all = trainer.layout.has_all_weights
    return TrainResult(
        run_dir=trainer.config.run_dir,
        tokenizer=trainer.prompter.tokenizer,
        _generator=trainer.generator if has_all else None,
        _model=model if has_all else None,
    )


def print_dry_run(trainer: Trainer, data: TrainingData) -> None:
    """Print the configuration as TOML.

    The data, the first prompt and estimates of memory and disk space are printed as comments.
    """
    config = trainer.config
    print(dump_toml(config), end="")
    for line in data_lines(data):
        print(f"# {line}")
    prompt_ids = trainer.prompter.solve(trainer.problems[0])
    prompt = json.dumps(trainer.prompter.tokenizer.decode(prompt_ids))
    print(f"# prompt of {trainer.problems[0].id}: {prompt}")
    estimate = estimate_memory(
        config, trainer.model.stored_config, trainer.prompter, trainer.problems
    )
    ranks = ranks_lines(config, trainer.model.stored_config, estimate)
    for line in (*memory_lines(config, estimate), *ranks, *disk_lines(trainer)):
        print(f"# {line}")


def open_log(config: Train, world: World) -> RunLog:
    """Return the log of the run. Only rank 0 writes one."""
    kind = RunLog if world.is_main else QuietLog
    return kind(
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


def build_trainer(config: Train, data: TrainingData, world: World = ALONE) -> Trainer:
    """Load the model and return the trainer of a new run.

    world: the ranks of the run, which all have to call this.
    """
    check_same_options(config, world)
    progress = TrainerState(max_steps=config.steps, is_world_process_zero=world.is_main)
    functions = load_rewards(config.reward_functions)
    reward = build_reward(config, data, functions, progress)
    dtype = getattr(torch, config.dtype)
    # The device of a rank need not hold all weights. Each unit is moved there before it is sharded.
    moves_later = config.shard == "model" and world.size > 1
    model, tokenizer = load_model(
        config.model,
        dtype=dtype,
        device="cpu" if moves_later else config.device,
        checkpointing=config.gradient_checkpointing,
    )
    gather = None
    place = Place(world)
    if moves_later:
        gather = gather_of_all_ranks(config, model, world)
        config = dataclasses.replace(config, gather=gather.kind)  # the record of the run has it
        place = Place(world, gather.kind, find_device(config.device))
    if config.lora_rank:
        attach(model, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed)
    reference = None
    if config.needs_frozen_reference:
        reference, _ = load_model(config.model, dtype=dtype, device=config.device)
        reference.requires_grad_(False)
    prompter = Prompter.of(config, tokenizer, data.shots, ends=model.eos_ids)
    trainer = make_trainer(
        config,
        model,
        reference,
        prompter,
        data.problems,
        reward,
        verify=score_answers,
        progress=progress,
        sources=data.sources,
        place=place,
    )
    if gather is not None:
        trainer.notes.append(str(gather))
    trainer.held_out = data.held_out
    trainer.reward_source = source_hash(functions)
    return trainer


def gather_of_all_ranks(config: Train, model: Decoder, world: World) -> Gather:
    """Return what each rank gathers to sample: layers, if all weights do not fit on one rank."""
    device = find_device(config.device).type
    available = memory_of_rank(device, int(os.environ.get("LOCAL_WORLD_SIZE") or world.size))
    least = min(world.exchange(available))
    return choose_gather(config, model, world.size, least)


def build_reward(
    config: Train,
    data: TrainingData,
    functions: Sequence[RewardFunction],
    progress: TrainerState,
) -> Reward:
    """Return the reward: the boxed answer, or the weighted sum of the user's functions.

    Raise ValueError if a function does not fit the data.
    """
    if not functions:
        return boxed_answer_reward
    check_reward_functions(functions, in_words(config.data_sources), data.problems)
    return custom_reward(
        functions,
        config.reward_weights,
        progress,
        timeout_s=config.reward_timeout,
    )


def check_continuation(trainer: Trainer, start: int) -> None:
    """Raise ValueError if the run cannot continue from step `start` (from 0)."""
    with trainer.world.agreed():
        if trainer.config.spec.loop == "dpo" and trainer.world.is_main:
            dpo.check_pairs(trainer, trainer.config.run_dir, start)


def train(
    trainer: Trainer,
    log: RunLog,
    start: int,
    signals: Interruptions,
) -> None:
    """Run steps start .. config.steps - 1, with their evaluations and checkpoints.

    Raise Stopped if a signal ends the run, and RewardError for a mistake of a reward function. The
    last step boundary is then saved. Raise Collapsed if the weights are broken, or with
    `stop_on_collapse` if an alarm says so.
    """
    saver = Saver(trainer, log)
    trainer.mark_boundary(start)
    try:
        run_steps(trainer, log, start, signals, saver)
    except Stopped as stop:
        interruptions.defer()  # until the boundary is saved
        log.note(f"interrupted by {saver.at_stop(stop.name)}")
        raise
    except RewardError:  # while completions are judged, before the step's first update
        interruptions.defer()
        log.note(f"ended by {saver.at_stop('an error of a reward function')}")
        raise
    except KeyboardInterrupt:  # outside the main thread or from a reward function: at any line
        log.note(f"interrupted: {saver.newest_in_words()}")
        raise


def run_steps(
    trainer: Trainer,
    log: RunLog,
    start: int,
    signals: Interruptions,
    saver: Saver,
) -> None:
    """Run the steps of `train`."""
    config = trainer.config
    world = trainer.world
    clock = RankClock(world)
    alarms = Alarms(config, read_rows(config.run_dir / METRICS))
    first_warnings = FirstWarnings(config)
    if world.broadcast(lacks_evaluation(trainer, saver, start)):
        log_evaluation(trainer, log, saver, step=start)
    for step in range(start, config.steps):
        signals.check()
        done = step + 1
        world.begin_step(done)
        row = take_step(trainer, step, log, alarms, clock)
        for warning in first_warnings.of_step(row):
            log.note(f"warning: step {done}: {warning}")
        saver.read_step(row)
        trainer.mark_boundary(done)
        is_best = False
        if is_due(done, trainer.eval_every, config.steps):
            is_best = log_evaluation(trainer, log, saver, step=done)
        with world.agreed():
            if world.is_main:
                check_collapse(config, alarms, saver, done)
        is_requested = any(world.exchange(signals.take_save_request()))
        save_step(trainer, log, saver, done, is_best=is_best, is_requested=is_requested)
    if world.is_main:
        for line in summary(config, alarms, saver):
            log.note(line)


def lacks_evaluation(trainer: Trainer, saver: Saver, start: int) -> bool:
    """Return whether the evaluation before step `start` (from 0) is still to be done.

    A run that was stopped inside an evaluation has a checkpoint of the step and no evaluation.
    """
    if start == 0:
        return trainer.eval_every > 0
    if trainer.origin is not None and trainer.origin.step == start:
        return False  # the run that this one continues has evaluated it
    if start in saver.scores.evaluated:
        return False
    return is_due(start, trainer.eval_every, trainer.config.steps)


def save_step(
    trainer: Trainer,
    log: RunLog,
    saver: Saver,
    step: int,
    *,
    is_best: bool,
    is_requested: bool,
) -> None:
    """Save the state after a step if that is due or requested.

    is_best: whether an evaluation after the step is the run's best.
    """
    config = trainer.config
    saves = config.checkpoint_every > 0
    if step == config.steps:
        if saves or is_requested:
            saver.after_last_step(step)
        return
    is_kept = is_best and saves and config.keep_best > 0
    save_now = is_kept or is_requested or is_due(step, config.checkpoint_every, config.steps)
    is_saved = saver.after_step(step, is_due=trainer.world.broadcast(save_now))
    if is_saved and is_requested:
        log.note(f"step {step} is saved, as a signal asked for")


def check_collapse(config: Train, alarms: Alarms, saver: Saver, step: int) -> None:
    """Raise Collapsed if an alarm says so and the configuration asks for that."""
    reason = alarms.collapse
    if not config.stop_on_collapse or reason is None:
        return
    best = saver.best()
    advice = "" if best is None else f"; the best checkpoint is {best}"
    raise Collapsed(f"step {step}: {reason}; {saver.newest_in_words()}{advice}")


def take_step(
    trainer: Trainer, step: int, log: RunLog, alarms: Alarms, clock: RankClock
) -> dict[str, Any]:
    """Take step `step` (from 0), log it and return its row of metrics.

    Raise Collapsed after too many broken steps.
    """
    config = trainer.config
    done = step + 1
    phases = Phases(entered=trainer.world.enter)
    skipped_before = trainer.optimizer.skipped
    trainer.progress.global_step = step
    trainer.progress.epoch = step * config.prompts_per_step / len(trainer.problems)
    try:
        metrics, texts = LOOPS[config.spec.loop](trainer, step, phases)
    except RewardError:
        raise
    except ValueError as error:
        # Bad input was refused before the run. This is a bug, so the traceback is needed.
        raise RuntimeError(f"step {done} failed") from error
    row = json_value(
        {
            "step": done,
            **metrics,
            "skipped_steps": trainer.optimizer.skipped,
            "num_tokens": trainer.sampled_tokens + trainer.data_tokens,
        }
    )
    if trainer.inexact:
        row["inexact"] = len(trainer.inexact)
    begun = alarms.update(row)
    row |= alarms.metrics() | phases.seconds() | clock.metrics()
    log.write_completions(done, texts)
    log.write_step(row)
    for name in begun:
        log.note(f"alarm: step {done}: {alarms.active[name]}")
    no_finite_logits = has_no_finite_logits(row)
    if no_finite_logits or trainer.optimizer.skipped > skipped_before:
        trainer.broken_steps += 1
        last = no_finite_logits and done == config.steps
        with trainer.world.agreed():
            if trainer.world.is_main:
                keep_broken_batch(config.run_dir, done, trainer.broken_steps, last=last)
    else:
        trainer.broken_steps = 0
    return row


def is_due(done: int, every: int, last: int) -> bool:
    return every > 0 and (done % every == 0 or done == last)


def log_evaluation(trainer: Trainer, log: RunLog, saver: Saver, *, step: int) -> bool:
    """Measure the accuracy on the held-out problems. Return whether it is the run's best.

    The seeds are the same at every step, so that only the weights make a difference.
    """
    config = trainer.config
    held_out = trainer.held_out
    deal = trainer.world.deal([1.0] * len(held_out))
    trainer.world.enter("evaluate")
    with trainer.world.agreed():
        result = evaluate(
            trainer.generator,
            trainer.prompter,
            deal.own(held_out),
            score_answers,
            samples=config.eval_samples,
            temperature=config.eval_temperature,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
        )
    if trainer.world.size > 1:
        graded = deal.collect(by_problem(result.graded, config.eval_samples))
        result = dataclasses.replace(result, graded=[each for some in graded for each in some])
    row = {"step": step} | result.summary()
    log.write_evaluation(row)
    return saver.scores.add_evaluation(row)


def keep_broken_batch(run_dir: Path, step: int, in_a_row: int, *, last: bool) -> None:
    """Copy the completions of a broken step to RUN/skipped.

    in_a_row: number of consecutive broken steps up to this one.
    Raise Collapsed after MAX_BROKEN_STEPS consecutive broken steps, and if `last` is true.
    """
    batch = run_dir / "completions" / f"step-{step}.jsonl"
    if batch.exists():
        (run_dir / "skipped").mkdir(exist_ok=True)
        shutil.copy(batch, run_dir / "skipped")
    if in_a_row >= MAX_BROKEN_STEPS or last:
        raise Collapsed(
            f"step {step}: a non-finite gradient, or non-finite logits in every completion (steps "
            f"in a row: {in_a_row}): lower --learning-rate, or use --dtype float32; the batches "
            f"are in {run_dir / 'skipped'}"
        )


def summary(config: Train, alarms: Alarms, saver: Saver) -> Iterator[str]:
    """Yield lines with the accuracy before and after the run, alarms, and the model's folder."""
    by_step = {row["step"]: row for row in read_rows(config.run_dir / EVALUATIONS)}
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
    for line in alarms.raised.values():
        yield f"alarm: {line}"
    model = checkpoint.newest(config.run_dir)
    if model is None:
        return
    yield f"model: {model}"
    best = saver.best()
    if best is not None and best.path != model:
        yield f"best checkpoint: {best}"
