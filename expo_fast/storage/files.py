"""General file helpers: the cache folder, atomic writes, and one-line errors of readers.

`AppendedFile` and `PatientFiles` keep in memory what a full disk does not take, and write it later.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten


def cache_folder() -> Path:
    """Return the folder for compiled kernels and the default model. It can be deleted safely.

    It is $EXPO_FAST_CACHE if set, else $XDG_CACHE_HOME/expo_fast if that is set, else
    ~/.cache/expo_fast. It is not created here. Raise RuntimeError if there is no home folder.
    """
    named = os.environ.get("EXPO_FAST_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        base = Path.home() / ".cache"
    return Path(base) / "expo_fast"


@contextmanager
def reading(what: str | Path) -> Iterator[None]:
    """Convert any exception of the block into a ValueError of one line that names `what`.

    Use it for calls into libraries, which may raise any exception without naming the file.
    """
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{shorten(str(error), 300)}") from error


def output_file(name: str, flag: str = "--output") -> Path:
    """Return the path of an output file that can be written.

    Raise ValueError if its folder does not exist, or if it is a folder or a device.
    """
    path = Path(name)
    if not path.parent.is_dir():
        raise ValueError(f"{flag} {name!r}: there is no folder {path.parent}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{flag} {name!r} exists and is not a file: name a file")
    return path


def obey_umask(path: Path) -> None:
    """Give a file the permissions that the process gives to new files.

    safetensors writes through a private file, which others cannot read.
    """
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: a killed process leaves the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a part of a file would take space of a full disk
        raise


def is_full(error: BaseException) -> bool:
    """Return whether an error says that a disk or a quota is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def in_bytes(count: float) -> str:
    """Return a number of bytes in the unit that fits: 812 bytes, 4.0 kB, 1.90 GB."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.2f} GB"


def space_in_words(folder: Path) -> str:
    """Return how much space the disk of a folder has: "1.2 MB are free"."""
    return f"{in_bytes(shutil.disk_usage(existing_folder(folder)).free)} are free"


def existing_folder(folder: Path) -> Path:
    """Return a folder, or the nearest of its parents that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _named(error: OSError, path: Path) -> OSError:
    """Return an error of a disk with the name of the file, which a failed write does not have."""
    if error.filename is None:
        error.filename = str(path)
    return error


class AppendedFile:
    """A file that is only appended to. Data that the disk does not take waits in memory."""

    def __init__(self, path: Path):
        self.path = path
        self._waiting: list[bytes] = []

    @property
    def waiting(self) -> int:
        """Number of pieces that are not on the disk yet."""
        return len(self._waiting)

    def append(self, data: bytes) -> None:
        """Append data, after what waits, and return when it is on the disk.

        Raise OSError if that fails. The data then waits, and the file has no part of it.
        """
        self.queue(data)
        self.flush()

    def queue(self, data: bytes) -> None:
        """Let data wait for the next `append` or `flush`."""
        self._waiting.append(data)

    def flush(self) -> None:
        """Write what waits. Raise OSError if that fails."""
        if not self._waiting:
            return
        data = b"".join(self._waiting)
        with open(self.path, "ab", buffering=0) as file:
            end = file.tell()
            try:
                written = file.write(data)
                if written != len(data):
                    reason = f"{written} of {len(data)} bytes fit on the disk"
                    raise OSError(errno.ENOSPC, reason)
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(end)
                raise _named(error, self.path) from None
        self._waiting.clear()


class PatientFiles:
    """Files that are each written at once. A file that the disk does not take waits in memory.

    write: writes one file, or raises OSError.
    most_bytes: limit of the memory for what waits. Beyond it, the oldest files are forgotten.
    """

    def __init__(
        self,
        write: Callable[[Path, bytes], None] = replace_file,
        most_bytes: float = float("inf"),
    ):
        self._write = write
        self._most_bytes = most_bytes
        self._waiting: dict[Path, bytes] = {}
        self.forgotten = 0
        """Number of files that were given up because of `most_bytes`."""

    @property
    def waiting(self) -> int:
        """Number of files that are not on the disk yet."""
        return len(self._waiting)

    def write(self, path: Path, content: bytes) -> None:
        """Write a file, after those that wait. Raise OSError if that fails: it then waits."""
        self._waiting.pop(path, None)
        self._waiting[path] = content
        while len(self._waiting) > 1 and self._waiting_bytes() > self._most_bytes:
            del self._waiting[next(iter(self._waiting))]
            self.forgotten += 1
        self.flush()

    def flush(self) -> None:
        """Write the files that wait, in the order of `write`. Raise OSError if one fails."""
        for path, content in list(self._waiting.items()):
            try:
                self._write(path, content)
            except OSError as error:
                raise _named(error, path) from None
            del self._waiting[path]

    def exists(self, path: Path) -> bool:
        return path in self._waiting or path.exists()

    def read(self, path: Path) -> str:
        """Return the text of a file that waits or is on the disk."""
        if path in self._waiting:
            return self._waiting[path].decode()
        return path.read_text()

    def _waiting_bytes(self) -> int:
        return sum(map(len, self._waiting.values()))


def write_file(path: Path, content: bytes) -> None:
    """Write a file, and its folder if there is none. Leave no part of the file if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.write_bytes(content)
    except OSError:
        path.unlink(missing_ok=True)
        raise
