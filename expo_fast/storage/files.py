"""General file helpers: the cache folder, atomic writes, and one-line errors of readers."""

import os
from collections.abc import Iterator
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
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
