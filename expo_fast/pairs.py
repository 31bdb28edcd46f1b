"""Preference pairs: which answers are compared, and their record on disk.

    RUN/pairs/provenance.json   what they were made from; another run's pairs are refused
    RUN/pairs/step-N.jsonl      the pairs of step N, which are training data of --method dpo too
    RUN/pairs/step-N.json       who sampled them, with which success; there once they are whole

A step's pairs are made once, with the reference's log-probs, and read from there ever after.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count, cycle
from pathlib import Path
from typing import Any

from expo_fast.log import replace_file
from expo_fast.prompts import Prompter
from expo_fast.tasks import Problem

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

    def begin(self, start: int) -> None:
        """Make the folder's record that of a run resumed at step `start`.

        Pairs sampled by later weights go: the resumed run samples them again. ValueError where the
        folder holds the pairs of another run.
        """
        self.folder.mkdir(exist_ok=True)
        record = self.folder / "provenance.json"
        made = json.loads(record.read_text()) if record.exists() else self.provenance
        for name, value in self.provenance.items():
            if made.get(name) != value:
                raise ValueError(
                    f"{record} says {name}={made.get(name)!r}, this run has {value!r}: "
                    "choose another --output-dir"
                )
        replace_file(record, json.dumps(self.provenance, indent=1).encode() + b"\n")
        for head in self.folder.glob("step-*.json"):
            if json.loads(head.read_text())["policy_step"] > start:
                head.unlink()

    def has(self, step: int) -> bool:
        return self._head(step).exists()

    def count(self) -> int:
        """Steps that have pairs, from the first one without a gap."""
        return next(step for step in count() if not self.has(step))

    def write(
        self,
        step: int,
        head: dict[str, Any],  # JSON values, `policy_step` among them
        pairs: Sequence[Pair],
        texts: Sequence[dict[str, Any]],  # one a pair: what a reader wants to see of it
    ) -> None:
        rows = [asdict(pair) | text for pair, text in zip(pairs, texts, strict=True)]
        replace_file(self._rows(step), b"".join(json.dumps(r).encode() + b"\n" for r in rows))
        replace_file(self._head(step), json.dumps(head).encode() + b"\n")

    def read(self, step: int) -> tuple[dict[str, Any], list[Pair]]:
        rows = map(json.loads, self._rows(step).read_text().splitlines())
        pairs = [
            Pair(
                r["problem_id"],
                *(tuple(r[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")),
                ref_logp=tuple(r["ref_logp"]),
            )
            for r in rows
        ]
        return json.loads(self._head(step).read_text()), pairs

    def _rows(self, step: int) -> Path:
        return self.folder / f"step-{step + 1}.jsonl"

    def _head(self, step: int) -> Path:
        return self.folder / f"step-{step + 1}.json"
