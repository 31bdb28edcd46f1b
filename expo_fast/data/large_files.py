"""Read a large file of JSON lines in several processes.

Python parses and checks 100,000 rows in a second. So a file of a million rows is read in pieces, by
as many processes as there are cores. The pieces arrive in the order of the file: the result, and
the first bad row, are those of reading the rows one after the other.
"""

import gc
import os
import pickle
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from subprocess import Popen
from typing import NamedTuple

from expo_fast.data.files import GZIP, LINE_BYTES, form_of, rows_of_lines
from expo_fast.data.programs import start_program
from expo_fast.data.row_blocks import Block, blocks_of
from expo_fast.data.row_reading import RowOptions

PROGRAM = "expo_fast.data.large_files"
LARGE = 24 << 20  # bytes of a file that is worth the start of processes, 0.2 s
PIECE = 2 << 20  # bytes; a longer line is a piece of its own
MOST_PROCESSES = 16
PIECES_AHEAD = 2  # of each process


class Piece(NamedTuple):
    """Complete lines of a file."""

    path: Path
    start: int  # in bytes
    size: int
    first: int  # number of its first line
    options: RowOptions


def is_large(path: Path) -> bool:
    """Return whether a file has JSON lines, and is large enough to be read in pieces."""
    if form_of(path) not in (None, ".jsonl") or path.stat().st_size < LARGE:
        return False
    with path.open("rb") as file:
        return not file.read(len(GZIP)).startswith(GZIP)


def read_large(path: Path, options: RowOptions) -> Iterator[Block]:
    """Yield the problems of a file in blocks. Raise ValueError for the first bad row."""
    n_processes = min(MOST_PROCESSES, n_cores())
    started = [start_reader() for _ in range(n_processes)]
    try:
        channels = deque(channel for channel, _ in started)
        asked: deque[Connection] = deque()  # who answers next, in the order of the file
        pieces = pieces_of(path, options)
        for _ in range(PIECES_AHEAD * n_processes):
            ask(channels, asked, pieces)
        while asked:
            answer = receive(asked.popleft(), path)
            ask(channels, asked, pieces)
            if isinstance(answer, Exception):
                raise answer
            yield from answer
    finally:
        for channel, process in started:
            channel.close()
            process.kill()
            process.wait()


def start_reader() -> tuple[Connection, Popen]:
    """Start a process that reads pieces. Return the channel to it, and the process."""
    ours, theirs = Pipe()
    return ours, start_program(PROGRAM, theirs)


def n_cores() -> int:
    """Return the number of cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ask(channels: deque[Connection], asked: deque[Connection], pieces: Iterator[Piece]) -> None:
    """Give the next piece, if there is one, to the process whose turn it is."""
    piece = next(pieces, None)
    if piece is not None:
        with suppress(OSError):  # `receive` then says that the process has ended
            channels[0].send_bytes(pickle.dumps(piece))
        asked.append(channels[0])
        channels.rotate(-1)


def receive(channel: Connection, path: Path) -> list[Block] | Exception:
    """Return the blocks of a piece, or the error of its first bad row.

    Raise OSError if the process has ended.
    """
    try:
        return pickle.loads(channel.recv_bytes())
    except (EOFError, OSError) as error:  # OSError: it had not taken all that was sent to it
        raise OSError(
            f"{path}: a process that reads it has ended, perhaps for lack of memory"
        ) from error


def pieces_of(path: Path, options: RowOptions) -> Iterator[Piece]:
    """Yield the pieces of a file. Each ends with the end of a line, or of the file."""
    start = 0
    first = 1
    with path.open("rb") as file:
        while True:
            file.seek(start)
            content = file.read(PIECE)
            if not content:
                return
            if b"\n" not in content:
                content += file.readline(LINE_BYTES)  # more of it is refused as too long a line
            size = (content.rfind(b"\n") + 1) or len(content)
            if len(content) < PIECE:
                size = len(content)  # the end of the file
            yield Piece(path, start, size, first, options)
            first += content.count(b"\n", 0, size)
            start += size


def read_piece(piece: Piece) -> list[Block]:
    """Return the problems of a piece. Raise ValueError for the first bad row."""
    with piece.path.open("rb") as file:
        file.seek(piece.start)
        content = file.read(piece.size)
    lines = content.split(b"\n")
    rows = rows_of_lines(piece.path, lines, first=piece.first)
    return list(blocks_of(rows, piece.options))


def serve(fd: int) -> None:
    """Read pieces until the channel is closed."""
    gc.disable()  # the objects of a piece have no cycles, and go with it
    channel = Connection(fd)
    while True:
        try:
            piece: Piece = pickle.loads(channel.recv_bytes())
        except EOFError:
            return
        try:
            answer: list[Block] | Exception = read_piece(piece)
        except (ValueError, OSError) as error:
            answer = error.with_traceback(None)
            answer.__cause__ = None
        channel.send_bytes(pickle.dumps(answer, protocol=5))


if __name__ == "__main__":
    serve(int(sys.argv[1]))
