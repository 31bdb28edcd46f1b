"""Preference pairs: how texts are paired, and the files that store the pairs.

    RUN/pairs/provenance.json   what the pairs were made from; another run's pairs are refused
    RUN/pairs/step-N.jsonl      the pairs of step N as token ids and as data rows of --method dpo
    RUN/pairs/step-N.json       metrics of their sampling, and the sha256 of the pairs; written once
                                the pairs are complete

The pairs of a step are made once, with the reference's log-probs. Training reads them from the
files, or from memory as long as a full disk does not take them.
"""

import hashlib
import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from expo_fast.data.chat_template import TokenIds
from expo_fast.data.problems import Problem
from expo_fast.data.prompts import Prompter
from expo_fast.storage.files import PatientFiles, replace_file

CHECKSUM = "sha256"  # key of step-N.json; pairs of older versions have none


@dataclass(frozen=True)
class Pair:
    """A chosen and a rejected completion of one prompt."""

    problem_id: str
    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds
    ref_logp: tuple[float, float] = (0.0, 0.0)
    """The reference's log-probs of chosen and rejected, summed over tokens, in nats."""


def pair_up(
    problem: Problem,
    prompter: Prompter,
    chosen: Sequence[TokenIds],
    rejected: Sequence[TokenIds],
    most: int,
) -> list[Pair]:
    """Return up to `most` pairs. No rejected text is in two pairs.

    chosen: best first. If they are fewer than the pairs, they are used again from the start.
    """
    if not chosen:
        return []
    prompt_ids = prompter.solve(problem)
    pairs = []
    for chosen_ids, rejected_ids in zip(itertools.cycle(chosen), rejected[:most], strict=False):
        pair = Pair(
            problem_id=problem.id,
            prompt_ids=prompt_ids,
            chosen_ids=tuple(chosen_ids),
            rejected_ids=tuple(rejected_ids),
        )
        pairs.append(pair)
    return pairs


@dataclass(frozen=True)
class PairStore:
    """The files of a run's pairs, by step (from 0)."""

    folder: Path
    provenance: Mapping[str, Any]  # JSON values
    files: PatientFiles = field(default_factory=PatientFiles)

    def recorded(self) -> Mapping[str, Any]:
        """Return what the pairs in the folder were made from."""
        record = self.folder / "provenance.json"
        return self._read_json(record) if record.exists() else self.provenance

    def check(self) -> None:
        """Raise ValueError if the folder holds the pairs of another run.

        Warn if another version of the grader judged the stored pairs.
        """
        record = self.folder / "provenance.json"
        found = self.recorded()
        for name, value in self.provenance.items():
            if found.get(name) == value:
                continue
            if name == "grader":
                # Any edit of the grader's source changes its hash, so this is not an error.
                warnings.warn(
                    f"{record} says grader={found.get(name)!r}, this run has {value!r}: another "
                    "version of the grader judged the stored pairs",
                    stacklevel=2,
                )
            else:
                raise ValueError(
                    f"{record} says {name}={found.get(name)!r}, this run has {value!r}: "
                    "choose another --output-dir"
                )

    def begin(self, start: int) -> None:
        """Prepare the folder for a run that continues at step `start`.

        Pairs sampled by the weights of a step after `start` are removed, and so are damaged ones of
        `start` itself. The run samples them again. Raise ValueError for damaged pairs that other
        weights sampled.
        """
        self.check()
        self.folder.mkdir(exist_ok=True)
        record = json.dumps(self.provenance, indent=1).encode() + b"\n"
        replace_file(self.folder / "provenance.json", record)
        for metrics in sorted(self.folder.glob("step-*.json")):
            if self._read_json(metrics)["pairs/policy_step"] > start:
                metrics.unlink()
                continue
            try:
                self._checked_pairs(metrics.with_suffix(".jsonl"), self._read_json(metrics))
            except ValueError as error:
                if self._read_json(metrics)["pairs/policy_step"] < start:
                    raise
                warnings.warn(f"{error}: the run samples them again", stacklevel=2)
                metrics.unlink()

    def has(self, step: int) -> bool:
        return self.files.exists(self._metrics_file(step))

    def count(self) -> int:
        """Return the number of consecutive steps, from step 0, that have pairs."""
        return next(step for step in itertools.count() if not self.has(step))

    def write(
        self,
        step: int,
        metrics: Mapping[str, Any],
        pairs: Sequence[Pair],
        texts: Sequence[Mapping[str, Any]],
    ) -> None:
        """Write the pairs of a step. Warn if the disk does not take them: they then wait in memory.

        metrics: JSON values, including `pairs/policy_step`.
        texts: one data row per pair.
        """
        lines = []
        for pair, text in zip(pairs, texts, strict=True):
            row = {**asdict(pair), **text}
            lines.append(json.dumps(row).encode() + b"\n")
        content = b"".join(lines)
        self._write(self._pairs_file(step), content)
        # Written last: its presence marks the pairs as complete.
        record = {**metrics, CHECKSUM: hashlib.sha256(content).hexdigest()}
        self._write(self._metrics_file(step), json.dumps(record).encode() + b"\n")

    def _write(self, path: Path, content: bytes) -> None:
        had_failed = self.files.waiting
        try:
            self.files.write(path, content)
        except OSError as error:
            if not had_failed:
                warnings.warn(
                    f"{path} could not be written ({error}): the pairs wait in memory, and are "
                    "written before the next checkpoint",
                    stacklevel=3,
                )

    def read(self, step: int) -> tuple[dict[str, Any], list[Pair]]:
        """Return the metrics and pairs that `write` stored. Raise ValueError if they changed."""
        metrics = self._read_json(self._metrics_file(step))
        pairs = []
        for row in self._checked_pairs(self._pairs_file(step), metrics):
            pair = Pair(
                problem_id=row["problem_id"],
                prompt_ids=tuple(row["prompt_ids"]),
                chosen_ids=tuple(row["chosen_ids"]),
                rejected_ids=tuple(row["rejected_ids"]),
                ref_logp=tuple(row["ref_logp"]),
            )
            pairs.append(pair)
        metrics.pop(CHECKSUM, None)
        return metrics, pairs

    def _read_json(self, path: Path) -> dict[str, Any]:
        return _parse(path, self.files.read(path))

    def _checked_pairs(self, path: Path, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the rows of a file of pairs. Raise ValueError if it has changed."""
        try:
            text = self.files.read(path)
        except (FileNotFoundError, UnicodeDecodeError) as error:
            raise ValueError(_damage(path, error)) from None
        found = hashlib.sha256(text.encode()).hexdigest()
        if metrics.get(CHECKSUM, found) != found:
            raise ValueError(_damage(path, "its sha256 differs from that of the pairs written"))
        return [_parse(path, line) for line in text.splitlines()]

    def _pairs_file(self, step: int) -> Path:
        return self.folder / f"step-{step + 1}.jsonl"

    def _metrics_file(self, step: int) -> Path:
        return self.folder / f"step-{step + 1}.json"


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(_damage(path, error)) from None


def _damage(path: Path, reason: object) -> str:
    return (
        f"{path} is damaged ({reason}), and the weights that sampled its pairs may be gone: copy "
        "it from a backup, or start again in another --output-dir"
    )
