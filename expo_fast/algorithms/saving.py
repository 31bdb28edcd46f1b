"""When a run writes checkpoints, and what happens if one cannot be written.

A failed save is not the end of a run. It is tried again after 1, 2, 4, ... steps. After the last
step the run waits for the disk, because its weights would be lost.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from expo_fast.algorithms.alarms import has_no_finite_logits
from expo_fast.algorithms.resume import values_to_save
from expo_fast.algorithms.saved_model import model_writer
from expo_fast.algorithms.scores import Scores
from expo_fast.algorithms.trainer import Trainer
from expo_fast.reporting.run_log import RunLog
from expo_fast.runtime import interruptions
from expo_fast.runtime.endings import Collapsed
from expo_fast.storage import checkpoint
from expo_fast.storage.finite import first_non_finite
from expo_fast.storage.state_shards import write_shards

FIRST_WAIT_S = 1.0  # after the last step; each wait is twice the one before
LONGEST_WAIT_S = 60.0
LEAST_WINDOW = 8  # steps whose mean reward is the score of a checkpoint
POLL_S = 0.2  # how often a wait looks at signals


@dataclass(frozen=True)
class BestCheckpoint:
    """The checkpoint with the best score."""

    path: Path
    score_name: str
    score: float

    def __str__(self) -> str:
        return f"{self.path} ({self.score_name} {self.score:.3f})"


class Saver:
    """The checkpoints of a run."""

    def __init__(self, trainer: Trainer, log: RunLog):
        config = trainer.config
        self._trainer = trainer
        self._log = log
        self._n_failures = 0  # in a row
        self._retry_at: int | None = None  # step of the next attempt after a failure
        self._fault: str | None = None  # of the last step, which is not saved then
        self.scores = Scores(
            config.run_dir,
            evaluates=trainer.eval_every > 0,
            window=max(LEAST_WINDOW, config.checkpoint_every),
        )

    def read_step(self, row: dict[str, Any]) -> None:
        """Read the metrics of a step. Call it after each step."""
        self.scores.add_step(row)
        self._fault = None
        if has_no_finite_logits(row):
            self._fault = "no completion has finite logits"

    def after_step(self, step: int, *, is_due: bool) -> bool:
        """Save the state after a step if that is due, or if an earlier save failed.

        Return whether it was saved. Warn if that fails. The run goes on.
        """
        if not is_due and (self._retry_at is None or step < self._retry_at):
            return False
        self._log.flush()
        fault = self._non_finite()
        if fault is not None:
            self._log.note(f"warning: step {step} is not saved: {fault}")
            return False
        try:
            self._save(step)
        except OSError as error:
            wait = 2**self._n_failures
            self._n_failures += 1
            self._retry_at = step + wait
            self._log.note(f"warning: {error}; the run goes on, next attempt after {wait} steps")
            return False
        return True

    def after_last_step(self, step: int) -> None:
        """Save the state after the last step, and wait up to `save_patience` if that fails.

        Raise OSError if it failed for that long, and Collapsed if the weights are not finite.
        """
        fault = self._non_finite()
        if fault is not None:
            raise Collapsed(f"step {step} is not saved: {fault}; {self.newest_in_words()}")
        patience = self._trainer.config.save_patience
        world = self._trainer.world
        deadline = time.monotonic() + patience
        wait = FIRST_WAIT_S
        while True:
            is_full = world.broadcast(self._log.flush())
            error: OSError | None = None
            try:
                self._save(step)
            except OSError as failure:
                error = failure
            if error is None and not is_full:
                return
            left = world.broadcast(deadline - time.monotonic())
            if left <= 0:
                if error is None:
                    return  # the log tells what it lacks
                raise OSError(f"{error}; given up after --save-patience {patience:g} s") from error
            if wait == FIRST_WAIT_S:
                reason = error or "the log could not be written, because the disk is full"
                self._log.note(f"warning: {reason}; trying again for {patience:g} s")
            _sleep(min(wait, left))
            wait = min(2 * wait, LONGEST_WAIT_S)

    def at_stop(self, cause: str) -> str:
        """Save the last step boundary of a run that ends in a step. Return how the run goes on.

        cause: what ends the run: a signal, or an error before the step's first update.
        """
        trainer = self._trainer
        step = trainer.return_to_boundary()
        self._log.flush()
        if step == 0:
            return f"{cause} before the end of step 1: the same command starts the run again"
        problem = self._non_finite()
        if trainer.config.checkpoint_every == 0:
            problem = "--checkpoint-every 0"
        if problem is None:
            try:
                self._save(step)
            except OSError as error:
                problem = str(error)
        if problem is None:
            return f"{cause}: step {step} is saved, the same command resumes the run from it"
        return f"{cause}: step {step} is not saved: {problem}; {self.newest_in_words()}"

    def best(self) -> BestCheckpoint | None:
        """Return the best checkpoint, None if there is none with a score."""
        run_dir = self._trainer.config.run_dir
        best = self.scores.best(checkpoint.complete_steps(run_dir), 1)
        if not best:
            return None
        score = self.scores.of(best[0])
        assert score is not None
        path = run_dir / "checkpoints" / f"step-{best[0]}"
        return BestCheckpoint(path, self.scores.name, score)

    def newest_in_words(self) -> str:
        """Return which checkpoint the same command resumes from."""
        newest = checkpoint.newest(self._trainer.config.run_dir)
        if newest is None:
            return "there is no checkpoint, the same command starts the run again"
        return f"the same command resumes the run from {newest}"

    def _save(self, step: int) -> None:
        """Write a checkpoint. Raise OSError if that fails."""
        trainer = self._trainer
        world = trainer.world
        world.enter("save")
        tensors, values = trainer.state()
        shards = None
        if world.size > 1:
            shards = write_state_shards(trainer, step, tensors)
        write_model = model_writer(trainer, trainer.layout.model_to_write())
        with world.agreed(shared=OSError):
            if world.is_main:
                self._write(step, write_model, tensors, values, shards)
        self._n_failures = 0
        self._retry_at = None

    def _write(
        self,
        step: int,
        write_model: Callable[[Path], None],
        tensors: dict[str, Tensor],
        values: dict[str, Any],
        shards: Path | None,
    ) -> None:
        trainer = self._trainer
        config = trainer.config
        if trainer.pair_store is not None:
            trainer.pair_store.files.flush()  # a round of pairs cannot be made again later
        steps = {*checkpoint.complete_steps(config.run_dir), step}
        checkpoint.save(
            config.run_dir,
            step,
            write_model,
            tensors,
            values_to_save(trainer, step, values, self._log.cursors(step)),
            keep=config.keep_checkpoints,
            keep_steps=self.scores.best(steps, config.keep_best),
            shards=shards,
        )

    def _non_finite(self) -> str | None:
        """Return which numbers of the model are not finite, in words, None if all are finite."""
        if self._fault is not None:
            return self._fault
        trainer = self._trainer
        name = first_non_finite(trainer.model.named_parameters())
        name = name or first_non_finite(trainer.optimizer.masters())  # of this rank
        name = next(filter(None, trainer.world.exchange(name)), None)
        return None if name is None else f"{name} has values that are not finite"


def write_state_shards(trainer: Trainer, step: int, tensors: dict[str, Tensor]) -> Path:
    """Write the parts of the optimizer's state of each rank into a temporary folder of the run.

    Raise OSError on all ranks if the disk does not take those of one.
    """
    folder = trainer.config.run_dir / "checkpoints" / f".state-step-{step}"
    with trainer.world.agreed(shared=OSError):
        if trainer.world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
    with trainer.world.agreed(shared=OSError):
        write_shards(folder, tensors)
    return folder


def _sleep(seconds: float) -> None:
    """Wait. Raise Stopped as soon as a signal arrives."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        interruptions.check()
        time.sleep(min(POLL_S, left))
