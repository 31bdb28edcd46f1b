"""Resuming a training run: its directory, identity and checkpoints.

On a CPU, a resumed run is bit-identical to one that was never stopped. A run directory belongs to
one configuration: only the options in `config.ADJUSTABLE` and `config.ROUNDING` may change on a
resume, and the paths of files with the same contents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from expo_fast.algorithms.run_record import (
    ENDS_OF_TURNS,
    INITIAL_WEIGHTS,
    PROMPT_TEMPLATE,
    RECORD,
    TRAINING_DATA,
    copied_options,
    inexact_lines,
    options_of,
    read_record,
)
from expo_fast.algorithms.trainer import Trainer
from expo_fast.cli.flags import dump_toml
from expo_fast.config import (
    ADJUSTABLE,
    COMPARED_BY_CONTENT,
    DEPEND_ON_DATA,
    ROUNDING,
    Train,
)
from expo_fast.data.problems import fingerprint, same_fingerprint
from expo_fast.modeling.lora import load_adapter
from expo_fast.modeling.shape import Shape
from expo_fast.reporting.log_cursor import Cursor, damage_of
from expo_fast.reporting.run_log import METRICS, RunLog
from expo_fast.storage import checkpoint
from expo_fast.storage.files import replace_file
from expo_fast.storage.state_shards import read_shards
from expo_fast.weights import load_weights_into, stored_shape

STEPS = "number of steps"  # key of the identity of a run whose schedule depends on it


@dataclass(frozen=True)
class Restored:
    """Where a run continues. Without a path, it starts."""

    path: Path | None = None
    """The checkpoint."""
    step: int = 0
    """Number of complete steps."""
    cursors: Mapping[str, Cursor] = field(default_factory=dict)
    """How far the logs of the run had come at this step."""


def check_run_dir(config: Train) -> None:
    """Raise ValueError or OSError if the run directory holds another run or cannot be made."""
    run_dir = config.run_dir
    existing = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"--output-dir {run_dir}: {existing} is a file, need a folder")
    if run_dir.resolve() == Path(config.model).expanduser().resolve():
        raise ValueError(f"--output-dir {run_dir} is the folder of --model: choose another one")
    recorded = read_record(run_dir)
    if recorded is not None:
        if config.resume == "never":
            raise ValueError(f"{run_dir} already holds a run: choose another --output-dir")
        check_same_run(config, recorded.config)


def with_recorded_options(config: Train) -> Train:
    """Return the configuration with a value for each option whose default depends on the data.

    In the directory of a run, it is the value of RUN/config.toml, also if the run is older than the
    present defaults. So is the size of packs, if --pack-tokens is 0, and with --gather auto what
    the run gathers to sample.
    """
    recorded = read_record(config.run_dir)
    if recorded is not None:
        unset = [name for name in DEPEND_ON_DATA if getattr(config, name) is None]
        if config.pack_tokens == 0:
            unset.append("pack_tokens")
        if config.gather == "auto" and config.shard == "model":
            unset.append("gather")
        config = replace(config, **{name: getattr(recorded.config, name) for name in unset})
    return config.resolved()


def check_same_run(config: Train, recorded: Train) -> None:
    """Raise ValueError if the configuration differs from the recorded one in a fixed option."""
    may_differ = (*ADJUSTABLE, *ROUNDING)
    if checkpoint.newest_values(config.run_dir) is not None:
        # `check_checkpoint` compares contents. It cannot compare the base model of adapters.
        may_differ += COMPARED_BY_CONTENT
        if config.lora_rank:
            may_differ = tuple(name for name in may_differ if name != "model")
    for words in differing_options(config, recorded, may_differ).values():
        raise ValueError(f"{config.run_dir} holds a run with {words}: choose another --output-dir")


def differing_options(config: Train, recorded: Train, may_differ: Sequence[str]) -> dict[str, str]:
    """Return the options that differ from the recorded ones, with words, but for some of them."""
    old = asdict(recorded)
    new = asdict(config)
    differing = {}
    for name in old:
        if old[name] != new[name] and name not in may_differ:
            differing[name] = f"{name}={old[name]!r}, not {new[name]!r}"
    return differing


def names_checkpoint(config: Train) -> bool:
    """Return whether --resume is the path of a checkpoint."""
    return config.resume not in ("auto", "never")


def is_of_run(path: Path, config: Train) -> bool:
    """Return whether a checkpoint lies in the directory of the run."""
    return path.resolve().parent.parent == config.run_dir.resolve()


def restore(trainer: Trainer) -> Restored:
    """Restore the trainer from a checkpoint. No file is written.

    The checkpoint is the one that --resume names, or else the newest valid one.
    """
    world = trainer.world
    path = None
    with world.agreed():
        if world.is_main:
            path = find_checkpoint(trainer.config)
    path = world.broadcast(path)
    if path is None:
        with world.agreed():
            check_restart(trainer.config)
        return Restored()
    with world.agreed():
        values = check_checkpoint(trainer, path)
        load_model_of(trainer, path)
    trainer.layout.take()
    tensors = read_state(trainer, path, values["trainer"])
    trainer.load_state(tensors, values["trainer"])
    return Restored(path, values["step"], cursors_of(values, trainer.config, path))


def check_restart(config: Train) -> None:
    """Raise ValueError if a run that starts again at step 0 has other data or another model."""
    recorded = read_record(config.run_dir)
    if recorded is None:
        return
    may_differ = (*ADJUSTABLE, *ROUNDING)
    for words in differing_options(config, recorded.config, may_differ).values():
        raise ValueError(
            f"{config.run_dir} holds a run with {words}, and no checkpoint to resume from: choose "
            "another --output-dir"
        )


def find_checkpoint(config: Train) -> Path | None:
    """Return the checkpoint to resume from, None if there is none. Its files have been hashed."""
    if config.resume == "never":
        return None
    if config.resume == "auto":
        return checkpoint.newest_to_resume(config.run_dir)
    path = Path(config.resume)
    if path.is_dir():
        checkpoint.check_kind(path)
    own = None if is_of_run(path, config) else checkpoint.newest_values(config.run_dir)
    if own is not None:
        # Schedulers repeat the command of a branch that was stopped.
        origin = origin_of(own)
        if origin is None or not origin.is_at(path):
            raise ValueError(
                f"{config.run_dir} holds a run that did not begin at {path}: choose another "
                "--output-dir"
            )
        newest = checkpoint.newest_to_resume(config.run_dir)
        if newest is not None:
            return newest
    return checkpoint.checked(path)


def origin_of(values: Mapping[str, Any]) -> checkpoint.Origin | None:
    """Return where the run began whose checkpoint has these JSON values."""
    origin = values.get("origin")  # earlier versions did not record it
    return None if origin is None else checkpoint.Origin(**origin)


def check_checkpoint(trainer: Trainer, path: Path) -> dict[str, Any]:
    """Return the JSON values of a checkpoint, and note in the trainer how the run differs.

    Raise ValueError if the checkpoint is not of this run. With --inexact-resume, only differences
    with which no resume makes sense are errors.
    """
    config = trainer.config
    values = checkpoint.read_values(path)
    if (path / "config.json").exists():  # a LoRA checkpoint has none
        check_same_shape(config, trainer.model.shape, path)
    differing = differences(trainer, values)
    advice = "restore it, choose another --output-dir"
    if not is_of_run(path, config):
        advice = "give the same options and data"
        copy = copied_options(values, path)
        if copy is not None:
            may_differ = (*ADJUSTABLE, *ROUNDING, *COMPARED_BY_CONTENT, "method")
            differing |= differing_options(config, copy, may_differ)
    for what in ("method", INITIAL_WEIGHTS):
        if what in differing:
            raise ValueError(f"{path} was made with {differing[what]}: a resume needs the same")
    damages = {}
    if values["step"] < config.steps:  # else no row follows
        for name, cursor in cursors_of(values, config, path).items():
            damage = damage_of(config.run_dir / name, cursor, values["step"])
            if damage is not None:
                damages[name] = damage
    if (differing or damages) and not config.inexact_resume:
        sentences = [f"{config.run_dir / name} {damage}" for name, damage in damages.items()]
        if differing:
            sentences.append(f"{path} was made with {' and '.join(differing.values())}")
        raise ValueError(
            f"{'; '.join(sentences)}: a resume needs the same; {advice}, or mark the run as "
            "inexact with --inexact-resume"
        )
    reasons = [f"with {words}" for words in differing.values()]
    reasons += [f"although {name} {damage}" for name, damage in damages.items()]
    if is_of_run(path, config):
        trainer.origin = origin_of(values)
    else:
        trainer.origin = checkpoint.Origin.at(path, values["step"])
    trainer.inexact = list(values.get("inexact", []))
    trainer.inexact += [f"resumed from step {values['step']} {reason}" for reason in reasons]
    return values


def differences(trainer: Trainer, values: dict[str, Any]) -> dict[str, str]:
    """Return what the checkpoint with these JSON values was made with otherwise, with words."""
    recorded = values["identity"]
    if STEPS not in recorded:  # a checkpoint of an earlier version
        record = read_record(trainer.config.run_dir)
        if record is not None and record.damage is None:
            recorded = recorded | {STEPS: str(record.config.steps)}
    differing = {}
    for what, value in identity(trainer).items():
        # An earlier version did not record everything, and some runs have no evaluation data.
        theirs = recorded.get(what, value)
        same = theirs == value
        if what == TRAINING_DATA:
            same = same_fingerprint(trainer.problems, theirs)
        if what == STEPS and values["step"] >= trainer.config.steps:
            same = True  # no step follows
        if not same:
            differing[what] = f"other {what}"
            if what == STEPS:
                differing[what] = f"--steps {theirs}, not {value}, which its schedule depends on"
    return differing


def cursors_of(values: dict[str, Any], config: Train, path: Path) -> dict[str, Cursor]:
    """Return how far the logs of the run had come at a checkpoint.

    There is none in a checkpoint of an earlier version, and none of the checkpoint of another run.
    """
    if not is_of_run(path, config):
        return {}
    return {name: Cursor(**cursor) for name, cursor in values.get("logs", {}).items()}


def values_to_save(
    trainer: Trainer, step: int, state: dict[str, Any], cursors: Mapping[str, Cursor]
) -> dict[str, Any]:
    """Return the JSON values of a checkpoint, which `check_checkpoint` reads.

    state: the JSON values of `Trainer.state`.
    """
    return {
        "step": step,
        "identity": identity(trainer),
        "options": options_of(trainer.config),
        "logs": {name: asdict(cursor) for name, cursor in cursors.items()},
        "inexact": trainer.inexact,
        "origin": None if trainer.origin is None else asdict(trainer.origin),
        "trainer": state,
    }


def load_model_of(trainer: Trainer, path: Path) -> None:
    """Load the weights of a checkpoint, or its adapter."""
    if trainer.config.lora_rank:
        load_adapter(trainer.model, path)
    else:
        load_weights_into(trainer.model, path)


def read_state(trainer: Trainer, path: Path, values: dict[str, Any]) -> dict[str, Tensor]:
    """Return the optimizer's tensors of a checkpoint, of which a rank reads its own parts."""
    if trainer.world.size == 1:
        return checkpoint.read_tensors(path)
    tensors = trainer.optimizer.state_to_fill(values["optimizer"])
    read_shards(path / checkpoint.STATE_FOLDER, tensors)
    return tensors


def check_same_shape(config: Train, shape: Shape, path: Path) -> None:
    """Raise ValueError if the checkpoint is of a model with another shape."""
    ours = asdict(shape)
    theirs = asdict(stored_shape(path))
    for name, value in ours.items():
        if theirs[name] != value:
            raise ValueError(
                f"{path} is of a model with {name}={theirs[name]}, {config.model} has {value}: "
                "a resume needs the --model of the original run"
            )


def identity(trainer: Trainer) -> dict[str, str]:
    """Return the values that must be the same in a resumed run and in the original run."""
    values = {
        "method": trainer.config.method,
        INITIAL_WEIGHTS: trainer.initial_weights_hash,
        TRAINING_DATA: fingerprint(trainer.problems),
        PROMPT_TEMPLATE: trainer.prompter.template_hash,
        ENDS_OF_TURNS: trainer.prompter.ends_hash,
    }
    if trainer.held_out:
        values["evaluation data"] = fingerprint(trainer.held_out)
    if trainer.reward_source is not None:
        values["reward functions"] = trainer.reward_source
    if trainer.config.depends_on_steps:
        values[STEPS] = str(trainer.config.steps)
    return values


def begin_record(trainer: Trainer, restored: Restored, log: RunLog) -> None:
    """Write the run's configuration, and cut the logs back to the steps that are restored."""
    config = trainer.config
    run_dir = config.run_dir
    start = restored.step
    recorded = read_record(run_dir)
    if recorded is not None and recorded.damage is not None:
        log.note(f"warning: {recorded.damage}: it is written again")
    if restored.path is not None:
        log.note(f"resumed from {restored.path}")
        checkpoint.set_aside_after(run_dir, start)
    elif (run_dir / METRICS).exists():
        log.note("no complete checkpoint to resume from: the run starts again at step 0")
    for reason in trainer.inexact:
        log.note(f"warning: the run is inexact: {reason}")
    record = run_dir / RECORD
    options = dump_toml(config, leave_out=("inexact_resume",))  # for this resume only
    text = (options + inexact_lines(trainer.inexact)).encode()
    if not record.exists() or record.read_bytes() != text:
        replace_file(record, text)
    cursors = {}
    for name, cursor in restored.cursors.items():
        if damage_of(run_dir / name, cursor, start) is None:
            cursors[name] = cursor
    log.truncate_to(start or -1, cursors)  # a run that starts again evaluates step 0 again
    if start >= config.steps:
        log.note(
            f"step {start} is already done: there is nothing to do up to --steps {config.steps}"
        )
