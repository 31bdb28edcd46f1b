"""Read data rows from files, hub data sets, benchmarks or the built-in generator.

The rows of a source are yielded one by one, with the place that errors name ("data/a.jsonl:7").
Nothing is known here about what a row should hold.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from expo_fast.data import arithmetic
from expo_fast.data.files import INSTALL, Row, file_rows, files_of, form_of

HUB_NAME = re.compile(r"([^/:]+/[^/:]+)(?:/([^/:]+))?(?::(.+))?")
# What is taken for a hub name without `hub:`, if there is no such path.
BARE_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+(:[^/\\]+)?")

# The levels of each built-in data set, () for all.
ONE_LEVEL = {f"arithmetic-{level}": (level,) for level in arithmetic.LEVELS}
BUILTINS = {"arithmetic": (), **ONE_LEVEL}

BENCHMARKS = {  # name: where the hub has its test split
    "gsm8k": "openai/gsm8k/main:test",
    "math-500": "HuggingFaceH4/MATH-500:test",
}
DATA_DIR = "EXPO_FAST_DATA"


def read_rows(
    source: str,
    *,
    levels: Sequence[int] = (),  # for the generator
    limit: int | None = None,  # for the generator: the number of rows, None for its default
    seed: int = 0,  # for the generator
    data_dir: str | None = None,  # folder of benchmarks; None: that of EXPO_FAST_DATA
) -> Iterator[Row]:
    """Yield the rows of a source.

    Raises FileNotFoundError for a missing file. Raises ValueError for a row that cannot be read, an
    unknown built-in data set, and a hub data set that cannot be loaded.
    """
    kind, _, name = source.partition(":")
    if kind == "builtin":
        return _builtin_rows(name, levels, limit, seed)
    if kind == "hub":
        return _hub_rows(name)
    files = files_of(source)
    if not files and source in BENCHMARKS:
        return _benchmark_rows(source, data_dir)
    if not files and _may_be_hub_name(source):
        return _hub_rows(source)
    if not files:
        raise FileNotFoundError(
            f"{source}: no such file; for data of the hub write hub:ORG/NAME, for ours builtin:NAME"
        )
    return _rows_of_files(files)


def _rows_of_files(files: Sequence[Path]) -> Iterator[Row]:
    for file in files:
        yield from file_rows(file)


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


def _may_be_hub_name(source: str) -> bool:
    """Return whether a source without a file is ORG/NAME[:SPLIT], and no misspelt path."""
    name, _, _ = source.partition(":")
    is_path = form_of(Path(name)) is not None or Path(name).parent.exists()
    return BARE_HUB_NAME.fullmatch(source) is not None and not is_path


def _hub_rows(name: str) -> Iterator[Row]:
    parts = HUB_NAME.fullmatch(name)
    if parts is None:
        raise ValueError(f"hub:{name}: write hub:ORG/NAME, hub:ORG/NAME/CONFIG or one with :SPLIT")
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"hub:{name}: needs a package: {INSTALL}") from error
    path, config, split = parts.groups()
    try:
        rows = datasets.load_dataset(path, config, split=split or "train")
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"hub:{name}: can't be loaded: {reason}") from error
    for number, row in enumerate(rows, 1):
        yield Row(f"hub:{name}:{number}", row)


def _benchmark_rows(name: str, data_dir: str | None) -> Iterator[Row]:
    """Yield the rows of a benchmark's test split, from the folder of benchmarks or the hub."""
    folder = data_dir or os.environ.get(DATA_DIR)
    if data_dir is not None and not Path(data_dir).is_dir():
        raise FileNotFoundError(f"--data-dir {data_dir}: no such folder")
    files = [] if folder is None else _benchmark_files(name, Path(folder).expanduser())
    if files:
        yield from _rows_of_files(files)
        return
    searched = f"{folder} has no file {name}.jsonl" if folder else f"{DATA_DIR} names no folder"
    try:
        yield from _hub_rows(BENCHMARKS[name])
    except ValueError as error:
        raise ValueError(
            f"{name}: {searched} (see --data-dir), and the hub fails: {error}"
        ) from error


def _benchmark_files(name: str, folder: Path) -> list[Path]:
    """Return the files of a benchmark's test split: NAME, NAME_test or NAME/test* with any form.

    Capitals, `-` and `_` in their names do not matter.
    """
    wanted = _bare(name)
    if not folder.is_dir():
        return []
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and _bare(path.name) == wanted:
            for file in sorted(path.iterdir()):
                if _bare(file.name).startswith("test") and form_of(file):
                    found.append(file)
        elif path.is_file() and form_of(path):
            stem = _bare(path.name.partition(".")[0])
            if stem in (wanted, f"{wanted}test"):
                return [path]
    return found


def _bare(name: str) -> str:
    return re.sub("[-_]", "", name).casefold()
