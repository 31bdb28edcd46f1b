"""Which checkpoint of a run is the best: by its evaluation, or else by the reward before it.

The scores follow from the logs, so a resumed run has those of the run before.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from expo_fast.reporting.jsonl import read_rows
from expo_fast.reporting.run_log import EVALUATIONS, METRICS

ACCURACY = "pass@1"


class Scores:
    """The scores of the steps of a run.

    The score of a step is the accuracy that an evaluation found after it. In a run without
    evaluations it is the mean reward of the last `window` steps up to it, because the rewards of
    one step are those of few questions.
    """

    def __init__(self, run_dir: Path, *, evaluates: bool, window: int):
        self._evaluates = evaluates
        self._window = window
        self._accuracies: dict[int, float] = {}
        self._rewards: dict[int, float] = {}
        self.evaluated: set[int] = set()
        """The steps after which there was an evaluation."""
        for row in read_rows(run_dir / EVALUATIONS):
            self.add_evaluation(row)
        for row in read_rows(run_dir / METRICS):
            self.add_step(row)

    @property
    def name(self) -> str:
        """What the scores are."""
        return ACCURACY if self._evaluates else "mean reward"

    def add_evaluation(self, row: dict[str, Any]) -> bool:
        """Add an evaluation. Return whether no evaluation after a step was as good before."""
        step = row["step"]
        self.evaluated.add(step)
        accuracy = row.get(ACCURACY)
        if accuracy is None or step == 0:
            return False
        is_best = accuracy > max(self._accuracies.values(), default=-1.0)
        self._accuracies[step] = accuracy
        return is_best

    def add_step(self, row: dict[str, Any]) -> None:
        """Add the metrics of a step."""
        reward = row.get("reward")
        if reward is not None:
            self._rewards[row["step"]] = reward

    def of(self, step: int) -> float | None:
        """Return the score of a step, None if it has none."""
        if self._evaluates:
            return self._accuracies.get(step)
        first = max(1, step - self._window + 1)
        rewards = [self._rewards[each] for each in range(first, step + 1) if each in self._rewards]
        return sum(rewards) / len(rewards) if rewards else None

    def best(self, steps: Iterable[int], n: int) -> list[int]:
        """Return the `n` steps with the highest scores, the best first.

        Of equal scores, the later step is better. Steps without a score are left out.
        """
        scored = []
        for step in steps:
            score = self.of(step)
            if score is not None:
                scored.append((score, step))
        scored.sort(reverse=True)
        return [step for _, step in scored[:n]]
