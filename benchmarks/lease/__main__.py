"""Command line of `bash benchmarks/lease.sh`, which explains it."""

import argparse
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.lease import switches
from benchmarks.lease.plan import ITEMS, PLANS
from benchmarks.lease.report import Mismatch, Report
from benchmarks.lease.runner import ROOT, Outcome, Run, table
from benchmarks.measure import reason

SECONDS = {"check": 240, "time": 480}  # the limit of a call
DRY_SECONDS = 3600  # the limit of a dry run
CORES_PER_ITEM = 2


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/lease.sh")
    parser.add_argument("what", choices=(*PLANS, "item"))
    parser.add_argument("names", nargs="*", metavar="ITEM", help="the items to run; default: all")
    parser.add_argument(
        "--output", type=Path, help="folder of the archive; default: $OUT, else --keep"
    )
    parser.add_argument("--keep", type=Path, help="folder of all files; default: gpu-results")
    parser.add_argument("--seconds", type=float, help="time limit of the call")
    parser.add_argument("--jobs", type=int, help="how many checks run at the same time")
    parser.add_argument("--dry-run", action="store_true", help="compile for sm_90; run no kernel")
    given = parser.parse_args(argv)
    plan = ITEMS if given.what == "item" else {item.name: item for item in PLANS[given.what]}
    for name in given.names:
        if name not in plan:
            parser.error(f"ITEM {name}: must be one of {', '.join(plan)}")
    # A dry run has a folder of its own, because no timing must use its switches.
    default = ROOT / ("gpu-results/dry-run" if given.dry_run else "gpu-results")
    given.keep = (given.keep or default).resolve()
    given.output = (given.output or Path(os.environ.get("OUT") or given.keep)).resolve()
    if given.what == "item":
        sys.exit(run_item(given.names[0], given.keep, given.seconds, given.dry_run))
    sys.exit(run_plan(given))


def run_item(name: str, folder: Path, seconds: float, dry: bool) -> int:
    """Run one item in this process, and print its findings as one line of JSON.

    Return the exit status: 1 if the item fails.
    """
    report = Report(name, folder, dry, time.monotonic() + seconds)
    with warnings.catch_warnings(record=True) as caught:
        try:
            if dry:
                from benchmarks.lease import fake_driver

                fake_driver.install()
                report.add(dry_run=True)  # its times are not those of a GPU
            switches.apply()
            ITEMS[name].run(report)
        except Exception as error:
            report.add(error=reason(error), lost=context_is_lost(report.device))
            if isinstance(error, Mismatch) and not report.found["lost"]:
                report.dump(error.tensors)
    if dry:
        from benchmarks.lease.fake_driver import LAUNCHES

        report.add(launches=dict(LAUNCHES))
    first_lines = {str(warning.message).splitlines()[0] for warning in caught}
    report.add(warned=sorted(first_lines))
    print(report.file.read_text(), flush=True)
    return 1 if "error" in report.found else 0


def context_is_lost(device: str) -> bool:
    """Return whether a kernel has broken the CUDA context of this process.

    Every later call fails then.
    """
    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def run_plan(given: argparse.Namespace) -> int:
    """Run the items of a plan. Return the exit status: 1 if an item is not ok."""
    if not given.dry_run and not torch.cuda.is_available():
        sys.exit(
            "torch sees no CUDA device: add --dry-run to compile the kernels without running them"
        )
    seconds = given.seconds or (DRY_SECONDS if given.dry_run else SECONDS[given.what])
    folder = given.keep / given.what
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
    folder.mkdir(parents=True)
    given.output.mkdir(parents=True, exist_ok=True)
    archive = given.output / f"{given.what}.tar.gz"
    run = Run(given.what, folder, archive, time.monotonic() + seconds, given.dry_run)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, run.interrupt)
    items = [item for item in PLANS[given.what] if not given.names or item.name in given.names]
    # Switches are saved in two places, because the output folder may be emptied between two calls.
    places = [given.output, given.keep]
    if given.what == "check":
        for place in places:
            (place / switches.FILE).unlink(missing_ok=True)
    else:
        on = switches.wanted(os.environ) or switches.load(places)
        os.environ |= dict.fromkeys(on, "1")
        explained = [f"{name} ({switches.MEANING[name]})" for name in on]
        print("switches:", ", ".join(explained) or "none")
    cores = len(os.sched_getaffinity(0))
    jobs = given.jobs or max(1, min(6, cores // CORES_PER_ITEM))
    run.work(items, jobs)
    print(f"\n{table(run.outcomes, figures)}")
    if given.what == "check":
        finish_check(run, places)
    print(f"archive: {archive}")
    return 0 if all(outcome.ok for outcome in run.outcomes) else 1


def figures(outcome: Outcome) -> str:
    """Return the figures of an item for the table."""
    return " ".join(f"{name} {x}" for name, x in outcome.found.get("brief", {}).items())


def finish_check(run: Run, places: Sequence[Path]) -> None:
    """Print and save the switches that the timings should run with, and save the ceilings."""
    failed = [outcome for outcome in run.outcomes if outcome.began and not outcome.ok]
    needed = {outcome.item.switch for outcome in failed}
    on = [name for name in switches.MEANING if name in needed]
    measured = run.folder / "ceilings-by-card.json"
    for place in places:
        switches.save(place, on)
        if measured.exists():
            shutil.copyfile(measured, place / "ceilings.json")
    pairs = " ".join(f"{name}=1" for name in on)
    print(f"switches for the timings: {pairs or 'none'}")
    print(" ".join(filter(None, (pairs, "bash benchmarks/lease.sh time"))))


if __name__ == "__main__":
    main()
