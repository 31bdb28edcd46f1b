"""Train a model: python -m expo_fast.train --method expo-grpo. With no flag, the default job."""

import json
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from expo_fast.algorithms.dpo import Preference
from expo_fast.algorithms.grpo import Grpo
from expo_fast.algorithms.rollout import Reward
from expo_fast.algorithms.sft import Sft
from expo_fast.algorithms.trainer import Learner
from expo_fast.cli.exit_status import run
from expo_fast.cli.flags import dump_toml, from_toml, parse
from expo_fast.config import ADJUSTABLE, GROUPS, PAIRS, REFERENCE_FREE, Train
from expo_fast.data.answer_grading import decide, last_boxed, tidy
from expo_fast.data.problems import Problem, fingerprint, load_problems, overlap, worked_examples
from expo_fast.data.prompts import Prompter, check_length, expert_text
from expo_fast.evaluate import check_answers, evaluate
from expo_fast.generate import Completion
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.lora import attach, load_adapter, save_adapter
from expo_fast.reporting.run_log import RunLog
from expo_fast.reward import RewardFunction, call_reward, load_reward, score_answers
from expo_fast.storage import checkpoint
from expo_fast.storage.files import replace_file
from expo_fast.weights import find_model, load_model, save_model

MAX_BROKEN = 3  # steps in a row without finite logits or gradient: the run is past mending
RESERVED = {"prompts", "completions", "completion_ids"}  # what a reward function gets from us


def main(argv: Sequence[str]) -> None:
    config = parse(Train, argv)
    check_run_dir(config)
    problems, shots, held_out = load_data(config)
    trainer = build(config, problems, shots)
    check_prompts(trainer, held_out)
    # a checkpoint that is named is read before the folder is made, so that a wrong one leaves none
    early = config.dry_run or config.resume not in ("auto", "never")
    restored = restore(config, trainer) if early else None
    if restored:
        trainer.check(config.run_dir, restored[1])
    if config.dry_run:
        print(dump_toml(config), end="", flush=True)
        return
    run_dir = config.run_dir
    with checkpoint.run_lock(run_dir), RunLog(run_dir, total_steps=config.steps) as log:
        log.note(f"run directory: {run_dir}")
        check_run_dir(config)  # once more: another trainer may have begun a run here meanwhile
        path, start = restored or restore(config, trainer)
        trainer.check(run_dir, start)
        trainer.begin(run_dir, start)
        begin(config, path, start, log)
        train(config, trainer, held_out, run_dir, log, start)


def load_data(config: Train) -> tuple[list[Problem], tuple[Problem, ...], list[Problem]]:
    """Training problems, worked examples (not among them), and held-out problems."""
    c = config
    problems = load_problems(c.train_data, levels=c.levels)
    given = load_problems(c.shots_data, levels=c.levels) if c.shots_data else problems
    shots, _ = worked_examples(given, c.shots)
    shown = overlap(shots, problems)
    problems = [p for p in problems if p not in shown]
    held_out = []
    if c.eval_every:
        held_out = load_problems(c.eval_data, levels=c.levels, limit=c.eval_limit)
        check_answers(c.eval_data, held_out)
    if len(problems) < c.prompts_per_step:
        raise ValueError(
            f"{c.train_data} has {len(problems)} problems after {c.shots} worked examples, "
            f"a step takes prompts_per_step={c.prompts_per_step}"
        )
    check_columns(c, problems)
    if c.reward and (
        taken := RESERVED.intersection(chain.from_iterable(p.columns for p in problems))
    ):
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


def check_columns(config: Train, problems: Sequence[Problem]) -> None:
    """Refuse problems that lack what the method trains on; warn where it contradicts itself."""
    method = config.method
    contradicting: list[Problem] = []
    for problem in problems:
        if method in ("expert-grpo", "expert-dpo") or (method == "sft" and not problem.pair):
            box = last_boxed(expert_text(problem))  # refuses one without a solution
            if problem.answer and decide(tidy(problem.answer), tidy(box or "")) is False:
                contradicting.append(problem)
        if method == "dpo" and problem.pair is None:
            raise ValueError(
                f"problem {problem.id} has no 'chosen' and 'rejected' columns: --method dpo "
                "trains on them; expo-dpo and expert-dpo sample what they compare"
            )
        if method not in ("dpo", "sft") and not problem.answer:
            raise ValueError(
                f"problem {problem.id} has a preference pair and no 'answer': --method {method} "
                "needs one to judge attempts; --method dpo trains on pairs"
            )
    if contradicting:
        warnings.warn(
            f"{len(contradicting)} solutions of {config.train_data} box another answer than their "
            f"row's, the first is {contradicting[0].id}: they are trained on as they are",
            stacklevel=2,
        )


def build(config: Train, problems: list[Problem], shots: tuple[Problem, ...]) -> Learner:
    """The learner with its model, and a frozen second one where the reference has to be one."""
    reward = boxed_answer if config.reward is None else custom(load_reward(config.reward))
    dtype = getattr(torch, config.dtype)
    model, tokenizer = load_model(
        config.model,
        dtype=dtype,
        device=config.device,
        checkpointing=config.gradient_checkpointing,
    )
    if config.lora_rank:
        attach(model, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed)
    frozen = None
    if needs_frozen(config):
        frozen = load_model(config.model, dtype=dtype, device=config.device)[0]
        frozen.requires_grad_(False)
    prompter = Prompter(tokenizer, shots, config.system_prompt, config.instruction)
    kind = Grpo if config.method in GROUPS else Preference if config.method in PAIRS else Sft
    return kind(config, model, frozen, prompter, problems, reward, score_answers)


def needs_frozen(config: Train) -> bool:
    """Is the initial policy asked for when the weights have moved on, and no adapter to take off?

    Offline pairs get their reference's log-probs before the first step.
    """
    online = config.pairs_every and not config.refresh_reference
    online = online and config.preference not in REFERENCE_FREE
    return bool(online or config.kl_coef) and not config.lora_rank


def check_prompts(trainer: Learner, held_out: Sequence[Problem]) -> None:
    """Refuse, before any work, a question that does not fit the model's context."""
    c, prompter = trainer.config, trainer.prompter
    render = prompter.explain if c.explains else prompter.solve
    context = trainer.model.shape.context
    check = partial(check_length, new=c.max_completion_length, context=context)
    for problem in trainer.problems:
        check(problem, render(problem))
        for text in given_texts(c, prompter, problem):
            check_length(problem, prompter.solve(problem) + text, new=0, context=context)
    for problem in held_out:
        check(problem, prompter.solve(problem))


def given_texts(config: Train, prompter: Prompter, problem: Problem) -> Iterator[tuple[int, ...]]:
    """Token ids of what the data give and the method trains on."""
    if config.method in ("expert-grpo", "expert-dpo", "sft"):
        yield prompter.target(problem) if config.method == "sft" else prompter.expert(problem)
    if config.method == "dpo" and problem.pair:
        yield from map(prompter.completion, problem.pair)


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


def check_run_dir(config: Train) -> None:
    """Refuse a run directory that cannot be one, or that holds another run."""
    run_dir, record = config.run_dir, config.run_dir / "config.toml"
    there = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"--output-dir {run_dir}: {there} is a file, need a folder")
    if record.exists():
        if config.resume == "never":
            raise ValueError(f"{run_dir} already holds a run: choose another --output-dir")
        check_same_run(config, record)


def restore(config: Train, trainer: Learner) -> tuple[Path | None, int]:
    """Put the trainer where a checkpoint was: its path and step; None and 0 where there is none.

    That is the one which --resume names, or the newest valid one. No file is written.
    """
    if config.resume == "never":
        return None, 0
    if config.resume == "auto":
        loaded = checkpoint.load_newest(config.run_dir)
    else:
        loaded = checkpoint.load(Path(config.resume))
    if loaded is None:
        return None, 0
    path, values = loaded.path, loaded.values
    saved = None
    if not config.lora_rank:
        saved, _ = load_model(path, dtype=trainer.model.dtype, device=trainer.model.device)
        check_same_shape(config, trainer.model, saved, path)
    for what, value in identify(trainer).items():
        if values["identity"].get(what) != value:
            raise ValueError(f"{path} was made with other {what}: a resume needs the same")
    if saved is None:
        load_adapter(trainer.model, path)
    else:
        trainer.model.load_state_dict(saved.state_dict())
    trainer.load_state(loaded.tensors, values["trainer"])
    return path, values["step"]


def check_same_shape(config: Train, model: Decoder, saved: Decoder, path: Path) -> None:
    ours, theirs = asdict(model.shape), asdict(saved.shape)
    for name, value in ours.items():
        if theirs[name] != value:
            raise ValueError(
                f"{path} is of a model with {name}={theirs[name]}, {config.model} has {value}: "
                "a resume needs the --model that the checkpoint began with"
            )


def begin(config: Train, path: Path | None, start: int, log: RunLog) -> None:
    """Make the run directory's record that of a run with `start` steps done."""
    run_dir, record = config.run_dir, config.run_dir / "config.toml"
    if path is not None:
        log.note(f"resumed from {path}")
        checkpoint.set_aside_after(run_dir, start)
    elif (run_dir / "metrics.jsonl").exists():
        log.note("no whole checkpoint to resume from: the run starts again")
    text = dump_toml(config).encode()
    if not record.exists() or record.read_bytes() != text:
        replace_file(record, text)
    log.truncate_to(start or -1)  # a run from the start measures step 0 again
    if start >= config.steps:
        log.note(
            f"step {start} is done already: there is nothing to do up to --steps {config.steps}"
        )


def identify(trainer: Learner) -> dict[str, str]:
    """What a resumed run must share with the run it resumes."""
    return {
        "method": trainer.config.method,
        "initial weights": trainer.origin,
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
    trainer: Learner,
    held_out: Sequence[Problem],
    run_dir: Path,
    log: RunLog,
    start: int,
) -> None:
    """Steps start .. config.steps - 1, with what is measured and saved between them."""
    if start == 0 and config.eval_every:
        measure_accuracy(config, trainer, held_out, log, 0)
    for step in range(start, config.steps):
        done = step + 1
        try:
            row, texts = trainer.step(step)
        except ValueError as error:  # no longer the door: whoever mends it needs the traceback
            raise RuntimeError(f"step {done} failed") from error
        log.write_completions(done, texts)
        log.write_step(row)
        # weights that say nothing are not worth keeping
        dead = row.get("completions/error_ratio") == 1
        if trainer.broken:
            keep_broken(run_dir, done, trainer.broken, last=dead and done == config.steps)
        if is_due(done, config.eval_every, config.steps):
            measure_accuracy(config, trainer, held_out, log, done)
        if is_due(done, config.checkpoint_every, config.steps) and not dead:
            save(config, trainer, run_dir, done)
    for line in gain(run_dir, config):
        log.note(line)


def is_due(done: int, every: int, last: int) -> bool:
    return every > 0 and (done % every == 0 or done == last)


def measure_accuracy(
    config: Train, trainer: Learner, held_out: Sequence[Problem], log: RunLog, step: int
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


def keep_broken(run_dir: Path, step: int, in_a_row: int, *, last: bool) -> None:
    """Keep the batch of a broken step beside the run; stop after MAX_BROKEN in a row."""
    batch = run_dir / "completions" / f"step-{step}.jsonl"
    if batch.exists():
        (run_dir / "skipped").mkdir(exist_ok=True)
        shutil.copy(batch, run_dir / "skipped")
    if in_a_row >= MAX_BROKEN or last:
        raise RuntimeError(
            f"step {step}: a non-finite gradient, or non-finite logits in every completion (steps "
            f"in a row: {in_a_row}); the batches are in {run_dir / 'skipped'}. "
            "Lower --learning-rate, or use --dtype float32"
        )


def save(config: Train, trainer: Learner, run_dir: Path, step: int) -> None:
    tensors, values = trainer.state()
    model, tokenizer = trainer.model, trainer.prompter.tokenizer
    write = partial(save_model, model, tokenizer)
    if config.lora_rank:
        write = partial(save_adapter, model, tokenizer, base=str(find_model(config.model)))
    checkpoint.save(
        run_dir,
        step,
        write,
        tensors,
        {"step": step, "identity": identify(trainer), "trainer": values},
        keep=config.keep_checkpoints,
    )


def gain(run_dir: Path, config: Train) -> Iterator[str]:
    """Accuracy before and after, as the run's record has it, and where the model is."""
    record = run_dir / "evaluations.jsonl"
    lines = record.read_text().splitlines() if record.exists() else []
    rows = {row["step"]: row for row in map(json.loads, lines)}
    for name, row in (("before", rows.get(0)), ("after", rows.get(config.steps))):
        if row is not None:
            cells = [f"{name:<7}"]
            for k in dict.fromkeys((1, config.eval_samples)):
                low, high = row[f"pass@{k}/interval"]
                cells.append(f"pass@{k} {row[f'pass@{k}']:.3f} [{low:.3f}, {high:.3f}]")
            yield "  ".join([*cells, f"all samples fail: {row['all_fail']:.0%} of questions"])
    if model := checkpoint.newest(run_dir):
        yield f"model: {model}"


if __name__ == "__main__":
    sys.exit(run(main))
