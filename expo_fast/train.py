"""Train a model: python -m expo_fast.train --method expo-grpo. With no flag, the default job."""

import json
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from expo_fast import checkpoint
from expo_fast.command import run
from expo_fast.config import ADJUSTABLE, Train, dump_toml, from_toml, parse
from expo_fast.evaluate import evaluate
from expo_fast.explain import Explanations
from expo_fast.generate import Completion
from expo_fast.grpo import Reward, Rollout, Trainer
from expo_fast.log import RunLog
from expo_fast.prompts import Prompter, check_length, expert_text
from expo_fast.reward import RewardFunction, call_reward, load_reward, score_answers
from expo_fast.tasks import (
    Problem,
    fingerprint,
    last_question,
    load_problems,
    overlap,
    worked_examples,
)
from expo_fast.weights import load_model, save_model

MAX_SKIPPED = 3  # optimizer steps in a row with a non-finite gradient: the run is broken

MAX_BROKEN = 3  # steps in a row with a non-finite gradient: the run is past mending


def main(argv: Sequence[str]) -> None:
    config = parse(Train, argv)
    problems, shots, held_out = load_data(config)
    trainer = build(config, problems, shots)
    check_prompts(trainer, held_out)
    if config.dry_run:
        print(dump_toml(config), end="")
        return
    run_dir = config.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    print(f"run directory: {run_dir}", flush=True)
    with checkpoint.run_lock(run_dir), RunLog(run_dir, total_steps=config.steps) as log:
        start = resume(config, trainer, run_dir, log)
        train(config, trainer, held_out, run_dir, log, start)


def load_data(config: Train) -> tuple[list[Problem], tuple[Problem, ...], list[Problem]]:
    """Training problems, worked examples (not among them), and held-out problems."""
    c = config
    problems = load_problems(c.train_data, levels=c.levels)
    shots, problems = worked_examples(problems, c.shots)
    held_out = load_problems(c.eval_data, levels=c.levels, limit=c.eval_limit)
    if len(problems) < c.prompts_per_step:
        raise ValueError(
            f"{c.train_data} has {len(problems)} problems after {c.shots} worked examples, "
            f"a step takes prompts_per_step={c.prompts_per_step}"
        )
    if c.method == "expert-grpo":
        for problem in problems:
            expert_text(problem)  # refuses one without a solution
    reserved = {"prompts", "completions", "completion_ids"}
    if c.reward and (taken := reserved.intersection(*[p.columns for p in problems[:1]])):
        raise ValueError(
            f"{c.train_data} has a column {min(taken)!r}, which a reward function gets from the "
            "trainer: rename it"
        )
    if both := overlap([*shots, *problems], held_out):
        warnings.warn(
            f"{len(both)} problems of {c.eval_data} are also in {c.train_data}, "
            f"the first is {both[0].id}: its accuracy is not a held-out one",
            stacklevel=2,
        )
    return problems, shots, held_out


def build(config: Train, problems: list[Problem], shots: tuple[Problem, ...]) -> Trainer:
    """The trainer with its model, and a frozen second one where a KL penalty needs it."""
    reward = boxed_answer if config.reward is None else custom(load_reward(config.reward))
    dtype = getattr(torch, config.dtype)
    model, tokenizer = load_model(
        config.model,
        dtype=dtype,
        device=config.device,
        checkpointing=config.gradient_checkpointing,
    )
    reference = None
    if config.kl_coef:
        reference = load_model(config.model, dtype=dtype, device=config.device)[0]
        reference.requires_grad_(False)
    prompter = Prompter(tokenizer, shots, config.system_prompt)
    return Trainer(config, model, reference, prompter, problems, reward, score_answers)


def check_prompts(trainer: Trainer, held_out: Sequence[Problem]) -> None:
    """Refuse, before any work, a question that does not fit the model's context."""
    c, prompter = trainer.config, trainer.prompter
    render = prompter.explain if c.method == "expo-grpo" else prompter.solve
    check = partial(check_length, new=c.max_completion_length, context=trainer.model.shape.context)
    for problem in trainer.problems:
        check(problem, render(problem))
    for problem in held_out:
        check(problem, prompter.solve(problem))


def boxed_answer(problems: list[Problem], texts: list[str], _: list[Completion]):
    """The built-in reward: 1 where the last box holds the answer, else 0; None where undecided."""
    return score_answers([p.answer for p in problems], texts)


def custom(fn: RewardFunction) -> Reward:
    """A user's function behind our signature."""

    def reward(problems: list[Problem], texts: list[str], completions: list[Completion]):
        rows = [{**p.columns, **named_columns(p)} for p in problems]
        columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(chain(*rows))}
        prompts = [p.prompt for p in problems]
        return call_reward(fn, prompts, texts, [c.token_ids for c in completions], columns)

    return reward


def named_columns(problem: Problem) -> dict[str, Any]:
    """What a reward function gets of a problem beside the data's own columns."""
    p = problem
    return {"id": p.id, "answer": p.answer, "solution": p.solution, "level": p.level}


def resume(config: Train, trainer: Trainer, run_dir: Path, log: RunLog) -> int:
    """Steps already done: restore the newest valid checkpoint, or start the run's record."""
    record, identity = run_dir / "config.toml", identify(trainer)
    if record.exists():
        if config.resume == "never":
            raise ValueError(f"{run_dir} already holds a run: choose another --output-dir")
        check_same_run(config, record)
    path = checkpoint.newest(run_dir) if config.resume == "auto" else None
    if config.resume not in ("auto", "never"):
        path = Path(config.resume)
    if path is None:
        record.write_text(dump_toml(config))
        if (run_dir / "metrics.jsonl").exists():
            log.note("no whole checkpoint to resume from: the run starts again")
        log.truncate_to(-1)
        return 0
    tensors, values = checkpoint.load(path)
    for what, value in identity.items():
        if values["identity"][what] != value:
            raise ValueError(f"{path} was made with other {what}: a resume needs the same")
    restored, _ = load_model(path, dtype=trainer.model.dtype, device=trainer.model.device)
    trainer.model.load_state_dict(restored.state_dict())
    trainer.load_state(tensors, values["trainer"])
    checkpoint.set_aside_after(run_dir, values["step"])
    record.write_text(dump_toml(config))
    log.truncate_to(values["step"])
    log.note(f"resumed from {path}")
    return values["step"]


def identify(trainer: Trainer) -> dict[str, str]:
    """What a resumed run must share with the run it resumes."""
    return {
        "training data": fingerprint(trainer.problems),
        "prompt template": trainer.prompter.template_hash,
    }


def check_same_run(config: Train, record: Path) -> None:
    old, new = asdict(from_toml(Train, record)), asdict(config)
    for name in old:
        if old[name] != new[name] and name not in ADJUSTABLE:
            raise ValueError(
                f"{record.parent} holds a run with {name}={old[name]!r}, not {new[name]!r}: "
                "choose another --output-dir"
            )


def train(
    config: Train,
    trainer: Trainer,
    held_out: Sequence[Problem],
    run_dir: Path,
    log: RunLog,
    start: int,
) -> None:
    """Steps start .. config.steps - 1, with what is measured and saved between them."""
    broken = 0  # steps in a row with a skipped update
    if start == 0 and config.eval_every:
        measure_accuracy(config, trainer, held_out, log, 0)
    for step in range(start, config.steps):
        done, skipped = step + 1, trainer.optimizer.skipped
        try:
            row, rollouts, found = trainer.step(step)
        except ValueError as error:  # no longer the door: whoever mends it needs the traceback
            raise RuntimeError(f"step {done} failed") from error
        kind = "expert" if config.method == "expert-grpo" else "explanation"
        log.write_completions(done, completion_rows(rollouts, found, trainer.prompter, kind))
        log.write_step(row)
        broken = broken + 1 if trainer.optimizer.skipped > skipped else 0
        if broken:
            keep_broken(run_dir, done, broken)
        if is_due(done, config.eval_every, config.steps):
            measure_accuracy(config, trainer, held_out, log, done)
        if is_due(done, config.checkpoint_every, config.steps):
            save(config, trainer, run_dir, done)
    print_gain(run_dir, config)


def is_due(done: int, every: int, last: int) -> bool:
    return every > 0 and (done % every == 0 or done == last)


def measure_accuracy(
    config: Train, trainer: Trainer, held_out: Sequence[Problem], log: RunLog, step: int
) -> None:
    """Held-out accuracy; the same seeds at every step, so that a difference is the weights'."""
    result = evaluate(
        trainer.generator,
        trainer.prompter,
        held_out,
        score_answers,
        samples=config.eval_samples,
        temperature=config.eval_temperature,
        max_new_tokens=config.max_completion_length,
        seed=config.seed,
    )
    log.write_evaluation({"step": step} | result.summary())


def completion_rows(
    rollouts: Sequence[Rollout], found: Explanations, prompter: Prompter, kind: str
) -> list[dict[str, Any]]:
    rows = []
    for r in rollouts:
        head = {"id": r.problem.id, "prompt": last_question(r.problem), "answer": r.problem.answer}
        groups = zip(r.texts, r.completions, r.rewards, r.advantages, strict=True)
        for text, done, reward, advantage in groups:
            end = {"finish_reason": done.finish_reason, "advantage": advantage}
            rows.append({**head, "kind": "own", "completion": text, "reward": reward, **end})
        for ids in found.accepted.get(r.problem.id, ()):
            text = prompter.text(ids)
            rows.append({**head, "kind": kind, "completion": text, "reward": None})
    return rows


def keep_broken(run_dir: Path, step: int, in_a_row: int) -> None:
    """Keep the batch of a skipped update beside the run; stop after MAX_BROKEN in a row."""
    batch = run_dir / "completions" / f"step-{step}.jsonl"
    if batch.exists():
        (run_dir / "skipped").mkdir(exist_ok=True)
        shutil.copy(batch, run_dir / "skipped")
    if in_a_row >= MAX_BROKEN:
        raise RuntimeError(
            f"step {step}: {in_a_row} steps in a row had a non-finite gradient and were skipped; "
            f"their batches are in {run_dir / 'skipped'}. Lower --learning-rate, or use "
            "--dtype float32"
        )


def save(config: Train, trainer: Trainer, run_dir: Path, step: int) -> None:
    tensors, values = trainer.state()
    checkpoint.save(
        run_dir,
        step,
        partial(save_model, trainer.model, trainer.prompter.tokenizer),
        tensors,
        {"step": step, "identity": identify(trainer), "trainer": values},
        keep=config.keep_checkpoints,
    )


def print_gain(run_dir: Path, config: Train) -> None:
    """Accuracy before and after, as the run's record has it."""
    record = run_dir / "evaluations.jsonl"
    lines = record.read_text().splitlines() if record.exists() else []
    rows = {row["step"]: row for row in map(json.loads, lines)}
    for name, row in (("before", rows.get(0)), ("after", rows.get(config.steps))):
        if row is not None:
            cells = [f"{name:<7}"]
            for k in dict.fromkeys((1, config.eval_samples)):
                low, high = row[f"pass@{k}/interval"]
                cells.append(f"pass@{k} {row[f'pass@{k}']:.3f} [{low:.3f}, {high:.3f}]")
            print("  ".join([*cells, f"all samples fail: {row['all_fail']:.0%} of questions"]))
    if model := checkpoint.newest(run_dir):
        print(f"model: {model}")


if __name__ == "__main__":
    sys.exit(run(main))
