"""Report on training runs: python -m expo_fast.report RUN_DIR... --output report.html.

Runs that differ only in their seed count as one configuration. A run that cannot be read, as after
a crash, is left out with a warning.
"""

if __name__ == "__main__":  # before the imports below, because one of their packages may be missing
    from expo_fast.cli.exit_status import run_command

    raise SystemExit(run_command("report"))

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expo_fast.cli.flags import from_flags
from expo_fast.reporting.page import render
from expo_fast.reporting.runs import Run, group_runs, load_run
from expo_fast.storage.files import output_file, replace_file


@dataclass(frozen=True)
class Report:
    """Write a self-contained HTML file about training runs."""

    run_dirs: tuple[str, ...]
    """Folders that expo_fast.train wrote."""
    output: str = "report.html"
    """File to write. An existing file is replaced."""


def main(argv: Sequence[str]) -> None:
    """Run the command line. Raise ValueError or OSError for files it cannot read or write."""
    config = from_flags(Report, argv, str(Report.__doc__))
    if not config.run_dirs:
        raise ValueError("need the folder of at least one run; see --help")
    output = output_file(config.output)
    folders = {Path(name).resolve() for name in config.run_dirs}
    if len(folders) < len(config.run_dirs):
        raise ValueError(f"a run is given twice: {' '.join(config.run_dirs)}")
    runs, skipped = load_runs(config.run_dirs)
    html = render(group_runs(runs), skipped).encode()
    try:
        replace_file(output, html)
    except OSError as error:
        raise ValueError(f"--output {config.output!r}: {error.strerror}") from None
    print(f"report: {output}", flush=True)


def load_runs(names: Sequence[str]) -> tuple[list[Run], list[str]]:
    """Return the runs that can be read, and a sentence on each one that cannot, as after a crash.

    Raise ValueError or OSError if a folder does not exist, or if no run can be read.
    """
    runs = []
    errors = []
    for name in names:
        if not Path(name).is_dir():
            raise FileNotFoundError(f"{name!r} is not a folder")
        try:
            runs.append(load_run(name))
        except (ValueError, OSError) as error:
            errors.append(error)
    if not runs:
        raise errors[0]
    for error in errors:
        warnings.warn(f"a run is left out: {error}", stacklevel=2)
    return runs, [str(error) for error in errors]
