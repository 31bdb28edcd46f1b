"""The fault campaign: `make test-faults`. docs/reliability.md has its table.

Runs are killed, stopped and starved of disk space, and their files are damaged. Each is resumed and
compared with an uninterrupted run to the bit: metrics, texts, pairs and every file of the
checkpoints.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fault_runs
from expo_fast.storage import checkpoint
from fault_runs import METHODS, difference, finish, flags, fresh, kill, snapshot, start, wait
from jobs import rows_in

pytestmark = pytest.mark.faults
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fault_runs.make_job(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def unbroken(job: Path) -> Callable[[str], Path]:
    """Return a function that returns the folder of a run that was never stopped."""

    def run(method: str) -> Path:
        folder = job / "unbroken" / method
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            finish(flags(job, method, folder), job / f"unbroken-{method}.log")
        return folder

    return run


def seconds_of(run: Path) -> float:
    """Return the duration of a run, between its first file and its last."""
    times = [path.stat().st_mtime for path in run.rglob("*") if path.is_file()]
    return max(times) - min(times)


@pytest.mark.parametrize("method", METHODS)
def test_kills_at_random_times(method: str, job: Path, tmp_path: Path, unbroken):
    expected = snapshot(unbroken(method))
    duration = seconds_of(unbroken(method)) + 0.3
    dice = random.Random(method)
    n_kills = 0
    for attempt in range(4):
        run = tmp_path / f"run-{attempt}"
        given = flags(job, method, run)
        for _ in range(4):
            pid = start(given, tmp_path / "log")
            if wait(pid, dice.uniform(0.02, duration / 2)) is None:
                kill(pid)
                n_kills += 1
        finish(given, tmp_path / "log")
        assert difference(snapshot(run), expected) == []
    assert n_kills >= 4
    print(f"{method}: {n_kills} kills in 4 runs")


@pytest.mark.parametrize("method", ["grpo", "expo-dpo-online", "lora"])
def test_kills_inside_a_save(method: str, job: Path, tmp_path: Path, unbroken):
    expected = snapshot(unbroken(method))
    dice = random.Random(method)
    n_kills = 0
    for attempt in range(5):
        run = tmp_path / f"run-{attempt}"
        given = flags(job, method, run)
        for _ in range(3):
            pid = start(given, tmp_path / "log")
            if wait_for_save(pid, run):
                time.sleep(dice.uniform(0, 0.025))
                kill(pid)
                n_kills += 1
        finish(given, tmp_path / "log")
        assert difference(snapshot(run), expected) == []
    assert n_kills >= 4
    print(f"{method}: {n_kills} kills inside saves")


def wait_for_save(pid: int, run: Path) -> bool:
    """Wait until a process writes a checkpoint. Return False if it ends before."""
    before = {path.name for path in run.glob("checkpoints/.tmp-*")}
    while wait(pid, 0.001) is None:
        if {path.name for path in run.glob("checkpoints/.tmp-*")} - before:
            return True
    return False


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_stops_at_random_times(method: str, signum, job: Path, tmp_path: Path, unbroken):
    expected = snapshot(unbroken(method))
    duration = seconds_of(unbroken(method)) + 0.3
    dice = random.Random(f"{method} {signum}")
    n_stops = 0
    longest = 0.0
    for attempt in range(3):
        run = tmp_path / f"run-{attempt}"
        given = flags(job, method, run)
        for _ in range(3):
            pid = start(given, tmp_path / "log", fault_runs.interruptions_before_the_run)
            if wait(pid, dice.uniform(0.02, duration)) is not None:
                continue
            asked = time.monotonic()
            os.kill(pid, signum)
            status = wait(pid, 20)
            longest = max(longest, time.monotonic() - asked)
            assert status in (0, 128 + signum), (tmp_path / "log").read_text()[-3000:]
            n_stops += status != 0
        finish(given, tmp_path / "log")
        assert difference(snapshot(run), expected) == []
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert longest < 10
    print(f"{method}: {n_stops} stops by {signum.name}, at most {longest:.2f} s")


CALLS = ("openat", "write", "fsync", "rename", "mkdir", "unlink", "ftruncate", "close", "lseek")
INJECTED = ("signal=KILL", "error=ENOSPC", "error=EIO")


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("call", CALLS)
def test_faults_in_each_system_call_of_a_save(call: str, job: Path, tmp_path: Path):
    """A checkpoint is never lost, and no failed save counts as one."""
    base = tmp_path / "base"
    finish(flags(job, "grpo", base, "--steps 2 --eval-every 0"), tmp_path / "log")
    found: Counter[str] = Counter()
    for what in INJECTED:
        for number in range(1, 60):
            run = fresh(tmp_path / "run")
            shutil.copytree(base, run)
            status, hit, output = save_under_strace(run, call, f"{what}:when={number}", tmp_path)
            if not hit:
                break
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # no checkpoint is damaged
                newest = checkpoint.newest(run)
            assert newest is not None
            step = int(newest.name.removeprefix("step-"))
            assert step in (2, 3), (call, what, number, output)
            assert status in (0, 2, -9), (call, what, number, status, output)
            if status == 0:
                assert step == 3, (call, what, number, output)
            found[what] += 1
    print(f"{call}: {dict(found)}")


def save_under_strace(run: Path, call: str, inject: str, tmp: Path) -> tuple[int, bool, str]:
    """Save step 3 with a fault in a system call.

    Return the exit status (0: saved, 2: OSError), whether the fault was injected, and the output.
    """
    log = fresh_file(tmp / "save.log")
    trace = fresh_file(tmp / "strace.log")
    pid = os.fork()
    if pid == 0:
        fault_runs.save_when_continued(run, log)
    os.waitpid(pid, os.WUNTRACED)
    command = ["strace", "-f", "-p", str(pid), "-o", str(trace), "-e", f"trace={call}"]
    tracer = subprocess.Popen([*command, "-e", f"inject={call}:{inject}"], stderr=subprocess.PIPE)
    assert tracer.stderr is not None
    while b"attached" not in tracer.stderr.readline():
        pass
    os.kill(pid, signal.SIGCONT)
    while True:
        _, status = os.waitpid(pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            break
        os.kill(pid, signal.SIGCONT)
    tracer.communicate()
    code = os.waitstatus_to_exitcode(status)
    return code, "INJECTED" in trace.read_text() or code == -9, log.read_text()


def fresh_file(path: Path) -> Path:
    path.unlink(missing_ok=True)
    return path


def flip(path: Path, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    bit = dice.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path, random.Random], object]] = {
    "flip": flip,
    "cut": lambda path, dice: os.truncate(path, path.stat().st_size // 2),
    "zero": lambda path, dice: path.write_bytes(bytes(path.stat().st_size)),
    "remove": lambda path, dice: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_files(damage: str, job: Path, tmp_path: Path):
    """Each is found, and the run continues from the checkpoint before."""
    base = tmp_path / "base"
    finish(flags(job, "grpo", base, "--schedule constant --steps 3"), tmp_path / "log")
    expected = snapshot_of_constant(job, tmp_path)
    dice = random.Random(damage)
    files = [p.relative_to(base) for p in base.glob("checkpoints/step-3/**/*") if p.is_file()]
    assert len(files) >= 8
    for file in files:
        run = fresh(tmp_path / "run")
        shutil.copytree(base, run)
        DAMAGES[damage](run / file, dice)
        log = fresh_file(tmp_path / "log")
        finish(flags(job, "grpo", run, "--schedule constant"), log)
        assert f"skipped the damaged checkpoint {run}/checkpoints/step-3" in log.read_text(), file
        assert difference(snapshot(run), expected) == [], file
    print(f"{damage}: {len(files)} files")


def snapshot_of_constant(job: Path, tmp_path: Path) -> dict:
    """Return the snapshot of a run that can be made longer: its learning rate is constant."""
    run = tmp_path / "constant"
    finish(flags(job, "grpo", run, "--schedule constant"), tmp_path / "constant.log")
    return snapshot(run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a file system of 24 MB in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no permission to mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("method", ["grpo", "expo-dpo-online", "lora"])
def test_a_disk_fills_at_step_3_and_is_emptied_at_step_6(
    method: str, job: Path, tmp_path: Path, small_disk: Path
):
    more = "--steps 8 --keep-checkpoints 1"
    finish(flags(job, method, tmp_path / "good", more), tmp_path / "log")
    log = fresh_file(tmp_path / "log")
    run = small_disk / "run"

    def prepare() -> None:
        fault_runs.fill_disk(small_disk, at=3, until=6)

    status = wait(start(flags(job, method, run, more), log, prepare))
    assert status == 0, log.read_text()[-3000:]
    assert "could not be written" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert difference(snapshot(run), snapshot(tmp_path / "good")) == []


LONG = 200
FIRST = 40  # steps after which every cache is warm


def test_no_descriptor_process_or_memory_is_lost_in_200_steps(job: Path, tmp_path: Path):
    """Also not by the workers of the grader, of which an answer ends one in each fifth step."""
    found = tmp_path / "usage.jsonl"
    more = f"--steps {LONG} --checkpoint-every 20 --eval-every 50 --report-to tensorboard"
    given = [*flags(job, "expo-grpo", tmp_path / "run", more)]
    pid = start(given, tmp_path / "log", lambda: fault_runs.record_usage(found))
    assert wait(pid, 300) == 0, (tmp_path / "log").read_text()[-3000:]
    rows = rows_in(found)
    assert len(rows) == LONG
    warm = rows[FIRST : FIRST + 20]
    last = rows[-20:]
    for what in ("descriptors", "processes", "threads"):
        most = max(row[what] for row in warm)
        assert max(row[what] for row in last) <= most, what
    grown = min(row["memory"] for row in last) - min(row["memory"] for row in warm)
    assert grown < 8 << 20  # 50 kB per step
    print(f"{LONG} steps: {last[-1]}, memory grew by {grown >> 10} KiB")


# Phase of the default model's run: the function at whose call the signal comes, the number of the
# call, and the step that is saved. "start" has no function.
PHASES = {
    "imports": ("", 0.6, 0),
    "loading": ("expo_fast.train:load_model", 1, 0),
    "first evaluation": ("expo_fast.inference.scheduler:Scheduler._step", 3, 0),
    "sampling": ("expo_fast.inference.scheduler:Scheduler._decode", 70, 1),
    "grading": ("expo_fast.algorithms.trainer:judge_attempts", 2, 1),
    "explanations": ("expo_fast.algorithms.explanations:accept_explanations", 2, 1),
    "diagnosis": ("expo_fast.algorithms.grpo:diagnostic_samples", 2, 1),
    "forward and backward": ("expo_fast.algorithms.grpo:policy_backward", 2, 1),
    "optimizer": ("expo_fast.modeling.optimizer:Optimizer.step", 2, 2),
    "evaluation": ("expo_fast.train:evaluate", 2, 1),
    "save": ("expo_fast.storage.checkpoint:_write_state", 1, 1),
}
REAL = (
    "--steps 2 --prompts-per-step 2 --num-generations 2 --explanations-per-question 2 "
    "--max-completion-length 24 --eval-every 1 --eval-limit 2 --eval-samples 1 "
    "--checkpoint-every 1 --keep-checkpoints 1 --keep-best 0 --entropy-coef 0.001 --report-to none"
)


@pytest.fixture(scope="module")
def unbroken_default(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Return the snapshot of a run of the default model that was never stopped."""
    run = tmp_path_factory.mktemp("default") / "run"
    command = [sys.executable, "-m", "expo_fast.train", "--output-dir", str(run), *REAL.split()]
    subprocess.run(command, check=True, capture_output=True)
    found = snapshot(run)
    shutil.rmtree(run)
    return found


@pytest.mark.parametrize("phase", PHASES)
def test_sigterm_in_a_phase_of_the_default_model(phase: str, tmp_path: Path, unbroken_default):
    where, call, saved = PHASES[phase]
    run = tmp_path / "run"
    rest = ["--output-dir", str(run), *REAL.split()]
    process = subprocess.Popen(
        [sys.executable, str(TESTS / "signalled.py"), where, str(call), *rest],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output, _ = process.communicate(timeout=500)
    ended = time.time()
    asked = [line for line in output.splitlines() if line.startswith("signal at ")]
    assert asked, output
    seconds = ended - float(asked[0].split()[-1])
    assert process.returncode == 128 + signal.SIGTERM, output
    assert seconds < 25
    assert "Traceback" not in output
    newest = checkpoint.newest(run)
    assert (newest.name if newest else None) == (f"step-{saved}" if saved else None), output
    command = [sys.executable, "-m", "expo_fast.train", *rest]
    subprocess.run(command, check=True, capture_output=True)
    found = difference(snapshot(run), unbroken_default)
    shutil.rmtree(run)
    assert found == []
    print(f"{phase}: saved step {saved}, exit status 143 after {seconds:.1f} s")
