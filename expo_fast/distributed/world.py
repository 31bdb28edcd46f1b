"""The ranks of a distributed run: the values that they exchange, and the work that each one has.

`torchrun` starts K processes, the ranks 0 to K - 1. They run the same program on the same batches.
The expensive work of a step (sampling, judging, log-probs, forward and backward passes) is dealt to
the ranks, and their results are exchanged, so that all ranks know the complete step. Normalisers,
metrics and cached explanations are then computed by every rank from the same values, and do not
depend on K.

A process that `torchrun` did not start has the world `ALONE`, in which every operation is trivial.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from expo_fast.distributed.board import Board
from expo_fast.distributed.error_reach import Reach, mark, reach_of
from expo_fast.distributed.gathering import gather_values
from expo_fast.runtime import interruptions
from expo_fast.runtime.endings import Stopped

T = TypeVar("T")
# The sentence of an error, and the class in which all ranks raise it; None: its own rank only.
Report = tuple[str, type[Exception] | None]

USER_ERRORS = (ValueError, OSError, ModuleNotFoundError)  # which a user can correct
SECONDS_TO_SPEAK = 1.0  # that the rank with an error has to print it, before the others end


class PeerLostError(RuntimeError):
    """A rank ended or does not answer."""


@dataclass
class World:
    """The ranks of a run, seen from one of them. Every rank must make the same calls."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """The process group of the exchanges. It is on the CPU, also if the model is on a GPU."""
    board: Board | None = None
    """Where ranks leave messages that need no answer."""
    waited: float = 0.0
    """Seconds so far that this rank waited for others in exchanges."""
    step: int = 0
    """The number of the running step, from 1; 0: the run has not begun."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the files of the run and prints."""
        return self.rank == 0

    def begin_step(self, step: int) -> None:
        """Record the number of the step that begins."""
        if self.size > 1:
            self.step = step

    def enter(self, phase: str) -> None:
        """Tell the other ranks what this rank works on, for the message if it ends there."""
        if self.board is not None:
            self.board.enter(phase, self.step)

    def exchange(self, value: T) -> list[T]:
        """Return the values of all ranks, in the order of the ranks.

        Raise PeerLostError if a rank ended or does not answer in time, and Stopped if a rank has
        received a signal. See `agreed` for the errors of other ranks.
        """
        if self.size == 1:
            return [value]
        return self._exchange(value, None)

    def _exchange(
        self, value: T, error: Exception | None, shared: type[Exception] | None = None
    ) -> list[T]:
        """Exchange values and errors. Raise if any rank has an error."""
        report = None if error is None else self._report(error, shared)
        message = (value, report, interruptions.pending())
        if self.board is not None:
            self.board.arrive()
        start = time.perf_counter()
        try:
            messages = gather_values(message, self.size, self.group)
        except RuntimeError as lost:
            raise PeerLostError(str(lost)) from lost
        self.waited += time.perf_counter() - start
        for rank, (_, report, _) in enumerate(messages):
            if report is not None:
                self._raise(rank, report, error)
        for _, _, signum in messages:
            if signum is not None:
                raise Stopped(signum)
        return [value for value, _, _ in messages]

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0."""
        if self.size == 1:
            return value
        return self.exchange(value if self.is_main else None)[0]  # pyright: ignore[reportReturnType]

    def sums(self, *values: float) -> list[float]:
        """Return the sum of each value over the ranks, in fp64 and in the order of the ranks."""
        if self.size == 1:
            return list(values)
        rows = self.exchange(values)
        return [sum(column) for column in zip(*rows, strict=True)]

    def deal(self, costs: Sequence[float]) -> "Deal":
        """Return which rank works on which item. costs: the expected cost of each item."""
        return Deal(self, shares(costs, self.size))

    @contextmanager
    def agreed(self, shared: type[Exception] | None = None) -> Iterator[None]:
        """Raise an error on all ranks if the block raises one on any rank.

        The ranks need not have reached the end of the block: they raise in the exchange that they
        wait in. Before the first step, all ranks raise an error that a user can correct, with its
        sentence. Any other error is raised by its own rank only. The others end with the exit
        status 1, because one rank prints the cause.

        shared: a class of errors that all ranks raise at any time, because the run survives them.
        """
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            if isinstance(caught, PeerLostError) or reach_of(caught) is not None:
                raise
            error = caught
        self._exchange(None, error, shared)

    def _report(self, error: Exception, shared: type[Exception] | None) -> Report:
        if shared is not None and isinstance(error, shared):
            return str(error), shared
        by_user = isinstance(error, USER_ERRORS) and self.step == 0
        return str(error), ValueError if by_user else None

    def _raise(self, rank: int, report: Report, own: Exception | None) -> None:
        """Raise the error of a rank. own: that of this rank."""
        text, kind = report
        if kind is None and own is None:
            time.sleep(SECONDS_TO_SPEAK)
            raise SystemExit(1)
        error = own
        if error is None:
            assert kind is not None
            error = kind(f"rank {rank}: {text}")
        mark(error, Reach.TOLD_TO_ALL if kind is None else Reach.RAISED_BY_ALL)
        raise error

    def check_same(self, values: dict[str, Any]) -> None:
        """Raise ValueError on all ranks if a value of another rank differs from that of rank 0."""
        first, *others = self.exchange(values)
        with self.agreed():
            for rank, theirs in enumerate(others, start=1):
                for name, value in first.items():
                    if theirs[name] != value:
                        raise ValueError(
                            f"{name} is {value!r} on rank 0 and {theirs[name]!r} on rank {rank}: "
                            "all ranks need the same"
                        )


ALONE = World()


@contextmanager
def within_collectives() -> Iterator[None]:
    """Mark the errors of a block in which the other ranks wait in collectives of the model.

    `World.agreed` raises such an error at once, because an exchange would wait for them forever.
    They end as this rank ends.
    """
    try:
        yield
    except Exception as error:
        if reach_of(error) is None:
            mark(error, Reach.IN_COLLECTIVES)
        raise


@dataclass(frozen=True)
class Deal:
    """The work of each rank: the indices of its items, in their order."""

    world: World
    shares: list[list[int]] = field(default_factory=list)

    def own(self, items: Sequence[T]) -> list[T]:
        """Return the items of this rank."""
        return [items[i] for i in self.shares[self.world.rank]]

    def collect(self, results: Sequence[T]) -> list[T]:
        """Return the results for all items, in their order.

        results: for the items of this rank.
        """
        if self.world.size == 1:
            return list(results)
        by_item: dict[int, T] = {}
        parts = self.world.exchange(list(results))
        for indices, part in zip(self.shares, parts, strict=True):
            by_item |= zip(indices, part, strict=True)
        return [by_item[i] for i in range(len(by_item))]


def shares(costs: Sequence[float], size: int) -> list[list[int]]:
    """Return the indices of the items of each of `size` ranks.

    The most expensive item is dealt first, each to the rank with the smallest sum so far
    (longest-processing-time rule, doi:10.1137/0117039: at most 4/3 of the best maximum).
    """
    if size == 1:
        return [list(range(len(costs)))]
    dealt: list[list[int]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        rank = loads.index(min(loads))
        dealt[rank].append(i)
        loads[rank] += costs[i]
    return [sorted(indices) for indices in dealt]


def copy_complete(source: Tensor, target: Tensor) -> None:
    """Copy a complete tensor into a tensor, or this rank's rows of it if the target is sharded."""
    own = local_part(target)
    if own is not target:
        mesh = target.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
        parts = source.chunk(mesh.size())
        rank = mesh.get_local_rank()
        source = parts[rank] if rank < len(parts) else source[:0]
    own.copy_(source)


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this rank has, or else the tensor itself."""
    to_local = getattr(tensor, "to_local", None)  # of a DTensor, which is imported by FSDP only
    return tensor if to_local is None else tensor.detach().to_local()  # pyright: ignore
