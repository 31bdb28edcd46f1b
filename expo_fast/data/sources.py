"""Read data rows from JSON lines, hub data sets or the built-in generator.

The rows of a source are yielded one by one, with the place that errors name ("data/a.jsonl:7").
Nothing is known here about what a row should hold.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from expo_fast.data import arithmetic
from expo_fast.data.columns import shown

LINE_BYTES = 8 << 20  # a longer line is no row of text
NESTING = 64  # the most lists and objects inside one another
HUB_NAME = re.compile(r"([^/:]+/[^/:]+)(?:/([^/:]+))?(?::(.+))?")

# The levels of each built-in data set, () for all.
ONE_LEVEL = {f"arithmetic-{level}": (level,) for level in arithmetic.LEVELS}
BUILTINS = {"arithmetic": (), **ONE_LEVEL}


class Row(NamedTuple):
    """A row of data, and its place in the source."""

    where: str
    value: object


def read_rows(
    source: str,
    *,
    levels: Sequence[int],  # for the generator
    limit: int | None,  # for the generator: the number of rows, None for its default
    seed: int,  # for the generator
) -> Iterator[Row]:
    """Yield the rows of a source.

    Raises FileNotFoundError for a missing file. Raises ValueError for a line that is not a JSON
    value, an unknown built-in data set, and a hub data set that cannot be loaded.
    """
    kind, _, name = source.partition(":")
    if kind == "builtin":
        return _builtin_rows(name, levels, limit, seed)
    if kind == "hub":
        return _hub_rows(name)
    return _file_rows(Path(source).expanduser())


def _builtin_rows(
    name: str,
    levels: Sequence[int],
    limit: int | None,
    seed: int,
) -> Iterator[Row]:
    name, _, split = name.partition(":")
    if name not in BUILTINS:
        known = ", ".join(BUILTINS)
        raise ValueError(f"builtin:{name}: no such data set; the built-in ones: {known}")
    levels = BUILTINS[name] or levels
    rows = arithmetic.rows(split or "train", levels, limit, seed)
    for number, row in enumerate(rows, 1):
        yield Row(f"builtin:{name}:{number}", row)


def _hub_rows(name: str) -> Iterator[Row]:
    parts = HUB_NAME.fullmatch(name)
    if parts is None:
        raise ValueError(f"hub:{name}: write hub:ORG/NAME, hub:ORG/NAME/CONFIG or one with :SPLIT")
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"hub:{name}: needs a package: pip install datasets") from error
    path, config, split = parts.groups()
    try:
        rows = datasets.load_dataset(path, config, split=split or "train")
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"hub:{name}: can't be loaded: {reason}") from error
    for number, row in enumerate(rows, 1):
        yield Row(f"hub:{name}:{number}", row)


def _file_rows(path: Path) -> Iterator[Row]:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a JSONL file in it")
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file; for data of the hub write hub:ORG/NAME, for ours builtin:NAME"
        )
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}:{number}"
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if text.strip():
            yield Row(where, _parse(where, text))


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, unzipped if it is a gzip."""
    with path.open("rb") as raw:
        zipped = raw.peek(2)[:2] == b"\x1f\x8b"
        lines = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if zipped else raw
        number = 0
        try:
            while line := lines.readline(LINE_BYTES + 1):
                number += 1
                if len(line) > LINE_BYTES:
                    raise ValueError(f"{path}:{number}: a line of more than {LINE_BYTES >> 20} MiB")
                yield line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{path}:{number + 1}: the gzip is cut short or damaged ({error}); get it again"
            ) from error


def _parse(where: str, line: bytes) -> object:
    try:
        row = json.loads(line.decode(), object_pairs_hook=_object)
        json.dumps(row, ensure_ascii=False).encode()  # fails for an escaped lone surrogate
        if _depth(row) > NESTING:
            raise RecursionError
        return row
    except json.JSONDecodeError as error:
        rest = shown(error.doc[error.pos :])
        raise ValueError(f"{where}:{error.colno}: not JSON ({error.msg}): {rest}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start + 1} of the line") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{where}: {half!a} is half a character (a lone surrogate)") from error
    except RecursionError as error:
        raise ValueError(f"{where}: nested more than {NESTING} deep") from error
    except ValueError as error:  # a repeated key, or an integer of thousands of digits
        raise ValueError(f"{where}: {error}") from error


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a JSON object. Raise ValueError for a repeated key."""
    row: dict[str, object] = {}
    for name, value in pairs:
        if name in row:
            raise ValueError(f"the key {name!r} is there twice; keep one")
        row[name] = value
    return row


def _depth(value: object) -> int:
    inner = ()
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, list):
        inner = value
    return 1 + max(map(_depth, inner), default=0)
