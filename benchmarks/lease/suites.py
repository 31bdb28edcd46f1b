"""Run the project's tests on the device, in several processes if pytest-xdist is installed."""

import re
import subprocess
import sys
from importlib.util import find_spec

from benchmarks.lease.report import Report
from benchmarks.lease.runner import ROOT

FILES = ("test_triton.py", "test_fused.py", "test_decode.py", "test_device.py", "test_ops*.py")
# Leaves out the tests that compile ahead of time, which need no GPU.
WITHOUT = "not hopper and not oldest"
PROCESSES = 8
MARGIN = 5  # seconds to read the outcome


class Failed(Exception):
    """Tests failed, or none ended in time."""


def tests(report: Report) -> None:
    """Run the tests until the time is up, and report those that have failed by then."""
    files = [str(f) for pattern in FILES for f in sorted((ROOT / "tests").glob(pattern))]
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-k", WITHOUT, *files]
    if find_spec("xdist"):
        command += ["-n", str(PROCESSES)]
    else:
        report.add(note="pytest-xdist is not installed: the tests run in one process")
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
