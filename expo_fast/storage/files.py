"""General file helpers: the cache folder, atomic writes, and one-sentence errors of readers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten


def cache_folder() -> Path:
    """Return the folder for compiled kernels and the default model, which can be made again.

    It is $EXPO_FAST_CACHE if set, else $XDG_CACHE_HOME/expo_fast if that is set, else
    ~/.cache/expo_fast. Nothing is created. Raises RuntimeError if there is no home folder.
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
    """Turn any exception of the block into a ValueError of one line that names `what`.

    For calls into libraries, which may raise anything and name no file.
    """
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{shorten(str(error), 300)}") from error


def output_file(name: str) -> Path:
    """Return the path of an output file that can be written.

    Raises ValueError if its folder does not exist, or if it is a folder or a device.
    """
    path = Path(name)
    if not path.parent.is_dir():
        raise ValueError(f"--output {name!r}: there is no folder {path.parent}")
    if path.exists() and not path.is_file():
        raise ValueError(f"--output {name!r} is there and no file: name a file")
    return path


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: a kill leaves the old content or the new, never a part of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
