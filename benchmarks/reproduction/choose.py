"""The questions: those of which the base model fails all samples, at the temperature of training.

Selection on failure regresses to the mean: among what failed 8 times are questions that it solves
one time in eight. So nothing is measured with the samples that selected; "before" is fresh ones.
"""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.reproduction.arms import Size, as_flags
from expo_fast.config import Train
from expo_fast.data.problems import Problem, load_problems
from expo_fast.reward import grader_hash
from expo_fast.storage.files import replace_file

SEED = 1000  # of the samples that select: no run's
SAMPLED = ("temperature", "shots", "max-completion-length")  # as in training


def choose(size: Size, folder: Path, split: str) -> None:
    """FOLDER/SPLIT.jsonl with the all-fail questions of the split; made once.

    SystemExit where the folder's were chosen in another way.
    """
    chosen, record = folder / f"{split}.jsonl", folder / "chosen.json"
    how = {"model": size.model, "train": size.train_sources, "eval": size.eval_sources}
    how |= {"train_candidates": size.train_candidates, "eval_candidates": size.eval_candidates}
    how |= {"tries": size.tries, "shots_from": size.shots_source} | sampled(size)
    how |= {"grader": grader_hash()}
    text = json.dumps(how, indent=1) + "\n"
    if record.exists() and record.read_text() != text:
        raise SystemExit(f"{record} says that other questions were chosen: take another --folder")
    if chosen.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(record, text.encode())
    sources = size.train_sources if split == "train" else size.eval_sources
    tried = size.train_candidates if split == "train" else size.eval_candidates
    both = zip(sources, tried, strict=True)
    rows = [row for source, n in both for row in failed(size, source, n, folder)]
    replace_file(chosen, "".join(json.dumps(row) + "\n" for row in rows).encode())


def failed(size: Size, source: str, n: int, folder: Path) -> list[dict[str, object]]:
    """Of n questions of the source those that fail in every round of tries."""
    rows = [as_row(p) for p in load_problems(source, limit=n)]
    asked, graded = folder / "asked.jsonl", folder / "graded.jsonl"
    for number, tries in enumerate(size.tries):
        replace_file(asked, "".join(json.dumps(row) + "\n" for row in rows).encode())
        command = [sys.executable, "-m", "expo_fast.evaluate", "--model", size.model]
        command += ["--data", str(asked), "--samples", str(tries), "--seed", str(SEED + number)]
        command += ["--shots-data", size.shots_source, "--output", str(graded)]
        subprocess.run([*command, *as_flags(sampled(size))], check=True)
        verdicts: dict[str, list[float | None]] = {}
        for row in map(json.loads, graded.read_text().splitlines()):
            verdicts.setdefault(row["id"], []).append(row["verdict"])
        lost = {key for key, each in verdicts.items() if 1.0 not in each}
        rows = [row for row in rows if row["id"] in lost]
        print(f"{source}: {len(rows)} of {n} fail {tries} more samples", flush=True)
    return rows


def sampled(size: Size) -> dict[str, object]:
    """How the size samples, its training's defaults included: evaluation has others."""
    defaults = Train()
    return {k: size.flags.get(k, getattr(defaults, k.replace("-", "_"))) for k in SAMPLED}


def as_row(p: Problem) -> dict[str, object]:
    return {
        "id": p.id,
        "prompt": p.prompt,
        "answer": p.answer,
        "solution": p.solution,
        "level": p.level,
    }
