"""What a resume depends on is checked: a difference is refused, or the run is marked as inexact."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import fault_runs
from expo_fast import report, train
from expo_fast.algorithms import dpo
from expo_fast.algorithms.run_record import RECORD
from expo_fast.cli.flags import from_toml
from expo_fast.config import Train
from expo_fast.inspection import pack_size
from expo_fast.modeling.optimizer import Optimizer
from expo_fast.reporting.jsonl import read_rows
from expo_fast.reporting.run_log import EVALUATIONS, METRICS
from expo_fast.storage import checkpoint
from expo_fast.weights import save_model
from jobs import write_rows
from tiny import tiny_model, tiny_tokenizer

REWARDS = """
def odd(completion_ids, **columns):
    return [float(sum(ids) % 2) for ids in completion_ids]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(tiny_model(), tiny_tokenizer(), folder)
    return folder


@pytest.fixture
def job(model: Path, tmp_path: Path) -> Path:
    """Return a folder with data and a reward function."""
    for name, first in (("train", 0), ("eval", 100)):
        rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(first, first + 6)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "rewards.py").write_text(REWARDS)
    return tmp_path


def run(model: Path, job: Path, steps: int, more: str = "") -> Path:
    """Run a job, or resume it, and return its folder."""
    folder = job / "run"
    given = (
        f"--model {model} --train-data {job}/train.jsonl --eval-data {job}/eval.jsonl --shots 0 "
        f"--reward {job}/rewards.py:odd --method grpo --prompts-per-step 2 --num-generations 2 "
        f"--max-completion-length 4 --eval-every 2 --eval-limit 2 --eval-samples 1 --steps {steps} "
        f"--checkpoint-every 2 --keep-checkpoints 9 --schedule constant --dtype float32 "
        f"--report-to none --output-dir {folder} {more}"
    )
    train.main(given.split())
    return folder


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def cut_rows(path: Path, kept: slice) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[kept]))


def change_reward(run: Path) -> None:
    edit(run.parent / "rewards.py", "% 2", "% 3")


def change_evaluation_data(run: Path) -> None:
    edit(run.parent / "eval.jsonl", "+ 1?", "plus 1?")


def change_training_data(run: Path) -> None:
    edit(run.parent / "train.jsonl", "1 + 1?", "1 plus 1?")


def cut_metrics(run: Path) -> None:
    cut_rows(run / METRICS, slice(0, 1))


def cut_the_first_row(run: Path) -> None:
    cut_rows(run / METRICS, slice(1, None))


def cut_evaluations(run: Path) -> None:
    cut_rows(run / EVALUATIONS, slice(1, None))


def change_a_row(run: Path) -> None:
    edit(run / METRICS, '"reward": ', '"reward": 1')


# A change between a run of two steps and its resume, and the words of the refusal.
CHANGES = [
    (change_training_data, "step-2 was made with other training data"),
    (change_evaluation_data, "step-2 was made with other evaluation data"),
    (change_reward, "step-2 was made with other reward functions"),
    (cut_metrics, "metrics.jsonl has 1 of its 2 rows up to step 2"),
    (cut_the_first_row, "metrics.jsonl has 1 of its 2 rows up to step 2"),
    (cut_evaluations, "evaluations.jsonl has other rows up to step 2 than when"),
    (change_a_row, "metrics.jsonl has other rows up to step 2 than when that step was saved"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_a_change_is_named_and_refused_or_marks_the_run(model: Path, job: Path, change, words: str):
    folder = run(model, job, steps=2)
    change(folder)
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    with pytest.raises(ValueError, match=words.replace(".", r"\.")) as raised:
        run(model, job, steps=3)
    assert str(raised.value).endswith("mark the run as inexact with --inexact-resume")
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"} == files
    run(model, job, steps=3, more="--inexact-resume")
    rows = list(read_rows(folder / METRICS))
    assert [row.get("inexact") for row in rows] == [None] * (len(rows) - 1) + [1]
    run(model, job, steps=4)  # the mark remains, and nothing has changed since step 3
    assert [row.get("inexact") for row in read_rows(folder / METRICS)][-2:] == [1, 1]
    (reason,) = [x for x in (folder / RECORD).read_text().splitlines() if x.startswith("# ")]
    assert reason.startswith("# inexact: resumed from step 2 ")
    assert words.split("with ")[-1].split("step")[0] in reason
    assert str(job) not in reason  # model cards show the record
    page = job / "report.html"
    report.main([str(folder), "--output", str(page)])
    assert f"{folder} is inexact: resumed from step 2 " in page.read_text()


def test_other_runs_are_not_marked(model: Path, job: Path):
    folder = run(model, job, steps=2)
    run(model, job, steps=3, more="--inexact-resume")
    assert all("inexact" not in row for row in read_rows(folder / METRICS))
    assert "# " not in (folder / RECORD).read_text()


def test_a_resume_has_the_size_of_packs_of_the_run(model: Path, job: Path, monkeypatch):
    """Another machine, whose operations keep more for the backward pass, would have another."""
    packs = "--pack-tokens 0 --pack-memory 0.001"
    record = run(model, job, 2, packs) / RECORD
    first = from_toml(Train, record).pack_tokens
    monkeypatch.setattr(pack_size, "tokens_within", lambda *_: first + 1)
    run(model, job, 4, packs)
    assert from_toml(Train, record).pack_tokens == first
    assert len(list(read_rows(job / "run" / METRICS))) == 4


def test_a_resume_may_change_what_only_rounds_and_where_the_files_are(model: Path, job: Path):
    run(model, job, steps=2)
    moved = job / "moved"
    moved.mkdir()
    shutil.copytree(model, moved / "model")
    more = "--pack-tokens 512 --gradient-checkpointing --device cpu"
    for name in ("train", "eval"):
        shutil.copy(job / f"{name}.jsonl", moved)
    more += f" --train-data {moved}/train.jsonl --eval-data {moved}/eval.jsonl"
    folder = run(moved / "model", job, steps=4, more=more)
    assert [row["step"] for row in read_rows(folder / METRICS)] == [1, 2, 3, 4]
    assert "# " not in (folder / RECORD).read_text()
    run(model, job, steps=5)


def test_a_repeated_branch_continues_from_its_own_checkpoints(model: Path, job: Path):
    """Schedulers repeat the command of a job that was stopped."""
    origin = run(model, job, steps=2) / "checkpoints/step-2"
    more = f"--resume {origin} --output-dir {job}/branch"
    run(model, job, steps=4, more=more)
    first = list(read_rows(job / "branch" / METRICS))
    run(model, job, steps=6, more=more)
    rows = list(read_rows(job / "branch" / METRICS))
    assert rows[: len(first)] == first
    assert [row["step"] for row in rows] == [3, 4, 5, 6]
    assert not list((job / "branch/checkpoints").glob("*.bad-*"))


def test_a_branch_knows_its_origin_without_its_record(model: Path, job: Path):
    origin = run(model, job, steps=2) / "checkpoints/step-2"
    branch = job / "branch"
    more = f"--resume {origin} --output-dir {branch}"
    run(model, job, steps=4, more=more)
    run(model, job, steps=5, more=f"--output-dir {branch}")
    (branch / RECORD).unlink()
    run(model, job, steps=6, more=f"--resume {origin}/ --output-dir {branch}")
    shutil.rmtree(origin)
    run(model, job, steps=7, more=more)
    assert [row["step"] for row in read_rows(branch / METRICS)] == [3, 4, 5, 6, 7]


def test_a_branch_into_the_directory_of_another_run_is_refused(model: Path, job: Path):
    other = job / "other"
    run(model, job, steps=2, more=f"--output-dir {other}")
    origin = run(model, job, steps=2) / "checkpoints/step-2"
    before = (other / METRICS).read_bytes()
    with pytest.raises(ValueError, match="holds a run that did not begin at"):
        run(model, job, steps=4, more=f"--resume {origin} --output-dir {other}")
    assert (other / METRICS).read_bytes() == before


def test_a_run_without_an_undamaged_checkpoint_does_not_start_again_on_other_data(
    model: Path, job: Path
):
    folder = run(model, job, steps=2)
    weights = folder / "checkpoints/step-2/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    shutil.copy(job / "eval.jsonl", job / "other.jsonl")
    before = (folder / METRICS).read_bytes()
    with pytest.raises(ValueError, match=r"train_data=.*, and no checkpoint to resume from"):
        run(model, job, steps=4, more=f"--train-data {job}/other.jsonl")
    assert (folder / METRICS).read_bytes() == before


def test_the_base_of_adapters_may_not_be_another_folder(model: Path, job: Path):
    """The hash of the weights says nothing of the other values of its config.json."""
    run(model, job, steps=2, more="--lora-rank 2")
    shutil.copytree(model, job / "moved")
    with pytest.raises(ValueError, match="holds a run with model="):
        run(job / "moved", job, steps=4, more="--lora-rank 2")


def test_a_branch_with_other_options_is_refused_or_marked(model: Path, job: Path):
    origin = run(model, job, steps=2) / "checkpoints/step-2"
    more = f"--resume {origin} --output-dir {job}/branch --learning-rate 0.5 --kl-coef 0"
    words = "step-2 was made with learning_rate="
    with pytest.raises(ValueError, match=words) as raised:
        run(model, job, steps=4, more=more)
    assert "give the same options and data, or mark the run as inexact" in str(raised.value)
    assert not (job / "branch").exists()
    run(model, job, steps=4, more=more + " --inexact-resume")
    assert all(row["inexact"] == 1 for row in read_rows(job / "branch" / METRICS))


def test_a_run_directory_is_no_checkpoint(model: Path, job: Path):
    folder = run(model, job, steps=2)
    with pytest.raises(ValueError, match="is a run directory: name one of its checkpoints"):
        run(model, job, steps=4, more=f"--resume {folder}")
    with pytest.raises(ValueError, match="is no complete checkpoint: it has no MANIFEST"):
        run(model, job, steps=4, more=f"--resume {model}")
    with pytest.raises(FileNotFoundError, match="it is a run directory: name one of its checkp"):
        run(folder, job, steps=2, more=f"--output-dir {job}/other")


def test_a_learning_rate_of_zero_changes_no_weight(model: Path, job: Path):
    folder = run(model, job, steps=2, more="--learning-rate 0")
    assert [row["update_norm"] for row in read_rows(folder / METRICS)] == [0, 0]


def test_the_size_of_packs_does_not_name_the_folder_of_a_run(model: Path):
    config = Train(model=str(model), pack_tokens=0)
    found = pack_size.with_pack_tokens(config)
    assert found.pack_tokens > 0
    assert found.run_dir == config.run_dir


def test_steps_are_checked_under_a_schedule(model: Path, job: Path):
    for more in ("--schedule linear", "--method expo-grpo --exp-sft-schedule cosine"):
        folder = job / more.split()[-1]
        more += f" --output-dir {folder} --explanations-per-question 1"
        if "linear" in more:
            more = more.removesuffix(" --explanations-per-question 1")
        run(model, job, steps=2, more=more)
        run(model, job, steps=1, more=more)  # nothing to do
        words = r"step-2 was made with --steps 2, not 4, which its schedule depends on: "
        with pytest.raises(ValueError, match=words):
            run(model, job, steps=4, more=more)
        run(model, job, steps=4, more=f"{more} --inexact-resume")
        rows = list(read_rows(folder / METRICS))
        assert [row.get("inexact") for row in rows] == [None, None, 1, 1]


def test_a_longer_log_is_cut_to_the_cursor_of_the_checkpoint(model: Path, job: Path):
    folder = run(model, job, steps=2)
    before = (folder / METRICS).read_bytes()
    more = b'{"step": 2, "reward": 7}\n{"step": 3}\n{"step": 4, "rew'
    (folder / METRICS).write_bytes(before + more)
    run(model, job, steps=3)
    assert (folder / METRICS).read_bytes().startswith(before)
    assert [row["step"] for row in read_rows(folder / METRICS)] == [1, 2, 3]


def test_an_evaluation_after_the_saved_step_is_made_once(model: Path, job: Path, monkeypatch):
    """A signal inside an evaluation saves its step. The resumed run adds the evaluation."""
    folder = run(model, job, steps=2)
    cut_rows(folder / EVALUATIONS, slice(0, 1))
    run(model, job, steps=2)
    monkeypatch.setattr(train, "evaluate", None)
    run(model, job, steps=2)
    assert [row["step"] for row in read_rows(folder / EVALUATIONS)] == [0, 2]


def damaged(kind: str, record: Path) -> None:
    text = record.read_text()
    if kind == "cut":
        record.write_text(text[: len(text) // 2])
    elif kind == "empty":
        record.write_text("")
    elif kind == "binary":
        record.write_bytes(b"\xff\xfe\x00")
    elif kind == "a digit":
        edit(record, "prompts_per_step = 2", "prompts_per_step = 3")
    elif kind == "a line":
        record.write_text("".join(x for x in text.splitlines(True) if "num_generations" not in x))
    else:
        record.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cut", "empty", "binary", "a digit", "a line", "missing"])
def test_a_damaged_record_is_rebuilt_from_the_checkpoint(model: Path, job: Path, kind, capsys):
    folder = run(model, job, steps=2)
    record = folder / RECORD
    before = from_toml(Train, record)
    damaged(kind, record)
    with pytest.raises(ValueError, match="holds a run with prompts_per_step=2, not 4"):
        run(model, job, steps=3, more="--prompts-per-step 4")
    capsys.readouterr()
    run(model, job, steps=2)
    assert from_toml(Train, record) == before
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "it is written again" in x]
    assert line.startswith(f"warning: {record} ")


@pytest.mark.parametrize(("every", "advice"), [(0, "remove it: the run has no"), (2, "")])
def test_a_damaged_record_without_a_copy_is_named_with_advice(
    model: Path, job: Path, every: int, advice: str, monkeypatch
):
    if every:
        monkeypatch.setattr("expo_fast.algorithms.run_record.OPTIONS", "unknown")
    folder = run(model, job, steps=2, more=f"--checkpoint-every {every}")
    (folder / RECORD).write_text("= 1")
    advice = advice or "copy it from a backup, or choose another --output-dir"
    with pytest.raises(ValueError, match=rf"config\.toml is not TOML: [^\n]+; {advice}"):
        run(model, job, steps=2, more=f"--checkpoint-every {every}")


def test_a_checkpoint_of_an_earlier_version_is_resumed(model: Path, job: Path):
    folder = run(model, job, steps=2)
    path = folder / "checkpoints/step-2"
    state = path / "trainer_state/state.json"
    values = json.loads(state.read_text())
    for name in ("options", "logs", "inexact"):
        del values[name]
    for name in ("evaluation data", "reward functions"):
        del values["identity"][name]
    state.write_text(json.dumps(values))
    (path / checkpoint.MANIFEST).unlink()
    checkpoint._write_manifest(path, 2)
    run(model, job, steps=3)
    assert [row["step"] for row in read_rows(folder / METRICS)] == [1, 2, 3]


# Where an online run of five steps, which samples pairs in steps 1, 3 and 5, is killed, one after
# the other: the function at whose call, and the number of the call in that process.
KILLS = [
    (dpo, "make_pairs", 4),  # step 3 has pairs and step 4 does not
    (Optimizer, "step", 2),  # step 4, whose pairs the weights of step 2 sampled
    (checkpoint, "_write_manifest", 1),  # inside the save of step 4
]


@pytest.mark.slow
def test_a_killed_online_run_of_pairs_is_resumed_exactly(tmp_path: Path):
    job = fault_runs.make_job(tmp_path)
    unbroken = tmp_path / "unbroken"
    fault_runs.finish(fault_runs.flags(job, "expo-dpo-online", unbroken), tmp_path / "log")
    folder = tmp_path / "killed"
    given = fault_runs.flags(job, "expo-dpo-online", folder)
    for owner, name, number in KILLS:

        def prepare(owner: Any = owner, name: str = name, number: int = number) -> None:
            kill_at_call(owner, name, number)

        pid = fault_runs.start(given, tmp_path / "log", prepare)
        assert fault_runs.wait(pid, 60) == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
    fault_runs.finish(given, tmp_path / "log")
    found = fault_runs.snapshot(folder)
    assert {"checkpoints/step-5/trainer_state/state.json", "pairs/step-5.json"} <= found.keys()
    assert fault_runs.difference(found, fault_runs.snapshot(unbroken)) == []


def kill_at_call(owner: Any, name: str, number: int) -> None:
    """Let this process kill itself at a call of a function."""
    usual = getattr(owner, name)
    calls = iter(range(1, 1000))

    def run(*given: Any, **named: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(*given, **named)

    setattr(owner, name, run)
