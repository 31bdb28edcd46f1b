"""A limit of wall time for code of others: chat templates and reward functions."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN_S = 1.0  # until the next signal, in case the code has caught the first one


class TimeLimitExceeded(TimeoutError):
    """A block took longer than its limit."""


class _Expired(BaseException):
    """Raised in the code that is limited. No Exception, so that few handlers catch it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitExceeded if the block takes longer.

    It is raised between two instructions of Python, in a system call that waits, or in a regular
    expression. There is no limit outside the main thread, and in C code that checks no signals.

    seconds: of wall time; 0: no limit.
    """
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(_number: int, _frame: FrameType | None) -> None:
        raise _Expired

    handler = signal.signal(signal.SIGALRM, expire)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    try:
        yield
    except _Expired:
        raise TimeLimitExceeded(f"no result within {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, handler)
