"""Which ranks know of an error: a mark on the exception."""

from enum import Enum


class Reach(Enum):
    """Which ranks know of an error. The value is for readers only."""

    RAISED_BY_ALL = "all ranks raise it, and rank 0 prints it"
    TOLD_TO_ALL = "its own rank raises and prints it, and the others end"
    IN_COLLECTIVES = "the other ranks wait in collectives of the model, and do not know of it"


ATTRIBUTE = "reach_in_expo_fast"  # of an exception


def mark(error: BaseException, reach: Reach) -> None:
    """Record on an exception which ranks know of it."""
    setattr(error, ATTRIBUTE, reach)


def reach_of(error: BaseException) -> Reach | None:
    """Return which ranks know of an error; None: only its own rank, as far as is known."""
    return getattr(error, ATTRIBUTE, None)
