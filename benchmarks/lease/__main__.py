"""Run `bash benchmarks/lease.sh`, which says more."""

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

SECONDS = {"check": 240, "time": 480}
DRY_SECONDS = 3600
CORES_AN_ITEM = 2


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/lease.sh")
    parser.add_argument("what", choices=(*PLANS, "item"))
    parser.add_argument("names", nargs="*", metavar="ITEM", help="some of the items")
    parser.add_argument("--output", type=Path, help="for the archive; default: $OUT, or as --keep")
    parser.add_argument("--keep", type=Path, help="for all files; default: gpu-results")
    parser.add_argument("--seconds", type=float, help="for all of it")
    parser.add_argument("--jobs", type=int, help="checks side by side")
    parser.add_argument("--dry-run", action="store_true", help="compile for sm_90; run no kernel")
    given = parser.parse_args(argv)
    plan = ITEMS if given.what == "item" else {item.name: item for item in PLANS[given.what]}
    for name in given.names:
        if name not in plan:
            parser.error(f"{name}: must be one of {', '.join(plan)}")
    # The switches of a dry run are nobody's: it keeps them elsewhere.
    usual = ROOT / ("gpu-results/dry-run" if given.dry_run else "gpu-results")
    given.keep = (given.keep or usual).resolve()
    given.output = (given.output or Path(os.environ.get("OUT") or given.keep)).resolve()
    if given.what == "item":
        sys.exit(item(given.names[0], given.keep, given.seconds, given.dry_run))
    sys.exit(call(given))


def item(name: str, folder: Path, seconds: float, dry: bool) -> int:
    """Run one item in this process; print what it found as one line of JSON."""
    report = Report(name, folder, dry, time.monotonic() + seconds)
    with warnings.catch_warnings(record=True) as said:
        try:
            if dry:
                from benchmarks.lease import fake_driver

                fake_driver.install()
                report.add(dry_run=True)  # whatever is timed, no GPU has run it
            switches.apply()
            ITEMS[name].run(report)
        except Exception as error:
            report.add(error=reason(error), lost=lost(report.device))
            if isinstance(error, Mismatch) and not report.found["lost"]:
                report.dump(error.tensors)
    if dry:
        from benchmarks.lease.fake_driver import LAUNCHES

        report.add(launches=dict(LAUNCHES))
    report.add(warned=sorted({str(w.message).splitlines()[0] for w in said}))
    print(report.file.read_text(), flush=True)
    return 1 if "error" in report.found else 0


def lost(device: str) -> bool:
    """Whether a kernel has broken this process's context: every later call fails then."""
    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def call(given: argparse.Namespace) -> int:
    """Run a plan: 0 if all of it is well."""
    if not given.dry_run and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device; --dry-run compiles the kernels and runs none")
    seconds = given.seconds or (DRY_SECONDS if given.dry_run else SECONDS[given.what])
    folder = given.keep / given.what
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
    folder.mkdir(parents=True)
    given.output.mkdir(parents=True, exist_ok=True)
    archive = given.output / f"{given.what}.tar.gz"
    run = Run(given.what, folder, archive, time.monotonic() + seconds, given.dry_run)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, run.interrupt)
    items = [i for i in PLANS[given.what] if not given.names or i.name in given.names]
    # An output folder may be emptied between two calls, which the other is not.
    places = [given.output, given.keep]
    if given.what == "check":
        for place in places:
            (place / switches.FILE).unlink(missing_ok=True)
    else:
        on = switches.wanted(os.environ) or switches.load(places)
        os.environ |= dict.fromkeys(on, "1")
        print("switches:", ", ".join(f"{name} ({switches.MEANING[name]})" for name in on) or "none")
    jobs = given.jobs or max(1, min(6, len(os.sched_getaffinity(0)) // CORES_AN_ITEM))
    run.work(items, jobs)
    print(f"\n{table(run.outcomes, figures)}")
    if given.what == "check":
        finish_check(run, places)
    print(f"archive: {archive}")
    return 0 if all(o.ok for o in run.outcomes) else 1


def figures(outcome: Outcome) -> str:
    """Return what a table says of an item."""
    return " ".join(f"{name} {x}" for name, x in outcome.found.get("brief", {}).items())


def finish_check(run: Run, places: Sequence[Path]) -> None:
    """Print and save the switches that the timings should run with, and the ceilings."""
    failed = [outcome for outcome in run.outcomes if outcome.began and not outcome.ok]
    on = [s for s in switches.MEANING if any(o.item.switch == s for o in failed)]
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
