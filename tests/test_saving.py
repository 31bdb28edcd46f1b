"""A failed save is tried again, the best checkpoint is kept, and no weight that is not finite."""

import errno
import resource
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expo_fast import train
from expo_fast.algorithms import saving
from expo_fast.algorithms.scores import Scores
from expo_fast.cli import exit_status
from expo_fast.reporting.jsonl import read_rows
from expo_fast.storage import checkpoint
from expo_fast.storage.files import PatientFiles, in_bytes
from expo_fast.storage.finite import first_non_finite
from expo_fast.weights import save_model
from jobs import run_flags, write_rows
from tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("lenient")

STEPS = 8
FULL = range(3, 6)  # steps at which the disk is full


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model, data, and a reward that some samples of a group earn."""
    root = tmp_path_factory.mktemp("job")
    model = tiny_model(eos_token_id=list(range(1, 70)))  # half of its completions have an end
    save_model(model, tiny_tokenizer(), root / "model")
    rows = [
        {"question": f"{n} + 1?", "answer": str(n + 1), "solution": f"{n} + 1 = {n + 1}."}
        for n in range(9)
    ]
    write_rows(root / "train.jsonl", rows)
    (root / "rewards.py").write_text(
        "def odd(completion_ids, **columns):\n"
        "    return [float(sum(ids) % 2) for ids in completion_ids]\n"
        "def falls(trainer_state, completion_ids, **columns):\n"
        "    right = trainer_state.global_step < 2\n"
        "    return [float(right) if i else 0.0 for i in range(len(completion_ids))]\n"
    )
    return root


def flags(folder: Path, run: Path, **changes: object) -> list[str]:
    given: dict[str, object] = {
        "method": "grpo",
        "steps": STEPS,
        "eval_every": 0,
        "checkpoint_every": 1,
        "schedule": "constant",
    }
    return run_flags(folder, run, **(given | changes))


@contextmanager
def full_disk() -> Iterator[None]:
    """Let writes beyond the first bytes of a file fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fill_disk_at(steps: range, monkeypatch: pytest.MonkeyPatch, loop: str) -> None:
    """Let the disk be full during some steps (from 1), with their saves."""
    usual = train.LOOPS[loop]
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def run_step(trainer, step, phases):
        limit = 10 if step + 1 in steps else unlimited[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        return usual(trainer, step, phases)

    monkeypatch.setitem(train.LOOPS, loop, run_step)


@contextmanager
def unlimited_afterwards() -> Iterator[None]:
    """Restore the limit of the size of files at the end of a test.

    A fixture would restore it after pytest has written the result, which may go to a large file.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def files_of(run: Path) -> dict[str, Any]:
    """Return the rows of a run without times, its texts, its pairs and its last checkpoint."""
    rows = [dict(row) for row in read_rows(run / "metrics.jsonl")]
    found: dict[str, Any] = {
        "rows": [{k: v for k, v in r.items() if "time/" not in k} for r in rows]
    }
    for file in [*run.glob("completions/*"), *run.glob("pairs/*")]:
        found[file.name] = file.read_bytes()
    found["checkpoints"] = names(run)
    last = run / f"checkpoints/step-{len(rows)}"
    for file in (last / "model.safetensors", last / "trainer_state/state.safetensors"):
        found |= {f"{file.name}: {name}": x for name, x in load_file(file).items()}
    return found


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def assert_equal(ours: dict[str, Any], others: dict[str, Any]) -> None:
    assert ours.keys() == others.keys()
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, others[name]), name
        else:
            assert value == others[name], name


def run_warned(given: list[str]) -> list[str]:
    """Run and return the warnings. Fail if the exit status is not 0."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert exit_status.run(train.main, given) == 0
    return [str(each.message) for each in seen]


@unlimited_afterwards()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_disk_that_is_full_for_some_steps_changes_nothing(
    folder: Path, tmp_path: Path, monkeypatch, capsys
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run_warned(flags(folder, tmp_path / "good")) == []
    fill_disk_at(FULL, monkeypatch, "grpo")
    seen = run_warned(flags(folder, tmp_path / "full"))
    assert [message.split()[0] for message in seen] == [
        "completions",
        "metrics.jsonl",
        "tensorboard",
    ]
    assert_equal(files_of(tmp_path / "full"), files_of(tmp_path / "good"))
    printed = capsys.readouterr().out
    assert "step-3 could not be written" in printed
    assert "the run goes on, next attempt after 1 steps" in printed
    assert "next attempt after 4 steps" in printed
    for run in ("good", "full"):
        events = EventAccumulator(str(tmp_path / run / "tensorboard")).Reload()
        steps = [event.step for event in events.Scalars("grad_norm")]
        assert steps == [*range(1, STEPS + 1)]


@unlimited_afterwards()
def test_a_failed_save_is_tried_again_before_the_next_one_is_due(
    folder: Path, tmp_path: Path, monkeypatch
):
    fill_disk_at(range(4, 6), monkeypatch, "grpo")
    changes = {"checkpoint_every": 4, "keep_checkpoints": 9, "report_to": "none"}
    run_warned(flags(folder, tmp_path, **changes))
    assert names(tmp_path) == {"step-7", "step-8"}  # 4, 5 failed; 5 + 2 is the second retry


@unlimited_afterwards()
def test_pairs_of_a_full_disk_wait_in_memory(folder: Path, tmp_path: Path, monkeypatch):
    changes = {"method": "expo-dpo", "pairs_every": 2, "report_to": "none"}
    changes |= {"explanations_per_question": 2}
    assert run_warned(flags(folder, tmp_path / "good", **changes)) == []
    fill_disk_at(FULL, monkeypatch, "dpo")
    seen = run_warned(flags(folder, tmp_path / "full", **changes))
    assert [message for message in seen if "the pairs wait in memory" in message] == seen[:1]
    assert_equal(files_of(tmp_path / "full"), files_of(tmp_path / "good"))
    rows = read_rows(tmp_path / "full/metrics.jsonl")
    assert sum(row["pairs"] for row in rows if row["step"] in FULL) > 0


def test_no_checkpoint_is_written_without_the_pairs_of_its_round(
    folder: Path, tmp_path: Path, monkeypatch
):
    """A resumed run could not sample them again: they are those of earlier weights."""

    def flush(self: PatientFiles) -> None:
        if self.waiting:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PatientFiles, "flush", flush)
    changes = {"method": "expo-dpo", "pairs_every": 2, "report_to": "none", "steps": 2}
    with pytest.warns(UserWarning, match="the pairs wait in memory"):
        status = exit_status.run(
            train.main, flags(folder, tmp_path / "run", save_patience=0, **changes)
        )
    assert status == exit_status.USER_ERROR
    assert not (tmp_path / "run/checkpoints").exists()


@unlimited_afterwards()
def test_the_last_save_waits_for_the_disk(folder: Path, tmp_path: Path, monkeypatch, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:  # the disk is emptied
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(saving, "_sleep", sleep)
    fill_disk_at(range(1, STEPS + 1), monkeypatch, "grpo")
    run_warned(flags(folder, tmp_path, steps=2, report_to="none"))
    assert waited == [1, 2, 4]
    assert names(tmp_path) == {"step-2"}
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    assert "trying again for 600 s" in capsys.readouterr().out


@unlimited_afterwards()
def test_the_last_save_gives_up_in_one_sentence(folder: Path, tmp_path: Path, monkeypatch, capsys):
    fill_disk_at(range(1, STEPS + 1), monkeypatch, "grpo")
    given = flags(folder, tmp_path, steps=2, report_to="none", save_patience=0)
    with pytest.warns(UserWarning, match="could not be written"):
        assert exit_status.run(train.main, given) == exit_status.USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: checkpoint {tmp_path}/checkpoints/step-2 could not be written")
    assert line.endswith("are unchanged; given up after --save-patience 0 s")


@unlimited_afterwards()
def test_a_signal_ends_the_wait_for_the_disk(folder: Path, tmp_path: Path, monkeypatch, capsys):
    fill_disk_at(range(2, STEPS + 1), monkeypatch, "grpo")

    def sleep(seconds: float) -> None:
        signal.raise_signal(signal.SIGTERM)
        saving.interruptions.check()

    monkeypatch.setattr(saving, "_sleep", sleep)
    given = flags(folder, tmp_path, steps=2, report_to="none")
    with pytest.warns(UserWarning, match="could not be written"):
        assert exit_status.run(train.main, given) == 128 + signal.SIGTERM
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("interrupted by SIGTERM: step 2 is not saved: checkpoint ")
    assert last.endswith(f"the same command resumes the run from {tmp_path}/checkpoints/step-1")


@pytest.mark.parametrize("message", ["No space left on device", "Input/output error"])
def test_a_disk_error_of_tokenizers_is_an_os_error(tmp_path: Path, message: str):
    def write(_: Path) -> None:
        raise Exception(f"{message} (os error 28)")  # tokenizers raises no class of its own

    with pytest.raises(OSError, match=rf"step-1 could not be written \({message}.* are free\)"):
        checkpoint.save(tmp_path, 1, write, {}, {}, keep=2)
    with pytest.raises(Exception, match="other") as raised:
        checkpoint.save(tmp_path, 1, lambda _: raise_other(), {}, {}, keep=2)
    assert raised.type is Exception


def raise_other() -> None:
    raise Exception("other")


@pytest.mark.parametrize("more", [{}, {"dtype": "bfloat16"}, {"lora_rank": 2}])
def test_a_dry_run_estimates_the_disk_space(folder: Path, tmp_path: Path, capsys, more: dict):
    given = flags(folder, tmp_path / "run", steps=2, keep_checkpoints=3, **more)
    train.main([*given, "--dry-run"])
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("# disk: ")]
    train.main(given)
    files = [*(tmp_path / "run/checkpoints/step-2").rglob("*.safetensors")]
    needed = 5 * sum(x.nbytes for path in files for x in load_file(path).values())
    number, unit = line.split()[2:4]
    estimated = float(number) * {"kB": 1e3, "MB": 1e6}[unit]
    assert estimated == pytest.approx(needed, rel=0.02)  # the printed number is rounded
    assert f"for 5 checkpoints of {in_bytes(estimated / 5)[0]}" in line


def test_the_best_checkpoint_by_reward_is_kept(folder: Path, tmp_path: Path, capsys):
    reward = f"{folder / 'rewards.py'}:falls"
    given = flags(folder, tmp_path, reward=reward, steps=6, keep_checkpoints=1)
    assert exit_status.run(train.main, given) == 0
    assert names(tmp_path) == {"step-2", "step-6"}
    assert f"best checkpoint: {tmp_path}/checkpoints/step-2" in capsys.readouterr().out
    again = flags(folder, tmp_path, reward=reward, steps=9, keep_checkpoints=1, keep_best=0)
    assert exit_status.run(train.main, again) == 0
    assert names(tmp_path) == {"step-9"}


def test_the_best_checkpoint_by_evaluation_is_saved_and_kept(
    folder: Path, tmp_path: Path, monkeypatch
):
    accuracies = iter([0.1, 0.2, 0.6, 0.3, 0.6, 0.5, 0.5])

    def evaluate(*_: object, **__: object) -> SimpleNamespace:
        accuracy = next(accuracies)
        row = {"problems": 1, "pass@1": accuracy, "all_fail": 0.0, "pass@1/interval": [0.0, 1.0]}
        return SimpleNamespace(summary=lambda: row)

    monkeypatch.setattr(train, "evaluate", evaluate)
    changes = {"eval_data": folder / "train.jsonl", "eval_every": 1, "eval_samples": 1}
    changes |= {"eval_limit": 2, "steps": 6, "checkpoint_every": 5, "keep_checkpoints": 1}
    with pytest.warns(UserWarning, match="are also in"):
        assert exit_status.run(train.main, flags(folder, tmp_path, **changes)) == 0
    assert names(tmp_path) == {"step-2", "step-6"}  # step 4 is as good, but no better


def test_scores_without_evaluations_are_means_of_rewards(tmp_path: Path):
    scores = Scores(tmp_path, evaluates=False, window=2)
    for step, reward in enumerate([0.0, 1.0, 1.0, None, 0.0], start=1):
        scores.add_step({"step": step, "reward": reward})
    assert [scores.of(step) for step in range(1, 7)] == [0.0, 0.5, 1.0, 1.0, 0.0, 0.0]
    assert scores.best([1, 2, 5], 2) == [2, 5]
    assert scores.best([3, 4, 5], 1) == [4]  # the later of two that are equal
    assert Scores(tmp_path, evaluates=True, window=2).best([1, 2], 1) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_are_found(bad: float, dtype: torch.dtype):
    tensors = {"a": torch.randn(3, 50).to(dtype), "n": torch.arange(3), "b": torch.ones(0)}
    assert first_non_finite(tensors.items()) is None
    tensors["a"][1, 17] = bad
    assert first_non_finite(tensors.items()) == "a"


def poison_weights_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a weight to NaN after a step (from 1), and back at the next one."""
    usual = train.LOOPS["grpo"]

    def run_step(trainer, at, phases):
        weight = next(iter(trainer.model.parameters())).detach()
        if at == step:
            weight[0, 0] = 0
        result = usual(trainer, at, phases)
        if at == step - 1:
            weight[0, 0] = float("nan")
        return result

    monkeypatch.setitem(train.LOOPS, "grpo", run_step)


def test_weights_that_are_not_finite_are_not_saved(
    folder: Path, tmp_path: Path, monkeypatch, capsys
):
    poison_weights_at(2, monkeypatch)
    assert exit_status.run(train.main, flags(folder, tmp_path, steps=3)) == 0
    assert names(tmp_path) == {"step-1", "step-3"}
    assert "step 2 is not saved: model.embed_tokens.weight has values" in capsys.readouterr().out


def test_a_run_that_ends_with_such_weights_has_its_own_exit_status(
    folder: Path, tmp_path: Path, monkeypatch, capsys
):
    poison_weights_at(2, monkeypatch)
    assert exit_status.run(train.main, flags(folder, tmp_path, steps=2)) == exit_status.COLLAPSED
    assert names(tmp_path) == {"step-1"}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: step 2 is not saved: model.embed_tokens.weight has values that")
    assert line.endswith(f"resumes the run from {tmp_path}/checkpoints/step-1")


def poison_file(path: Path, file: str) -> None:
    """Put a NaN into a tensor file of a checkpoint, as an older version could save it."""
    tensors = load_file(path / file)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, path / file, {"format": "pt"})
    (path / checkpoint.MANIFEST).unlink()
    checkpoint._write_manifest(path, int(path.name.removeprefix("step-")))


@pytest.mark.parametrize("file", ["model.safetensors", "trainer_state/state.safetensors"])
def test_a_checkpoint_with_such_values_is_passed_over(folder: Path, tmp_path: Path, file: str):
    assert exit_status.run(train.main, flags(folder, tmp_path, steps=2)) == 0
    poison_file(tmp_path / "checkpoints/step-2", file)
    with pytest.warns(UserWarning, match=r"skipped the checkpoint .*step-2.* not finite"):
        assert exit_status.run(train.main, flags(folder, tmp_path, steps=3)) == 0
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert names(tmp_path) == {"step-2", "step-2.bad-0", "step-3"}
    path = tmp_path / "checkpoints/step-3"
    poison_file(path, file)
    with pytest.raises(ValueError, match=r"step-3 cannot be resumed: .* not finite; resume from"):
        checkpoint.checked(path)


def test_completions_that_wait_have_a_limit(tmp_path: Path):
    def refuse(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    files = PatientFiles(refuse, most_bytes=25)
    for n in range(5):
        with pytest.raises(OSError, match="No space"):
            files.write(tmp_path / str(n), bytes(10))
    assert (files.waiting, files.forgotten) == (2, 3)
    assert not files.exists(tmp_path / "2")
    assert files.exists(tmp_path / "3")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (812, "812 bytes"), (4000, "4.0 kB"), (2.5e6, "2.5 MB"), (1.9e9, "1.90 GB")],
)
def test_bytes_have_the_unit_that_fits(count: float, text: str):
    assert in_bytes(count) == text
