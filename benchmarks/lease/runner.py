"""Run items apart, each with its own time limit; pack what they found after every one.

An item is a process of its own: what one breaks or holds, the next does not see. It is stopped at
its limit with all that it started, and what it had saved by then is kept.
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
ARCHIVE_BYTES = 15 << 20  # packed; larger files are left out, and named
LEAST_SECONDS = 8  # an item is not begun with less: python and torch take some of it
RESERVE = 4  # seconds kept for the last packing and the table
SANITIZER_SECONDS = 60
DRY_SECONDS = 900  # of an item that compiles on a slow CPU
LOST = 2  # probes of the device that fail, after which nothing more is begun


@dataclass
class Outcome:
    """How an item ended."""

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
        """One line of JSON: what matters, short."""
        shown: dict[str, Any] = {"item": self.item.name, "state": self.state}
        shown["seconds"] = round(self.seconds, 1)
        if "error" in self.found:
            shown["error"] = brief(self.found["error"])
        shown |= self.found.get("brief", {})
        return json.dumps(shown)


@dataclass
class Run:
    """One call: its folder of work, its archive and its deadline."""

    name: str  # "check" or "time"
    folder: Path  # of each item's files
    archive: Path
    deadline: float  # of time.monotonic()
    dry: bool = False
    outcomes: list[Outcome] = field(default_factory=list)
    lost: int = 0
    lock: Any = field(default_factory=Lock)
    stopping: Event = field(default_factory=Event)
    running: set[int] = field(default_factory=set)  # process groups

    def left(self) -> float:
        """Seconds until the deadline, less what the end needs; never negative."""
        return max(0.0, self.deadline - RESERVE - time.monotonic())

    def work(self, items: Sequence[Item], jobs: int) -> None:
        """Run the items in order: neighbours that may share the device side by side."""
        for group in grouped(items):
            with ThreadPoolExecutor(1 if group[0].alone else jobs) as pool:
                list(pool.map(self.one, group))
            self.sanitize([outcome for outcome in self.outcomes if outcome.item in group])

    def one(self, item: Item) -> None:
        """Run an item, print its line, keep its outcome and pack."""
        outcome = self.attempt(item)
        with self.lock:
            self.outcomes.append(outcome)
            print(outcome.line(), flush=True)
            self.pack()

    def attempt(self, item: Item) -> Outcome:
        """Run an item as far as the time allows."""
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
        """Return what runs an item."""
        command = [sys.executable, "-u", "-m", "benchmarks.lease", "item", item]
        command += ["--keep", str(self.folder), "--seconds", f"{limit:.0f}"]
        return [*command, "--dry-run"] if self.dry else command

    def found(self, item: str) -> dict[str, Any]:
        """Return what an item has saved."""
        file = self.folder / f"{item}.json"
        if not file.exists():
            return {}
        try:
            return json.loads(file.read_text())
        except ValueError:
            return {"error": f"{file.name} is not JSON"}

    def bounded(self, command: Sequence[str], log: str, seconds: float) -> str:
        """How a command ended in that time; its output goes to a file of the folder."""
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
                if process.poll() is None:  # late, or this process is interrupted
                    os.killpg(process.pid, signal.SIGKILL)  # with all that it started
                    process.wait()  # until its memory is free
                with self.lock:
                    self.running.discard(process.pid)

    def probe(self) -> None:
        """Count whether a fresh process can use the device."""
        if self.dry:
            return
        code = "import torch; assert torch.ones(8, device='cuda').sum() == 8"
        for _ in range(LOST):
            if self.bounded([sys.executable, "-c", code], "probe.log", 20) == "exit code 0":
                self.lost = 0
                return
            self.lost += 1

    def sanitize(self, outcomes: Sequence[Outcome]) -> None:
        """Run what failed again under compute-sanitizer, as far as the time for it allows."""
        until = time.monotonic() + SANITIZER_SECONDS
        for outcome in [o for o in outcomes if o.item.sanitized and o.began and not o.ok]:
            limit = min(until - time.monotonic(), self.left())
            if limit < LEAST_SECONDS or self.dry or self.lost >= LOST:
                return
            name, state = outcome.item.name, "compute-sanitizer is not installed"
            log = self.folder / f"{name}.sanitizer.log"
            if which("compute-sanitizer"):
                # what it finds goes to a folder of its own, and leaves the first findings alone
                again = replace(self, folder=self.folder.parent / "sanitizer")
                again.folder.mkdir(exist_ok=True)
                command = ["compute-sanitizer", "--tool", "memcheck", *again.command(name, limit)]
                state = self.bounded(command, log.name, limit)
            lines = log.read_text().splitlines() if log.exists() else []
            said = [line for line in lines if line.startswith("=========")][-1:]
            line = {"item": f"{name}, again under compute-sanitizer", "state": state, "said": said}
            print(json.dumps(line), flush=True)
            self.pack()

    def pack(self) -> None:
        """Write the archive anew: all files of the folder, but the largest while it is too big."""
        kept: dict[str, bytes] = {}
        for file in sorted(self.folder.iterdir()):
            with suppress(FileNotFoundError):  # one that an item was about to rename
                kept[file.name] = file.read_bytes()
        left_out = []
        while len(packed := archived(self.name, kept)) > ARCHIVE_BYTES:
            left_out.append(max(kept, key=lambda name: len(kept[name])))
            del kept[left_out[-1]]
        aside = self.archive.with_name(f".{self.archive.name}")
        aside.write_bytes(packed)
        os.replace(aside, self.archive)
        if left_out:
            print(json.dumps({"left out of the archive": left_out}), flush=True)

    def interrupt(self, *_: object) -> None:
        """Stop everything that runs; what was found stays in the archive."""
        self.stopping.set()
        for group in list(self.running):
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


def archived(folder: str, files: Mapping[str, bytes]) -> bytes:
    """Return a tar.gz of the files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=3) as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def grouped(items: Sequence[Item]) -> list[list[Item]]:
    """Return runs of neighbours that are all alone, or all not."""
    groups: list[list[Item]] = []
    for item in items:
        if groups and groups[-1][0].alone == item.alone:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def table(outcomes: Sequence[Outcome], shown: Callable[[Outcome], str]) -> str:
    """Return a line for each item."""
    lines = [
        f"{o.item.name:24s}{o.seconds:7.1f} s  {o.state:28s} {shown(o)}".rstrip() for o in outcomes
    ]
    return "\n".join(lines)
