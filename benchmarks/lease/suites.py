"""The project's own tests, on the device, side by side where pytest-xdist is there."""

import re
import subprocess
import sys
from importlib.util import find_spec

from benchmarks.lease.report import Report
from benchmarks.lease.runner import ROOT

FILES = ("test_triton.py", "test_fused.py", "test_decode.py", "test_device.py", "test_ops*.py")
WITHOUT = "not hopper and not oldest"  # compile ahead of time, which needs no GPU
PROCESSES = 8
MARGIN = 5  # seconds to read the outcome in


class Failed(Exception):
    """Some tests failed, or not all of them ran."""


def tests(report: Report) -> None:
    """Run them until the time is up; what had failed by then is known."""
    files = [str(f) for pattern in FILES for f in sorted((ROOT / "tests").glob(pattern))]
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-k", WITHOUT, *files]
    if find_spec("xdist"):
        command += ["-n", str(PROCESSES)]
    else:
        report.add(note="pytest-xdist is not installed: one process")
    if report.dry:
        command.append("--collect-only")
    log = report.folder / "pytest.txt"
    with log.open("w") as out:
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                timeout=max(0.0, report.left() - MARGIN),
            )  # fmt: skip
            outcome = f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            outcome = "out of time"
    text = log.read_text()
    named = re.findall(r"(?:FAILED|ERROR) (tests/\S+)|(tests/\S+) (?:FAILED|ERROR)", text)
    failed = sorted({first or second for first, second in named})
    passed = len(re.findall(r"\bPASSED\b", text))
    report.add(outcome=outcome, failed_tests=failed)
    report.show(passed=passed, failed=len(failed), pytest=outcome)
    if outcome != "exit code 0" and (failed or outcome != "out of time"):
        raise Failed(f"{outcome}; failed: {', '.join(failed[:20])}")
    if outcome == "out of time" and not passed:
        raise Failed("no test ended in time")
