"""Host time of a training step by phase."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Phases:
    """Seconds of host time, summed by phase. A phase inside another one counts in both.

    The time of a GPU's work counts in the phase that waits for it.

    entered: is called with the name of each phase that begins.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        entered: Callable[[str], None] | None = None,
    ):
        self._clock = clock
        self._entered = entered
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to the phase, even if the block raises an exception."""
        start = self._clock()
        if self._entered is not None:
            self._entered(name)
        try:
            yield
        finally:
            key = f"time/{name}"
            self._seconds[key] = self._seconds.get(key, 0.0) + self._clock() - start

    def seconds(self) -> dict[str, float]:
        """Return the seconds so far, keyed `time/NAME` as in metrics.jsonl."""
        return dict(self._seconds)
