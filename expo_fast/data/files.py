"""Read rows from data files: JSON lines, JSON arrays, CSV, TSV and Parquet.

The ending of a file's name says its form. Text files may be gzipped. A row comes with the place
that errors name: the line of a text file ("data/a.jsonl:7"), or the number of the row in a JSON
array or a Parquet file.
"""

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from expo_fast.data.columns import shown

LINE_BYTES = 8 << 20  # a longer line is no row of text
NESTING = 64  # the most lists and objects inside one another
GZIP = b"\x1f\x8b"  # the first bytes of a gzip
INSTALL = "pip install 'expo-fast[data]'"


class Row(NamedTuple):
    """A row of data, and its place in the source."""

    where: str
    value: object


# Paths


def files_of(source: str) -> list[Path]:
    """Return the files of a path: the file, the data files of a folder, or those of a pattern.

    Subfolders are not read. Return no file if there is no such path. Raise ValueError for a folder
    without data files, and for a pipe or a device.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(each for each in path.iterdir() if each.is_file() and form_of(each))
        if not found:
            raise ValueError(f"{path} is a folder: name a JSONL file, or put one into it")
        return found
    if path.is_file():
        return [path]
    if path.exists():  # reading a pipe may wait for ever, and a device may have no end
        raise ValueError(f"{path} is a pipe, a socket or a device: name a file")
    return sorted(each for each in map(Path, glob(str(path), recursive=True)) if each.is_file())


def form_of(path: Path) -> str | None:
    """Return the ending that says the form of a data file, None for another ending."""
    ending = Path(path.name.lower().removesuffix(".gz")).suffix
    return ending if ending in READERS else None


def file_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file. One whose ending says no form is read as JSON lines.

    Raise ValueError for a row that cannot be read.
    """
    return READERS[form_of(path) or ".jsonl"](path)


# JSON


def jsonl_rows(path: Path) -> Iterator[Row]:
    """Yield the values of the lines that are not blank."""
    return rows_of_lines(path, _lines(path), first=1)


def rows_of_lines(path: Path, lines: Iterable[bytes], *, first: int) -> Iterator[Row]:
    """Yield the values of the lines of a file that are not blank.

    first: the number of the first of these lines in the file.
    """
    prefix = f"{path}:"
    for number, line in enumerate(lines, first):
        _check_length(path, number, line)
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if text and not text.isspace():
            yield Row(prefix + str(number), _parse(path, text, line=number))


def json_rows(path: Path) -> Iterator[Row]:
    """Yield the elements of a JSON array. A file that does not begin with [ has JSON lines."""
    with _opened(path) as file:
        content = file.read().removeprefix(codecs.BOM_UTF8)
    if not content.lstrip().startswith(b"["):
        yield from jsonl_rows(path)
        return
    values = _parse(path, content, line=None)
    assert isinstance(values, list), path
    for number, value in enumerate(values, 1):
        yield Row(f"{path}:{number}", value)


def _parse(path: Path, content: bytes, *, line: int | None) -> object:
    """Return the JSON value of a line, or of a complete file.

    line: the number of the line. None: the content is that of the file.
    """
    deepest = NESTING + 1 if line is None else NESTING
    try:
        value = _decoded(content.decode())
        if b"\\u" in content:
            json.dumps(value, ensure_ascii=False).encode()  # fails for an escaped lone surrogate
        # A value is at most as deep as it has brackets.
        if content.count(b"{") + content.count(b"[") > deepest and _depth(value) > deepest:
            raise RecursionError
        return value
    except ValueError as error:
        raise _json_error(path, error, line) from error
    except RecursionError as error:
        where = str(path) if line is None else f"{path}:{line}"
        raise ValueError(f"{where}: nested more than {NESTING} deep") from error


def _decoded(text: str) -> object:
    """Return a JSON value, as `DECODER.decode` does. It is faster for a text without whitespace."""
    try:
        value, end = DECODER.scan_once(text, 0)  # pyright: ignore[reportAttributeAccessIssue]
    except StopIteration:
        end = -1
    return value if end == len(text) else DECODER.decode(text)


def _json_error(path: Path, error: ValueError, line: int | None) -> ValueError:
    """Return the error of a line, or of a complete file, that is no JSON value."""
    where = str(path) if line is None else f"{path}:{line}"
    if isinstance(error, json.JSONDecodeError):
        rest = shown(error.doc[error.pos :])
        place = f"{path}:{line or error.lineno}:{error.colno}"
        return ValueError(f"{place}: not JSON ({error.msg}): {rest}")
    if isinstance(error, UnicodeDecodeError):
        unit = "file" if line is None else "line"
        return ValueError(f"{where}: not UTF-8 at byte {error.start + 1} of the {unit}")
    if isinstance(error, UnicodeEncodeError):
        half = error.object[error.start]
        return ValueError(f"{where}: {half!a} is half a character (a lone surrogate)")
    return ValueError(f"{where}: {error}")  # a repeated key, or an integer of thousands of digits


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a JSON object. Raise ValueError for a repeated key."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice; keep one")
    return row


# A decoder is made once, because json.loads makes one for each call that has a hook.
DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _depth(value: object) -> int:
    inner = ()
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, list):
        inner = value
    return 1 + max(map(_depth, inner), default=0)


# CSV


def csv_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a table with commas, whose first line names the columns.

    Values are texts. A row lacks the columns whose cells are empty.
    """
    return _table_rows(path, ",")


def tsv_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a table with tabs, as `csv_rows` does."""
    return _table_rows(path, "\t")


def _table_rows(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(LINE_BYTES)  # Python's own limit is 128 KiB, less than some texts have
    reader = csv.reader(_decoded_lines(path), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        named = [name for name in header if name]  # pandas writes its index without a name
        if len(set(named)) < len(named):
            raise ValueError(f"{path}:1: two columns have the same name: {shown(header)}")
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if not any(cells):  # a blank line, or one of spreadsheets: ",,"
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{where}: the row has {len(cells)} cells, but line 1 names {len(header)} "
                    f"columns: {shown(cells)}"
                )
            row = dict(zip(header, cells, strict=True))
            yield Row(where, {name: cell for name, cell in row.items() if name and cell})
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not CSV ({error})") from error


def _decoded_lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        _check_length(path, number, line)
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            place = f"{path}:{number}"
            raise ValueError(f"{place}: not UTF-8 at byte {error.start + 1} of the line") from error
        yield text.removeprefix("\ufeff") if number == 1 else text


# Parquet


def parquet_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file. A row lacks the columns that are null."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path}: Parquet needs a package: {INSTALL}") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    present = {name: value for name, value in row.items() if value is not None}
                    yield Row(f"{path}:{number}", present)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: not a Parquet file, or damaged ({reason})") from error


# Text files


def _check_length(path: Path, number: int, line: bytes) -> None:
    if len(line) > LINE_BYTES:
        raise ValueError(f"{path}:{number}: a line of more than {LINE_BYTES >> 20} MiB")


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, unzipped if it is a gzip.

    A line of more than LINE_BYTES is not complete, and is the last one that is yielded.
    """
    number = 0
    with _opened(path, lambda: number + 1) as file:
        while line := file.readline(LINE_BYTES + 1):
            number += 1
            yield line
            if len(line) > LINE_BYTES:
                return


@contextmanager
def _opened(path: Path, line: Callable[[], int] = lambda: 1) -> Iterator[BinaryIO]:
    """Open a file, unzipped if it is a gzip. Raise ValueError if the gzip is damaged.

    line: returns the number of the line that is read, for the error.
    """
    with path.open("rb") as raw:
        zipped = raw.peek(len(GZIP)).startswith(GZIP)
        try:
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if zipped else raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{path}:{line()}: the gzip is cut short or damaged ({error}); get it again"
            ) from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
    ".parquet": parquet_rows,
}
