"""Small training runs: their files, their flags and their rows, and a trainer without a run."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from expo_fast.algorithms.trainer import Trainer
from expo_fast.config import Train
from expo_fast.modeling.layout import Layout


def write_rows(file: Path, rows: Iterable[Any]) -> None:
    """Write a JSON Lines file, as data and logs are."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_in(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON Lines file. Raise ValueError for a damaged line."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Return the rows that a run has logged, one for each step."""
    return rows_in(run / "metrics.jsonl")


def without_times(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows without the columns that differ between two equal runs."""
    return [
        {name: x for name, x in row.items() if name != "seconds" and not name.startswith("time/")}
        for row in rows
    ]


def run_flags(folder: Path, run: Path, **changes: object) -> list[str]:
    """Return the flags of a small training run.

    folder: holds a model, train.jsonl, and rewards.py with a reward named odd.
    changes: values of other flags, or instead of the values here. prompts_per_step=3 is
    `--prompts-per-step 3`.
    """
    given: dict[str, object] = {
        "model": folder / "model",
        "train_data": folder / "train.jsonl",
        "reward": f"{folder / 'rewards.py'}:odd",
        "output_dir": run,
        "prompts_per_step": 2,
        "num_generations": 3,
        "max_completion_length": 8,
        "shots": 0,
        "learning_rate": 1e-3,
        "dtype": "float32",
    }
    words: list[str] = []
    for name, value in (given | changes).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def trainer_of(config: Train, model: Any, prompter: Any, **parts: Any) -> Trainer:
    """Return a trainer that has only the parts that a test needs. The others are absent."""
    absent: dict[str, Any] = {
        "reference": None,
        "problems": [],
        "reward": None,
        "verify": None,
        "generator": None,
        "make_optimizer": None,
        "merged_copy": None,
        "layout": Layout(model),
        "initial_weights_hash": "",
    }
    return Trainer(config=config, model=model, prompter=prompter, **(absent | parts))
