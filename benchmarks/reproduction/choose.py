"""Choose the questions of which the base model fails all samples at the temperature of training.

A selection by failure regresses to the mean: some of the questions that failed 8 times are
questions that the model solves one time in eight. Therefore the samples that select are not used to
measure anything. The "before" figures come from fresh samples.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.reproduction.arms import Size, as_flags
from expo_fast.data.problems import Problem, load_problems
from expo_fast.reward import grader_hash
from expo_fast.storage.files import replace_file

SEED = 1000  # seed of the samples that select; no run has it
# The options that are the same as in training. Each size has them.
SAMPLED = ("temperature", "shots", "max-completion-length")

Row = dict[str, object]


def choose(size: Size, folder: Path, split: str) -> None:
    """Write the all-fail questions of a split to FOLDER/SPLIT.jsonl, unless the file exists.

    Raise SystemExit if the questions of the folder were chosen with other settings.
    """
    chosen = folder / f"{split}.jsonl"
    record = folder / "chosen.json"
    settings = {
        "model": size.model,
        "train": size.train_sources,
        "eval": size.eval_sources,
        "train_candidates": size.train_candidates,
        "eval_candidates": size.eval_candidates,
        "tries": size.tries,
        "shots_from": size.shots_source,
        **sampling_options(size),
        "grader": grader_hash(),
    }
    text = json.dumps(settings, indent=1) + "\n"
    if record.exists() and record.read_text() != text:
        raise SystemExit(
            f"{record}: these questions were chosen with other settings: take another --folder"
        )
    if chosen.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(record, text.encode())
    sources = size.train_sources if split == "train" else size.eval_sources
    tried = size.train_candidates if split == "train" else size.eval_candidates
    rows: list[Row] = []
    for source, n in zip(sources, tried, strict=True):
        rows += all_fail_questions(size, source, n, folder)
    write_rows(chosen, rows)


def all_fail_questions(size: Size, source: str, n: int, folder: Path) -> list[Row]:
    """Return those of the first n questions of a source that fail in every round of tries."""
    rows = [as_row(problem) for problem in load_problems(source, limit=n)]
    asked = folder / "asked.jsonl"
    graded = folder / "graded.jsonl"
    for round_number, tries in enumerate(size.tries):
        write_rows(asked, rows)
        flags: dict[str, object] = {
            "model": size.model,
            "data": asked,
            "samples": tries,
            "seed": SEED + round_number,
            "shots-data": size.shots_source,
            "output": graded,
            **sampling_options(size),
        }
        subprocess.run([sys.executable, "-m", "expo_fast.evaluate", *as_flags(flags)], check=True)
        verdicts: dict[str, list[float | None]] = {}
        for line in graded.read_text().splitlines():
            row = json.loads(line)
            verdicts.setdefault(row["id"], []).append(row["verdict"])
        all_fail = {key for key, of_samples in verdicts.items() if 1.0 not in of_samples}
        rows = [row for row in rows if row["id"] in all_fail]
        print(f"{source}: {len(rows)} of {n} fail {tries} more samples", flush=True)
    return rows


def sampling_options(size: Size) -> dict[str, object]:
    """Return the sampling options of training, which has other defaults than evaluation."""
    return {flag: size.flags[flag] for flag in SAMPLED}


def as_row(problem: Problem) -> Row:
    """Return a problem as a row of a data file."""
    return {
        "id": problem.id,
        "prompt": problem.prompt,
        "answer": problem.answer,
        "solution": problem.solution,
        "level": problem.level,
    }


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a JSON Lines file."""
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
