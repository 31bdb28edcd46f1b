"""Start and end of a distributed run, from the environment that `torchrun` sets."""

# pyright: reportPrivateImportUsage=false
# (torch documents these names but does not export them)

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from expo_fast.distributed.board import Board
from expo_fast.distributed.error_reach import Reach, mark, reach_of
from expo_fast.distributed.launch import is_launched
from expo_fast.distributed.world import ALONE, USER_ERRORS, PeerLostError, World

DEFAULT_TIMEOUT_S = 1800.0
SECONDS_AFTER_SIGTERM = 10.0
SECONDS_FOR_THE_CAUSE = 3.0  # that a rank which fails has to leave its cause
COMMUNICATION = ("gloo", "nccl", "connection closed", "connection reset", "processgroup")


@contextmanager
def started(timeout_s: float = DEFAULT_TIMEOUT_S, device: str = "auto") -> Iterator[World]:
    """Yield the world of this process. It is `ALONE` unless several processes were started.

    timeout_s: seconds after which a rank that does not answer ends the run.
    device: that of the model, as in `config.Train`.

    An error of one rank ends all ranks, and one of them prints the rank, the phase and the cause.
    Raise ValueError if the environment is incomplete, or if there are fewer GPUs than ranks.
    """
    if not is_launched():
        yield ALONE
        return
    check_environment()
    world, board, owned = _start(timeout_s)
    earlier = _survive_sigterm()
    try:
        with world.agreed():
            choose_device(device)
        with only_main_warns(world):
            yield world
    except USER_ERRORS:
        if world.step:
            _leave_cause(board, sys.exception())
        raise
    except Exception as error:
        if not is_of_communication(error):
            _leave_cause(board, error)
            raise
        _tell_of_lost_rank(board, error, timeout_s)
        raise SystemExit(1) from None
    finally:
        board.close()
        if earlier is not None and sys.exception() is None:
            signal.signal(signal.SIGTERM, earlier)
        if owned:
            torch.distributed.destroy_process_group()


def tell_other_ranks(error: Exception) -> None:
    """Raise an error of this rank on all ranks, before the world of a run has started."""
    with started() as world, world.agreed():
        raise error


@contextmanager
def only_main_warns(world: World) -> Iterator[None]:
    """Hide warnings on all ranks but one, because nearly all of them are the same on each."""
    with warnings.catch_warnings():
        if not world.is_main:
            warnings.simplefilter("ignore")
        yield


def check_environment() -> None:
    """Raise ValueError if a variable of `torchrun` is not set."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            error = ValueError(
                f"RANK={os.environ['RANK']} and WORLD_SIZE={os.environ['WORLD_SIZE']} are set, but "
                f"{name} is not: start the run with torchrun, or set the address of rank 0"
            )
            mark(error, Reach.RAISED_BY_ALL)
            raise error


def choose_device(device: str) -> None:
    """Make the GPU of this rank the current one, if the run uses GPUs.

    Raise ValueError if there are fewer GPUs than ranks on this machine, or for a numbered GPU.
    """
    uses_cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    if not uses_cuda:
        return
    if ":" in device:
        raise ValueError(f"device={device!r}: use cuda, each rank has the GPU of its number")
    local_rank = int(os.environ.get("LOCAL_RANK") or os.environ["RANK"])
    found = torch.cuda.device_count()
    if local_rank >= found:
        raise ValueError(
            f"local rank {local_rank} has no GPU: this machine has {found}, so use "
            f"--nproc-per-node {found or 1}, or --device cpu"
        )
    torch.cuda.set_device(local_rank)


def is_of_communication(error: BaseException) -> bool:
    """Return whether an error says that another rank ended or does not answer."""
    if isinstance(error, PeerLostError | torch.distributed.DistError):
        return True
    was_exchanged = reach_of(error) in (Reach.RAISED_BY_ALL, Reach.TOLD_TO_ALL)
    if type(error) is not RuntimeError or was_exchanged:
        return False  # such as that of a reward function, which may use connections of its own
    text = str(error).lower()
    return any(words in text for words in COMMUNICATION)


def _start(timeout_s: float) -> tuple[World, Board, bool]:
    """Return the world, its board, and whether the process group was made here."""
    import torch.distributed as dist

    timeout = timedelta(seconds=timeout_s)
    prefix = _new_prefix()
    owned = not dist.is_initialized()
    if owned:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        on_gpu = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.PrefixStore(f"{prefix}/ranks" if _on_one_machine() else "ranks", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
    group = dist.new_group(backend="gloo", timeout=timeout)
    rank = dist.get_rank()
    size = dist.get_world_size()
    board = Board(_own_store(prefix, timeout), rank, size)
    return World(rank, size, group, board), board, owned


_sessions = 0


def _new_prefix() -> str:
    """Return a prefix of keys for this session and this restart only.

    An agent of torchrun that was given a port keeps its store in a restart. Ranks would find there
    the addresses of processes that have ended. The agents of several machines need not count
    restarts equally.
    """
    global _sessions
    _sessions += 1
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"expo_fast/{restarts}/{_sessions}"


def _on_one_machine() -> bool:
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]


def _own_store(prefix: str, timeout: timedelta) -> Any:
    """Return a connection of this session to the store."""
    import torch.distributed as dist

    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timeout,
    )
    return dist.PrefixStore(prefix, store)


def _leave_cause(board: Board, error: BaseException | None) -> None:
    cause = f"{type(error).__name__}: {error}"
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        cause = f"out of memory, lower --pack-tokens or use --gradient-checkpointing ({error})"
    if error is not None:
        error.add_note(f"rank {torch.distributed.get_rank()} failed in {board.progress}: {cause}")
    board.post_failure(cause)


def _tell_of_lost_rank(board: Board, error: Exception, timeout_s: float) -> None:
    """Print which rank ended or hangs, unless it or another rank has printed a cause."""
    try:
        if board.failure(SECONDS_FOR_THE_CAUSE) is not None:
            return
        told = board.lost(str(error), timeout_s)
        board.post_failure(told)
        speaks = board.may_speak()
    except RuntimeError:  # the store was on the machine or in the process that ended
        told = f"another rank ended ({error})"
        speaks = True
    if speaks:
        print(f"error: {told}; the same command resumes the run", file=sys.stderr)


def _survive_sigterm() -> Any:
    """Delay the end of the process by SIGTERM, and return the earlier handler.

    torchrun sends it to all its processes as soon as one ends, before the cause is printed. Within
    `runtime.interruptions.watching`, another handler takes it.
    """

    def end_later(signum: int, _: object) -> None:
        timer = threading.Timer(SECONDS_AFTER_SIGTERM, os._exit, [128 + signum])
        timer.daemon = True
        timer.start()

    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, end_later)
