"""Signals that end a run or save it. They are recorded at once, and obeyed where that is safe.

    SIGINT, SIGTERM, SIGHUP   save the last step boundary, exit with 128 + the number of the signal
    SIGUSR1                   save at the next step boundary, and go on

A training step calls `check` between bursts of decoding and between packs. `check` raises `Stopped`
if a signal has arrived. Code that may run long in one call, such as a reward function, runs inside
`immediate`, where the signal itself raises. Once a step has changed the weights, `defer` holds the
signal back until the step is complete, because half a step cannot be saved.

The ranks of a distributed run have to stop in the same place. There `check` raises nothing, and an
exchange of the ranks raises `Stopped` on all of them if one has received a signal.

A second signal ends the process at once, and so does a first one that is not obeyed in time. A
thread does this, so that it also works while the main thread is inside a long call of a library.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from expo_fast.runtime.endings import Stopped

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAVE = signal.SIGUSR1
# A launcher forwards a signal to processes that may have got it themselves. Within this time, both
# are one request.
SAME_REQUEST_S = 0.5
CLOSE = 0  # no signal has this number
SHOW_CURSOR = b"\x1b[?25h"  # the live panel hides it


class Interruptions:
    """The signals that a run has received."""

    def __init__(self) -> None:
        self.stop_signal: int | None = None
        """Number of the first signal that asks the run to end."""
        self.together = False
        """Whether the ranks of a distributed run stop together: `check` does not raise then."""
        self._save_requested = False
        self._deferred = False
        self._n_immediate = 0
        self._thread = threading.get_ident()

    def check(self) -> None:
        """Raise Stopped if the run should end and the weights are those of a step boundary.

        Only the thread of the training loop raises.
        """
        if self.stop_signal is None or self._deferred or self.together:
            return
        if threading.get_ident() == self._thread:
            raise Stopped(self.stop_signal)

    def pending(self) -> int | None:
        """Return the signal that the ranks of a distributed run obey now, None if there is none."""
        return None if self._deferred else self.stop_signal

    def take_save_request(self) -> bool:
        """Return whether SIGUSR1 has arrived since the last call."""
        requested = self._save_requested
        self._save_requested = False
        return requested

    def defer(self) -> None:
        """Raise nothing until `allow`."""
        self._deferred = True

    def allow(self) -> None:
        """Let `check` raise again."""
        self._deferred = False

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Let a signal raise Stopped inside the block, wherever the block is."""
        self.check()
        self._n_immediate += 1
        try:
            yield
        finally:
            self._n_immediate -= 1

    def receive(self, signum: int, frame: FrameType | None) -> None:
        """Record a signal. This is the handler of all of them."""
        if signum == SAVE:
            self._save_requested = True
        elif self.stop_signal is None:
            self.stop_signal = signum
            if self._n_immediate:
                self.check()


_current = Interruptions()  # without signals, outside `watching`
_has_run = False  # whether `watching` has ended


def check() -> None:
    """Raise Stopped if a signal asks the run to end, see `Interruptions.check`."""
    _current.check()


def pending() -> int | None:
    """Return the signal to obey now, see `Interruptions.pending`."""
    return _current.pending()


def defer() -> None:
    """Raise nothing until the step is complete, see `Interruptions.defer`."""
    _current.defer()


def allow() -> None:
    """Let `check` raise again, because a step is complete."""
    _current.allow()


def immediate() -> Any:
    """Return a context in which a signal raises at once, see `Interruptions.immediate`."""
    return _current.immediate()


@contextmanager
def watching(stop_within: float) -> Iterator[Interruptions]:
    """Receive signals until the end of the block, and yield what has been received.

    stop_within: seconds after which a run that was asked to end exits without saving; 0: no limit.

    Signals that the process ignores, as under nohup, remain ignored. Outside the main thread no
    signal can be received, and nothing is.
    """
    global _current, _has_run
    before = _current
    _current = Interruptions()
    try:
        if threading.current_thread() is threading.main_thread():
            with _handlers(_current), _watchdog(stop_within):
                yield _current
        else:
            yield _current
    finally:
        _current = before
        _has_run = True


@contextmanager
def _handlers(interruptions: Interruptions) -> Iterator[None]:
    """Install the handler of each signal, and restore the earlier ones."""
    before = {}
    for signum in (*STOPS, SAVE):
        earlier = signal.getsignal(signum)
        if earlier is not signal.SIG_IGN and earlier is not None:
            before[signum] = signal.signal(signum, interruptions.receive)
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)


@contextmanager
def _watchdog(stop_within: float) -> Iterator[None]:
    """Run the thread that ends a process which does not end itself."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    earlier = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reading, stop_within), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        os.write(writing, bytes([CLOSE]))
        thread.join()
        os.close(writing)
        os.close(reading)


def _watch(reading: int, stop_within: float) -> None:
    """Read the numbers of arriving signals. End the process after a second one, or too late."""
    first: int | None = None
    received = 0.0
    while True:
        patience = None
        if first is not None and stop_within > 0:
            patience = max(0.0, received + stop_within - time.monotonic())
        readable, _, _ = select.select([reading], [], [], patience)
        if not readable:
            assert first is not None
            reason = f"nothing was saved within --stop-within {stop_within:g} s of"
            _leave(first, reason)
        for number in os.read(reading, 64):
            if number == CLOSE:
                return
            if number not in STOPS:
                continue
            if first is None:
                first = number
                received = time.monotonic()
            elif time.monotonic() - received > SAME_REQUEST_S:
                _leave(number, "ended at once by a second signal,")


def leave_at_once_outside_the_run() -> None:
    """Let a signal end the process with one line before `watching` begins and after it.

    Nothing needs to be saved there. An exception would be turned into others by the imports that it
    interrupts, and into a long traceback.
    """

    def leave(signum: int, frame: FrameType | None) -> None:
        if _has_run:
            _leave(signum, "the steps are done,")
        _leave(signum, "nothing was trained yet, the same command starts again after")

    for signum in STOPS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, leave)
    if signal.getsignal(SAVE) is signal.SIG_DFL:
        signal.signal(SAVE, lambda signum, frame: None)  # there is nothing to save


def _leave(signum: int, reason: str) -> None:
    """End the process now. The newest checkpoint is complete, because it was renamed last."""
    line = f"interrupted: {reason} {signal.Signals(signum).name}\n"
    try:
        if sys.stdout is not None and sys.stdout.isatty():
            os.write(1, SHOW_CURSOR)
        os.write(2, line.encode())
    except (OSError, ValueError):  # a closed terminal must not keep the process alive
        pass
    finally:
        os._exit(128 + signum)
