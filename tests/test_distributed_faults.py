"""Ranks that die, hang or raise end the run on all ranks, and the run can be resumed."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from expo_fast.distributed import session
from jobs import metrics_of
from ranks import (
    ROOT,
    SMALL,
    WORKER,
    difference,
    free_port,
    run_ranks,
    state_bits,
    write_job_files,
)

FLAGS = (
    "--method expo-grpo --exp-sft-coef 1 --batch-invariant --reward {root}/rewards.py:odd "
    "--explanations-per-question 12 --eval-every 1 --collective-timeout 15 "
)
TIMEOUT_S = 15
PHASES = ("generate", "reward", "explain", "diagnose", "forward_backward", "optimizer")


@dataclass(frozen=True)
class Ended:
    status: int
    seconds: float
    output: str


def torchrun(flags: str, *, fault: str = "none:none:0:0", restarts: int = 0) -> Ended:
    """Run `fault_worker.py` on two ranks under torchrun."""
    options = ["--nproc-per-node=2", f"--max-restarts={restarts}", f"--master-port={free_port()}"]
    (ended,) = agents([options], flags, fault)
    return ended


def two_machines(flags: str, *, fault: str = "none:none:0:0") -> list[Ended]:
    """Run `fault_worker.py` under two agents of torchrun, one rank each."""
    port = free_port()
    options = []
    for node in range(2):
        options.append(
            [
                "--nnodes=2",
                f"--node-rank={node}",
                "--nproc-per-node=1",
                "--master-addr=127.0.0.1",
                f"--master-port={port}",
            ]
        )
    return agents(options, flags, fault)


def agents(options: list[list[str]], flags: str, fault: str) -> list[Ended]:
    """Run agents of torchrun at the same time. options: of each agent."""
    paths = os.pathsep.join([str(ROOT), str(WORKER.parent)])
    variables = {"FAULT": fault, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    worker = [str(WORKER.with_name("fault_worker.py")), *flags.split()]
    start = time.monotonic()
    processes = []
    for own in options:
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *own, *worker],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
    ended = []
    for process in processes:
        output, _ = process.communicate(timeout=300)
        ended.append(Ended(process.returncode, time.monotonic() - start, output))
    return ended


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def flags(root: Path) -> str:
    return SMALL + write_job_files(root) + FLAGS.format(root=root)


@pytest.fixture(scope="module")
def unbroken(root: Path, flags: str) -> Path:
    """Return a run of two ranks without a fault."""
    done = torchrun(f"{flags} --output-dir {root}/unbroken")
    assert done.status == 0, done.output
    return root / "unbroken"


@pytest.mark.faults
@pytest.mark.parametrize("phase", [*PHASES, "save", "evaluate"])
def test_a_killed_rank_ends_all_and_the_run_resumes(
    phase: str, root: Path, flags: str, unbroken: Path
):
    given = f"{flags} --output-dir {root}/{phase}"
    killed = torchrun(given, fault=f"kill:{phase}:2:1")
    assert killed.status != 0
    assert killed.seconds < TIMEOUT_S + 60
    (line,) = [each for each in killed.output.splitlines() if each.startswith("error: ")]
    assert "rank 1 in phase" in line
    assert "ended without a message" in line
    resumed = torchrun(given)
    assert resumed.status == 0, resumed.output
    assert_equal(root / phase, unbroken)


def assert_equal(run: Path, unbroken: Path) -> None:
    last = "checkpoints/step-3"
    assert state_bits(run / last) == state_bits(unbroken / last)
    assert [row["step"] for row in metrics_of(run)] == [1, 2, 3]


@pytest.mark.faults
def test_a_rank_that_hangs_ends_the_run_after_the_timeout(root: Path, flags: str):
    hung = torchrun(f"{flags} --output-dir {root}/hung", fault="hang:reward:2:1")
    assert hung.status != 0
    assert hung.seconds < TIMEOUT_S + 60
    text = "error: rank 1 in phase 'reward' of step 2 did not answer within --collective-timeout 15"
    assert hung.output.count(text) == 1, hung.output


def require_one_message(flags: str, fault: str, text: str) -> None:
    """Check that all ranks end in time, and that the text is printed once."""
    failed = torchrun(flags, fault=fault)
    assert failed.status != 0
    assert failed.seconds < TIMEOUT_S + 60
    assert failed.output.count(text) == 1, failed.output
    assert "did not answer" not in failed.output


@pytest.mark.faults
@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("raise:forward_backward:2:1", "rank 1 failed in phase 'forward_backward' of step 2: Key"),
        ("raise:reward:2:0", "rank 0 failed in phase 'reward' of step 2: KeyError: 'broken'"),
        ("memory:forward_backward:1:1", "of step 1: out of memory, lower --pack-tokens or use"),
    ],
)
def test_an_error_of_a_rank_is_told_once(fault: str, text: str, root: Path, flags: str):
    given = f"{flags} --output-dir {root}/{fault.replace(':', '-')}"
    require_one_message(given, fault, text)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("memory:layer:1:1", "rank 1 failed in phase 'generate' of step 1: out of memory"),
        ("kill:layer:2:1", "rank 1 in phase 'generate' of step 2 ended without a message"),
        ("term:layer:2:1", "interrupted by SIGTERM: step 1 is saved"),
    ],
)
def test_a_fault_within_a_layer_of_the_sampler_ends_all(
    fault: str, text: str, root: Path, flags: str
):
    """After an error, the other rank waits in a gather of a later layer, not in an exchange."""
    by_layer = flags.replace("--batch-invariant", "--shard model --gather layers")
    given = f"{by_layer} --model {root}/deep --output-dir {root}/{fault.replace(':', '-')}"
    require_one_message(given, fault, text)


@pytest.mark.faults
def test_torchrun_restarts_a_run(root: Path, flags: str, unbroken: Path):
    given = f"{flags} --output-dir {root}/restarted"
    done = torchrun(given, fault="kill:forward_backward:2:1", restarts=1)
    assert done.status == 0, done.output
    assert_equal(root / "restarted", unbroken)


@pytest.mark.faults
def test_two_machines_learn_what_one_learns(root: Path, flags: str, unbroken: Path):
    given = f"{flags} --output-dir {root}/machines"
    for ended in two_machines(given):
        assert ended.status == 0, ended.output
    assert_equal(root / "machines", unbroken)


@pytest.mark.faults
def test_a_rank_killed_on_another_machine_ends_both(root: Path, flags: str, unbroken: Path):
    given = f"{flags} --output-dir {root}/machine-lost"
    first, second = two_machines(given, fault="kill:forward_backward:2:1")
    assert first.status != 0
    assert second.status != 0
    assert max(first.seconds, second.seconds) < TIMEOUT_S + 60
    told = [line for line in first.output.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, first.output
    assert "rank 1 in phase 'forward_backward' of step 2 ended without a message" in told[0]
    for ended in two_machines(given):
        assert ended.status == 0, ended.output
    assert_equal(root / "machine-lost", unbroken)


@pytest.mark.faults
def test_a_signal_to_one_rank_stops_all_at_a_boundary(root: Path, flags: str, unbroken: Path):
    given = f"{flags} --output-dir {root}/stopped"
    stopped = torchrun(given, fault="term:reward:2:1")
    assert stopped.status != 0
    assert stopped.output.count("interrupted by SIGTERM: step 1 is saved") == 1, stopped.output
    done = torchrun(given)
    assert done.status == 0, done.output
    assert_equal(root / "stopped", unbroken)


@pytest.mark.faults
def test_a_run_moves_from_1_to_2_to_4_to_1_ranks(root: Path):
    """The last weights are those of one process, up to rounding."""
    flags = SMALL + write_job_files(root) + "--method sft --steps 4 "
    sizes = (1, 2, 4, 1)
    for step, size in enumerate(sizes, start=1):
        given = f"{flags} --output-dir {root}/moved --steps {step}"
        if size == 1:
            done = subprocess.run(
                [sys.executable, "-m", "expo_fast.train", *given.split()],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
        else:
            jobs = [{"flags": given, "folder": f"{root}/ended-{size}"}]
            run_ranks(size, jobs, root / f"jobs-{size}")
    alone = f"{flags} --output-dir {root}/alone"
    run = [sys.executable, "-m", "expo_fast.train", *alone.split()]
    subprocess.run(run, cwd=ROOT, check=True, capture_output=True)
    assert difference(root / "alone", root / "moved", root / "model").update <= 1e-3


@pytest.mark.faults
def test_four_ranks_learn_what_one_process_learns(root: Path, flags: str):
    jobs = []
    for name, method in FOUR.items():
        given = f"{SMALL} {write_job_files(root)} {method.format(root=root)}"
        jobs.append(
            {"flags": f"{given} --output-dir {root}/four/{name}", "folder": f"{root}/{name}"}
        )
    run_ranks(4, jobs, root / "jobs-of-four")
    alone = [dict(job, flags=job["flags"].replace("/four/", "/one/")) for job in jobs]
    run_ranks(1, alone, root / "jobs-of-one")
    for name in FOUR:
        found = difference(root / "one" / name, root / "four" / name, root / "model")
        assert found.loss <= 1e-6, name
        assert found.gradient <= 1e-5, name
        assert found.update <= 1e-3, name


EXACT = "--batch-invariant --reward {root}/rewards.py:odd "
FOUR = {
    "sft": "--method sft",
    "sft-model": "--method sft --shard model",
    "grpo-layers": "--method grpo --reward {root}/rewards.py:odd --shard model --gather layers",
    "sft-lora": "--method sft --lora-rank 3",
    "gspo": "--method grpo --objective gspo --updates-per-batch 2 " + EXACT,
    "expo-grpo": "--method expo-grpo --exp-sft-coef 1 --explanations-per-question 12 "
    "--updates-per-batch 2 " + EXACT,
    "expo-dpo": "--method expo-dpo --explanations-per-question 12 " + EXACT,
}


def test_an_incomplete_environment_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(ValueError, match=r"WORLD_SIZE=2 are set, but MASTER_ADDR is not"),
        session.started(),
    ):
        pass


def test_a_gpu_too_few_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(
        ValueError, match=r"local rank 2 has no GPU: this machine has 2, so use --n"
    ):
        session.choose_device("auto")
    with pytest.raises(ValueError, match=r"device='cuda:1': use cuda"):
        session.choose_device("cuda:1")
    session.choose_device("cpu")
