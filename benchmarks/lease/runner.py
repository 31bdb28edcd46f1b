"""Run each item in a process of its own, and update the archive after each of them.

What an item breaks or keeps in memory does not affect the next one. An item that reaches its time
limit is killed with all processes that it started. What it has saved by then is kept.
"""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import which
from threading import Event, Lock
from typing import Any

from benchmarks.lease.plan import Item
from benchmarks.measure import brief

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE_BYTES = 15 << 20  # limit of the archive, compressed; the largest files are left out
LEAST_SECONDS = 8  # an item does not start with less: importing torch takes a part of it
RESERVE = 4  # seconds kept for the last archive and the table
SANITIZER_SECONDS = 60
DRY_SECONDS = 900  # the limit of an item in a dry run, which compiles on a slow CPU
LOST = 2  # how many failed probes of the device in a row end the run


@dataclass
class Outcome:
    """The outcome of an item."""

    item: Item
    state: str  # "ok", "failed", "stopped after N s", "not run: why"
    seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.state == "ok"

    @property
    def began(self) -> bool:
        return not self.state.startswith("not run")

    def line(self) -> str:
        """Return the outcome as one line of JSON."""
        shown: dict[str, Any] = {"item": self.item.name, "state": self.state}
        shown["seconds"] = round(self.seconds, 1)
        if "error" in self.found:
            shown["error"] = brief(self.found["error"])
        shown |= self.found.get("brief", {})
        return json.dumps(shown)


@dataclass
class Run:
    """One call of `check` or `time`."""

    name: str  # "check" or "time"
    folder: Path  # for the files of the items
    archive: Path
    deadline: float  # on the clock of time.monotonic()
    dry: bool = False
    outcomes: list[Outcome] = field(default_factory=list)
    lost: int = 0  # failed probes of the device in a row
    lock: Any = field(default_factory=Lock)
    stopping: Event = field(default_factory=Event)
    running: set[int] = field(default_factory=set)  # process groups

    def left(self) -> float:
        """Return the seconds until the deadline, less RESERVE, and at least 0."""
        return max(0.0, self.deadline - RESERVE - time.monotonic())

    def work(self, items: Sequence[Item], jobs: int) -> None:
        """Run the items in order. Neighbours that may share the device run at the same time."""
        for group in grouped(items):
            with ThreadPoolExecutor(1 if group[0].alone else jobs) as pool:
                list(pool.map(self.one, group))
            self.sanitize([outcome for outcome in self.outcomes if outcome.item in group])

    def one(self, item: Item) -> None:
        """Run an item, print its line, keep its outcome and update the archive."""
        outcome = self.attempt(item)
        with self.lock:
            self.outcomes.append(outcome)
            print(outcome.line(), flush=True)
            self.pack()

    def attempt(self, item: Item) -> Outcome:
        """Run an item if there is time, and return its outcome."""
        limit = min(DRY_SECONDS if self.dry else item.seconds, self.left())
        if self.stopping.is_set():
            return Outcome(item, "not run: interrupted")
        if self.lost >= LOST:
            return Outcome(item, "not run: the device is lost")
        if limit < LEAST_SECONDS:
            return Outcome(item, "not run: no time")
        began = time.monotonic()
        state = self.bounded(self.command(item.name, limit), f"{item.name}.log", limit)
        outcome = Outcome(item, state, time.monotonic() - began, self.found(item.name))
        if state == "exit code 0":
            outcome.state = "ok"
        elif state.startswith("exit code"):
            outcome.state = "failed" if "error" in outcome.found else f"failed: {state}"
        if outcome.found.get("lost") or not state.startswith("exit code"):
            self.probe()
        return outcome

    def command(self, item: str, limit: float) -> list[str]:
        """Return the command that runs an item."""
        command = [sys.executable, "-u", "-m", "benchmarks.lease", "item", item]
        command += ["--keep", str(self.folder), "--seconds", f"{limit:.0f}"]
        return [*command, "--dry-run"] if self.dry else command

    def found(self, item: str) -> dict[str, Any]:
        """Return the findings that an item has saved."""
        file = self.folder / f"{item}.json"
        if not file.exists():
            return {}
        try:
            return json.loads(file.read_text())
        except ValueError:
            return {"error": f"{file.name} is not JSON"}

    def bounded(self, command: Sequence[str], log: str, seconds: float) -> str:
        """Run a command with a time limit, and return how it ended.

        log: the file of the folder that gets its output.
        """
        with (self.folder / log).open("w") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, process_group=0
            )
            with self.lock:
                self.running.add(process.pid)
            try:
                return f"exit code {process.wait(max(0.0, seconds))}"
            except subprocess.TimeoutExpired:
                return f"stopped after {seconds:.0f} s"
            finally:
                if process.poll() is None:  # at its time limit, or when this process is interrupted
                    os.killpg(process.pid, signal.SIGKILL)  # with all processes that it started
                    process.wait()  # until its memory is free
                with self.lock:
                    self.running.discard(process.pid)

    def probe(self) -> None:
        """Check whether a new process can use the device, and count failures."""
        if self.dry:
            return
        code = "import torch; assert torch.ones(8, device='cuda').sum() == 8"
        for _ in range(LOST):
            if self.bounded([sys.executable, "-c", code], "probe.log", 20) == "exit code 0":
                self.lost = 0
                return
            self.lost += 1

    def sanitize(self, outcomes: Sequence[Outcome]) -> None:
        """Run failed items again under compute-sanitizer, while there is time for it."""
        until = time.monotonic() + SANITIZER_SECONDS
        for outcome in [o for o in outcomes if o.item.sanitized and o.began and not o.ok]:
            limit = min(until - time.monotonic(), self.left())
            if limit < LEAST_SECONDS or self.dry or self.lost >= LOST:
                return
            name = outcome.item.name
            state = "compute-sanitizer is not installed"
            log = self.folder / f"{name}.sanitizer.log"
            if which("compute-sanitizer"):
                # A folder of its own, so that the findings of the first run are not overwritten.
                again = replace(self, folder=self.folder.parent / "sanitizer")
                again.folder.mkdir(exist_ok=True)
                command = ["compute-sanitizer", "--tool", "memcheck", *again.command(name, limit)]
                state = self.bounded(command, log.name, limit)
            lines = log.read_text().splitlines() if log.exists() else []
            summary = [line for line in lines if line.startswith("=========")][-1:]
            shown = {
                "item": f"{name}, again under compute-sanitizer",
                "state": state,
                "summary": summary,
            }
            print(json.dumps(shown), flush=True)
            self.pack()

    def pack(self) -> None:
        """Write the archive again, with all files of the folder.

        While it is too large, leave out the largest file.
        """
        kept: dict[str, bytes] = {}
        for file in sorted(self.folder.iterdir()):
            with suppress(FileNotFoundError):  # an item may rename a file at this moment
                kept[file.name] = file.read_bytes()
        left_out = []
        while len(packed := archived(self.name, kept)) > ARCHIVE_BYTES:
            left_out.append(max(kept, key=lambda name: len(kept[name])))
            del kept[left_out[-1]]
        unfinished = self.archive.with_name(f".{self.archive.name}")
        unfinished.write_bytes(packed)
        os.replace(unfinished, self.archive)
        if left_out:
            print(json.dumps({"left out of the archive": left_out}), flush=True)

    def interrupt(self, *_: object) -> None:
        """Kill everything that runs. The archive keeps what was found."""
        self.stopping.set()
        for group in list(self.running):
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


def archived(folder: str, files: Mapping[str, bytes]) -> bytes:
    """Return the files as a tar.gz."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=3) as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def grouped(items: Sequence[Item]) -> list[list[Item]]:
    """Split the items into groups of neighbours with the same value of `alone`."""
    groups: list[list[Item]] = []
    for item in items:
        if groups and groups[-1][0].alone == item.alone:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def table(outcomes: Sequence[Outcome], shown: Callable[[Outcome], str]) -> str:
    """Return the outcomes as text, with a line for each item."""
    lines = []
    for outcome in outcomes:
        line = (
            f"{outcome.item.name:24s}{outcome.seconds:7.1f} s  {outcome.state:28s} {shown(outcome)}"
        )
        lines.append(line.rstrip())
    return "\n".join(lines)
