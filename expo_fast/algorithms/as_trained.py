"""The record of a run for the evaluation of its model: prompts as in training."""

from dataclasses import dataclass, replace
from pathlib import Path

from expo_fast.algorithms.run_record import PROMPT_TEMPLATE, Recorded, read_record
from expo_fast.algorithms.training_data import TrainingData, select_problems
from expo_fast.config import Evaluate, Train
from expo_fast.data.problems import without
from expo_fast.storage import checkpoint

# The options of prompts, which the record of a run sets in an evaluation.
PROMPT_OPTIONS = (
    "shots",
    "shots_data",
    "system_prompt",
    "instruction",
    "escape_special_tokens",
    "levels",
    "columns",
    "max_completion_length",
)


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint of a run, with the run's record."""

    checkpoint: Path
    run_dir: Path
    config: Train
    damage: str | None = None
    """Why the configuration is that of the copy in the newest checkpoint, in words."""

    @classmethod
    def of(cls, path: Path, run_dir: Path, recorded: Recorded) -> "TrainedModel":
        """Return a checkpoint with the record, in which every option has a value."""
        return cls(path, run_dir, recorded.config.resolved(), recorded.damage)

    @property
    def template_hash(self) -> str | None:
        """The hash of the prompts of training, None if the checkpoint has none that is readable."""
        try:
            values = checkpoint.read_values(self.checkpoint)
        except (FileNotFoundError, ValueError):  # a part of it, or of a newer format
            return None
        return values.get("identity", {}).get(PROMPT_TEMPLATE)


def find_trained(model: str) -> TrainedModel | None:
    """Return the checkpoint and record if `model` is a run directory or a checkpoint in one.

    Of a run directory, take the newest undamaged checkpoint. Return None for another model. Raise
    ValueError if a run directory has no checkpoint, or if its record is damaged and no checkpoint
    has a copy of it.
    """
    path = Path(model).expanduser()
    recorded = read_record(path)
    if recorded is not None:
        newest = checkpoint.newest(path)
        if newest is None:
            raise ValueError(
                f"--model {model}: the run has no complete checkpoint: resume it, or name a model"
            )
        return TrainedModel.of(newest, path, recorded)
    folder = path.resolve().parent
    if folder.name != "checkpoints":
        return None
    recorded = read_record(folder.parent)
    return None if recorded is None else TrainedModel.of(path, folder.parent, recorded)


def with_record(config: Evaluate, trained: TrainedModel) -> Evaluate:
    """Return the options of an evaluation, with those of the record for options without a flag."""
    unset = [name for name in PROMPT_OPTIONS if is_unset(config, name)]
    values = {name: getattr(trained.config, name) for name in unset}
    return replace(config, model=str(trained.checkpoint), **values)


def is_unset(config: Evaluate, name: str) -> bool:
    """Return whether an option was not given."""
    value = getattr(config, name)
    return value is None or (name in ("columns", "escape_special_tokens") and not value)


def difference(config: Evaluate, trained: TrainedModel) -> str | None:
    """Return a line about the options that differ from the record, None if there are none.

    The dtype is one of them. It is not taken from the record, but changes results too.
    """
    differing = []
    for name in (*PROMPT_OPTIONS, "dtype"):
        ours = getattr(config, name)
        theirs = getattr(trained.config, name)
        if ours != theirs and (ours or theirs):  # an empty system prompt is none
            differing.append(f"{name}={ours!r} (in training {theirs!r})")
    if not differing:
        return None
    return f"evaluated otherwise than trained in {trained.run_dir}: {', '.join(differing)}"


def problems_of_run(config: Evaluate, trained: TrainedModel) -> TrainingData:
    """Return the data of the run, with the number of shots and the levels of the evaluation.

    The shots are of the levels of the run. No held-out problem is one that the run trains on.
    Raise ValueError if the data cannot be read.
    """
    asked = replace(
        trained.config,
        shots=config.shots,
        shots_data=config.shots_data,
        columns=config.columns,
    )
    data = select_problems(asked)
    if config.levels == trained.config.levels:
        return data
    # The limit may hold out more problems of these levels than it does of all levels.
    of_levels = select_problems(replace(asked, levels=config.levels))
    return replace(data, held_out=without(of_levels.held_out, data.problems))
