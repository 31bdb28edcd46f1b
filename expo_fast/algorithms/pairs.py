"""Preference pairs: which answers are compared, and their record on disk.

    RUN/pairs/provenance.json   what they were made from; another run's pairs are refused
    RUN/pairs/step-N.jsonl      the pairs of step N; training data of --method dpo too, as text
    RUN/pairs/step-N.json       who sampled them, with which success; there once they are whole

A step's pairs are made once, with the reference's log-probs, and read from there ever after.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count, cycle
from pathlib import Path
from typing import Any

from expo_fast.data.problems import Problem
from expo_fast.data.prompts import Prompter
from expo_fast.storage.files import replace_file

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt, the first preferred."""

    problem_id: str
    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    ref_logp: tuple[float, float] = (0.0, 0.0)  # of chosen and rejected, summed, nats


def pair_up(
    problem: Problem, prompter: Prompter, chosen: Sequence[Ids], rejected: Sequence[Ids], most: int
) -> list[Pair]:
    """Up to `most` pairs: each rejected answer in one, the chosen ones in turn, the best first."""
    if not chosen:
        return []
    both = zip(cycle(chosen), rejected[:most], strict=False)
    prompt = prompter.solve(problem)
    return [Pair(problem.id, prompt, tuple(better), tuple(worse)) for better, worse in both]


@dataclass(frozen=True)
class PairStore:
    """The pairs of one run, by step (from 0)."""

    folder: Path
    provenance: Mapping[str, Any]  # JSON values

    def check(self) -> None:
        """ValueError where the folder holds the pairs of another run."""
        record = self.folder / "provenance.json"
        made = _read_json(record) if record.exists() else self.provenance
        for name, value in self.provenance.items():
            if made.get(name) != value:
                raise ValueError(
                    f"{record} says {name}={made.get(name)!r}, this run has {value!r}: "
                    "choose another --output-dir"
                )

    def begin(self, start: int) -> None:
        """Make the folder's record that of a run resumed at step `start`.

        Pairs sampled by later weights go: the resumed run samples them again.
        """
        self.check()
        self.folder.mkdir(exist_ok=True)
        made = json.dumps(self.provenance, indent=1).encode() + b"\n"
        replace_file(self.folder / "provenance.json", made)
        for head in self.folder.glob("step-*.json"):
            if _read_json(head)["pairs/policy_step"] > start:
                head.unlink()

    def has(self, step: int) -> bool:
        return self._head(step).exists()

    def count(self) -> int:
        """Steps that have pairs, from the first one without a gap."""
        return next(step for step in count() if not self.has(step))

    def write(
        self,
        step: int,
        head: dict[str, Any],  # JSON values, `pairs/policy_step` among them
        pairs: Sequence[Pair],
        texts: Sequence[dict[str, Any]],  # one a pair: what a reader wants to see of it
    ) -> None:
        rows = [asdict(pair) | text for pair, text in zip(pairs, texts, strict=True)]
        replace_file(self._rows(step), b"".join(json.dumps(r).encode() + b"\n" for r in rows))
        replace_file(self._head(step), json.dumps(head).encode() + b"\n")

    def read(self, step: int) -> tuple[dict[str, Any], list[Pair]]:
        rows = _read_rows(self._rows(step))
        pairs = [
            Pair(
                r["problem_id"],
                *(tuple(r[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")),
                ref_logp=tuple(r["ref_logp"]),
            )
            for r in rows
        ]
        return _read_json(self._head(step)), pairs

    def _rows(self, step: int) -> Path:
        return self.folder / f"step-{step + 1}.jsonl"

    def _head(self, step: int) -> Path:
        return self.folder / f"step-{step + 1}.json"


def _read_json(path: Path) -> dict[str, Any]:
    (value,) = _read_rows(path, whole=True)
    return value


def _read_rows(path: Path, *, whole: bool = False) -> list[dict[str, Any]]:
    text = path.read_text()
    try:
        return [json.loads(part) for part in ([text] if whole else text.splitlines())]
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove its folder, and the run samples its pairs anew"
        ) from None
