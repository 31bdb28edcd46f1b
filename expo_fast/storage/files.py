"""Files of any kind: the cache folder, atomic writes, and errors of readers as one sentence."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten


def cache_folder() -> Path:
    """Return the folder for what can be made again: compiled kernels and the default model.

    It is $EXPO_FAST_CACHE where that is set, else $XDG_CACHE_HOME/expo_fast, else
    ~/.cache/expo_fast. Nothing is created. Raises RuntimeError where there is no home folder.
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
    """Around a library's call, which may raise anything and name no file: ValueError, one line."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{shorten(str(error), 300)}") from error


def output_file(name: str) -> Path:
    """Refuse, before any work, what cannot become a file: a folder, or a device like /dev/null."""
    path = Path(name)
    if not path.parent.is_dir():
        raise ValueError(f"--output {name!r}: there is no folder {path.parent}")
    if path.exists() and not path.is_file():
        raise ValueError(f"--output {name!r} is there and no file: name a file")
    return path


def replace_file(path: Path, content: bytes) -> None:
    """Write the file so that a kill leaves the old content or the new, never a part."""
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
