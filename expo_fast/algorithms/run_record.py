"""The options that a run was begun with: RUN/config.toml, and a copy in each checkpoint.

The copy has the options that may not change on a resume. It replaces a damaged config.toml.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expo_fast.cli.flags import dump_toml, from_toml, from_toml_text
from expo_fast.config import ADJUSTABLE, COMPARED_BY_CONTENT, ROUNDING, Train
from expo_fast.reporting.runs import INEXACT
from expo_fast.storage import checkpoint

RECORD = "config.toml"
OPTIONS = "options"  # key of the copy among the JSON values of a checkpoint

# Keys of the identity of a run among these values. The ranks of a run compare the same values.
INITIAL_WEIGHTS = "initial weights"
TRAINING_DATA = "training data"
PROMPT_TEMPLATE = "prompt template"
ENDS_OF_TURNS = "ends of turns"


@dataclass(frozen=True)
class Recorded:
    """The recorded options of a run. They may lack those that may change on a resume."""

    config: Train
    damage: str | None = None
    """Why they are those of the copy, in words. None: they are those of config.toml."""


def options_of(config: Train) -> str:
    """Return the options that a checkpoint has a copy of, as TOML."""
    return dump_toml(config, leave_out=ADJUSTABLE)


def _fixed_options(config: Train) -> str:
    """Return the options that a resume compares by their values, as TOML."""
    return dump_toml(config, leave_out=(*ADJUSTABLE, *ROUNDING, *COMPARED_BY_CONTENT))


def inexact_lines(reasons: Sequence[str]) -> str:
    """Return the comments of config.toml that mark a run as inexact."""
    return "".join(f"{INEXACT}{reason}\n" for reason in reasons)


def read_record(run_dir: Path) -> Recorded | None:
    """Return the recorded options of a run, None if the folder has neither record nor copy.

    Raise ValueError if the record is damaged, and no checkpoint has a copy of it.
    """
    record = run_dir / RECORD
    values = checkpoint.newest_values(run_dir)
    copy = None if values is None else copied_options(values, run_dir / "checkpoints")
    if not record.is_file():
        if copy is None:
            return None
        return Recorded(copy, f"{record} is missing")
    try:
        config = from_toml(Train, record)
    except ValueError as error:
        if copy is not None:
            return Recorded(copy, str(error))
        if values is None:
            advice = "remove it: the run has no checkpoint and starts again"
        else:
            advice = "copy it from a backup, or choose another --output-dir"
        raise ValueError(f"{error}; {advice}") from None
    if copy is not None and _fixed_options(config) != _fixed_options(copy):
        return Recorded(copy, f"{record} differs from the copy in the newest checkpoint")
    return Recorded(config)


def copied_options(values: Mapping[str, Any], source: Path) -> Train | None:
    """Return the options in the JSON values of a checkpoint. Earlier versions saved none.

    Return None for options that this version cannot read, such as those of a later version.

    source: the path that errors name.
    """
    if OPTIONS not in values:
        return None
    try:
        return from_toml_text(Train, values[OPTIONS], source)
    except ValueError:
        return None
