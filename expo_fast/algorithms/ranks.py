"""The folder of a distributed run, and how long its ranks wait for each other."""

import resource
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch

from expo_fast.algorithms.metrics import Metrics
from expo_fast.distributed.world import World
from expo_fast.storage.files import replace_file

GB = 1e9
SECONDS_TO_APPEAR = 30.0  # of a file of one machine on another one, over a slow network disk


def check_shared_folder(world: World, run_dir: Path) -> None:
    """Raise ValueError on all ranks if a rank does not see the run directory of rank 0.

    All ranks write their parts of a checkpoint into it.
    """
    if world.size == 1:
        return
    token = world.broadcast(uuid.uuid4().hex)
    mark = run_dir / f".shared-{token}"
    made: list[Path] = []
    with world.agreed():
        if world.is_main:
            made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
            run_dir.mkdir(parents=True, exist_ok=True)
            replace_file(mark, b"")
    sees = world.exchange(appears(mark))
    if world.is_main:
        mark.unlink()
        if not all(sees):
            for path in made:
                path.rmdir()
    with world.agreed():
        if not all(sees):
            raise ValueError(
                f"rank {sees.index(False)} does not see the files of rank 0 in --output-dir "
                f"{run_dir}: name a folder that all machines share"
            )


def appears(path: Path) -> bool:
    """Return whether a file exists, waiting for it if the disk is slow."""
    end = time.monotonic() + SECONDS_TO_APPEAR
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


def peak_memory() -> int:
    """Return the peak memory of this process so far in bytes: of its GPU, or without one of it."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@dataclass
class RankClock:
    """The time of the steps of each rank, and the part of it that the rank waited for others."""

    world: World

    def __post_init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        """Measure from now on."""
        self._start = time.perf_counter()
        self._waited = self.world.waited

    def metrics(self) -> Metrics:
        """Return the metrics of the ranks since the last call; none in one process."""
        if self.world.size == 1:
            return {}
        waited = self.world.waited - self._waited
        seconds = time.perf_counter() - self._start
        found: Metrics = {}
        idle_shares = []
        own = (seconds, waited, peak_memory())
        for rank, (total, idle, memory) in enumerate(self.world.exchange(own)):
            idle_shares.append(idle / total)
            found[f"rank/{rank}/busy"] = total - idle
            found[f"rank/{rank}/idle"] = idle / total
            found[f"rank/{rank}/memory"] = memory / GB
        found["idle"] = sum(idle_shares) / len(idle_shares)
        self._restart()
        return found
