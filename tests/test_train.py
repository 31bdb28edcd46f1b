"""The command lines: the files that they write, resuming, and invalid arguments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from expo_fast import evaluate, train
from expo_fast.algorithms import explanations, grpo, training_data
from expo_fast.cli import exit_status
from expo_fast.cli.flags import from_toml, parse
from expo_fast.config import Train
from expo_fast.data.problems import Problem
from expo_fast.generate import Request
from expo_fast.storage import checkpoint
from expo_fast.weights import save_model
from jobs import metrics_of, rows_in, run_flags, without_times, write_rows
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model, data, and a reward that some samples of a group earn."""
    root = tmp_path_factory.mktemp("job")
    save_model(tiny_model(), tiny_tokenizer(), root / "model")
    for name, first in (("train", 0), ("eval", 100)):
        rows = [
            {"id": f"{name}-{n}", "question": f"{n} + 1?", "answer": str(n + 1), "hint": n % 2}
            | {"solution": f"{n} + 1 = {n + 1}."}
            for n in range(first, first + 9)
        ]
        write_rows(root / f"{name}.jsonl", rows)
    (root / "rewards.py").write_text(
        "def odd(prompts, completions, completion_ids, answer, hint, **columns):\n"
        "    assert len(answer) == len(hint) == len(prompts) == len(completions)\n"
        "    return [float(sum(ids) % 2) for ids in completion_ids]\n"
    )
    return root


def flags(folder: Path, run: Path, **changes: object) -> list[str]:
    given: dict[str, object] = {
        "eval_data": folder / "eval.jsonl",
        "method": "expert-grpo",
        "steps": 4,
        "eval_limit": 2,
        "eval_samples": 2,
        "diagnose_every": 1,
    }
    return run_flags(folder, run, **(given | changes))


def test_a_run_leaves_a_complete_record_and_a_loadable_model(folder: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train.main(flags(folder, tmp_path / "run", checkpoint_every=2, eval_every=2))
    run = tmp_path / "run"
    assert [row["step"] for row in metrics_of(run)] == [1, 2, 3, 4]
    assert [row["step"] for row in rows_in(run / "evaluations.jsonl")] == [0, 2, 4]
    assert len(rows_in(run / "completions/step-3.jsonl")) == 2 * (3 + 1)
    given = flags(folder, run, checkpoint_every=2, eval_every=2)
    assert from_toml(Train, run / "config.toml") == parse(Train, given)
    for row in metrics_of(run):
        assert row["grad_norm/exp_sft"] > 0
        assert row["logp_gap/max"] < 1e-4  # fp32
        assert row["update_norm"] > 0
        assert row["exp/rate"] is None  # an expert's solution is no explanation
        assert None not in (row["time/generate"], row["time/forward_backward"], row["own/nll"])
        assert row["exp/lift"] is None  # it is measured for explanations only
    saved = run / "checkpoints" / "step-4"
    theirs = AutoModelForCausalLM.from_pretrained(saved)
    ours = load_file(saved / "model.safetensors")
    assert torch.equal(theirs.model.embed_tokens.weight, ours["model.embed_tokens.weight"])
    assert AutoTokenizer.from_pretrained(saved).chat_template == tiny_tokenizer().chat_template
    before = load_file(folder / "model" / "model.safetensors")
    assert not torch.equal(before["model.norm.weight"], ours["model.norm.weight"])


def test_a_program_gets_the_record_and_the_model_of_a_run(folder: Path, tmp_path: Path):
    config = parse(Train, flags(folder, tmp_path / "run", steps=2, eval_every=1))
    result = train.run(config)
    assert result.run_dir == tmp_path / "run"
    assert result.metrics == metrics_of(tmp_path / "run")
    assert [row["step"] for row in result.evaluations] == [0, 1, 2]
    assert result.model_path == tmp_path / "run" / "checkpoints" / "step-2"
    assert len(result.completions(2)) == 2 * (3 + 1)
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-2" / "model.safetensors")
    (trained,) = [w for n, w in result.model.named_parameters() if n.endswith("model.norm.weight")]
    assert torch.equal(trained, saved["model.norm.weight"])
    (completion,) = result.generator.sample([Request([5, 6], max_new_tokens=2)])
    assert len(completion.token_ids) <= 2
    assert len(repr(result)) < 200  # a notebook shows it; the model would take 40 lines
    again = train.run(config)  # finished, so it is only read
    assert again.metrics == result.metrics
    assert again.model_path == result.model_path


def test_a_dry_run_of_a_program_leaves_no_record(folder: Path, tmp_path: Path):
    config = parse(Train, [*flags(folder, tmp_path / "run"), "--dry-run"])
    result = train.run(config)
    assert (result.metrics, result.evaluations, result.model_path) == ([], [], None)
    assert not result.run_dir.exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generator_and_trainer_agree_to_the_bit_in_the_batch_invariant_mode(
    folder, tmp_path, dtype: str
):
    given = flags(folder, tmp_path, method="grpo", dtype=dtype, updates_per_batch=2, steps=2)
    train.main([*given, "--batch-invariant"])
    for row in metrics_of(tmp_path):
        assert row["logp_gap/max"] == 0
        assert row["grad_norm"] > 0


@pytest.mark.parametrize("method", ["grpo", "expert-grpo", "expo-grpo"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    folder: Path, tmp_path: Path, method: str
):
    uninterrupted = tmp_path / "uninterrupted"
    parts = tmp_path / "parts"
    train.main(flags(folder, uninterrupted, method=method, schedule="constant"))
    for steps in (1, 3, 4):  # the second one resumes, and so does the third
        train.main(flags(folder, parts, method=method, schedule="constant", steps=steps))
    assert without_times(metrics_of(uninterrupted)) == without_times(metrics_of(parts))
    a, b = (r / "checkpoints" / "step-4" for r in (uninterrupted, parts))
    for file in ("model.safetensors", "trainer_state/state.safetensors"):
        x, y = load_file(a / file), load_file(b / file)
        assert x.keys() == y.keys()
        assert all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("more", ["--explain-every 0", "--shuffle-explanations"])
def test_kept_explanations_are_restored_by_a_resume(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str
):
    def right(answers: list[str], texts: list[str], **_: object) -> list[float | None]:
        return [1.0] * len(texts)

    monkeypatch.setattr(train, "score_answers", right)
    monkeypatch.setattr(explanations, "is_unfit", lambda text, problem: False)
    model = tmp_path / "model"  # half of its completions have an end token
    save_model(tiny_model(eos_token_id=list(range(1, 70))), tiny_tokenizer(), model)
    changes = {"method": "expo-grpo", "model": model, "schedule": "constant"}
    uninterrupted = tmp_path / "uninterrupted"
    parts = tmp_path / "parts"
    train.main([*flags(folder, uninterrupted, **changes, steps=6), *more.split()])
    for steps in (5, 6):  # the second epoch begins with step 5
        train.main([*flags(folder, parts, **changes, steps=steps), *more.split()])
    assert without_times(metrics_of(uninterrupted)) == without_times(metrics_of(parts))
    assert all(row["exp/accepted"] > 0 for row in metrics_of(uninterrupted))
    if more == "--explain-every 0":
        assert (
            metrics_of(uninterrupted)[5]["exp/right_ratio"] is None
        )  # all its questions were explained before
    values = [
        checkpoint.read_values(run / "checkpoints/step-6")["trainer"]
        for run in (uninterrupted, parts)
    ]
    assert values[0] == values[1]
    assert bool(values[0]["earlier"]) is (more == "--shuffle-explanations")
    state = "checkpoints/step-6/trainer_state/state.safetensors"
    a, b = load_file(uninterrupted / state), load_file(parts / state)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_several_updates_per_batch_change_the_ratio(folder: Path, tmp_path: Path):
    train.main(
        flags(folder, tmp_path, method="grpo", updates_per_batch=2, learning_rate=0.02, steps=3)
    )
    assert max(row["clip_ratio/low"] + row["clip_ratio/high"] for row in metrics_of(tmp_path)) > 0


def test_kl_is_0_at_first_and_grows(folder: Path, tmp_path: Path):
    train.main(flags(folder, tmp_path, kl_coef=0.1, steps=3))
    kl = [row["kl"] for row in metrics_of(tmp_path)]
    assert kl[0] == pytest.approx(0, abs=1e-9)
    assert kl[2] > 1e-6


def test_a_step_without_gradient_changes_no_weight(folder: Path, tmp_path: Path):
    rewards = tmp_path / "flat.py"
    rewards.write_text("def flat(prompts, **columns):\n    return [1.0] * len(prompts)\n")
    train.main(flags(folder, tmp_path / "run", method="grpo", reward=f"{rewards}:flat", steps=2))
    assert [row["update_norm"] for row in metrics_of(tmp_path / "run")] == [0, 0]
    before = load_file(folder / "model" / "model.safetensors")
    after = load_file(tmp_path / "run" / "checkpoints" / "step-2" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_non_finite_gradients_are_skipped_and_recorded_and_stop_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    poison_the_gradient(monkeypatch)
    with pytest.raises(RuntimeError, match=r"step 3: .*gradient.*\(steps in a row: 3\)"):
        train.main(flags(folder, tmp_path, steps=5))
    assert [row["skipped_steps"] for row in metrics_of(tmp_path)] == [1, 2, 3]
    assert [row["grad_norm"] for row in metrics_of(tmp_path)] == [None] * 3  # null, never NaN
    assert len(rows_in(tmp_path / "skipped/step-2.jsonl")) == 8
    assert not (tmp_path / "checkpoints").exists()


def poison_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(layout, samples, config):
        for p in layout.model.parameters():
            (p.sum() * float("nan")).backward()
        return grpo.PolicyResult()

    monkeypatch.setattr(grpo, "policy_backward", poisoned)


def test_skipped_steps_are_counted_across_a_resume(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    poison_the_gradient(monkeypatch)
    given = {"checkpoint_every": 1, "schedule": "constant", "eval_every": 0}
    train.main(flags(folder, tmp_path, **given, steps=2))
    with pytest.raises(RuntimeError, match=r"step 3: .*\(steps in a row: 3\)"):
        train.main(flags(folder, tmp_path, **given, steps=9))


@pytest.mark.parametrize("steps", [2, 9])  # the second step is the last, or not
def test_a_diverged_model_ends_the_run_and_is_not_saved(folder: Path, tmp_path: Path, steps: int):
    given = {"learning_rate": 1e30, "warmup_steps": 0, "schedule": "constant", "eval_every": 0}
    given |= {"method": "grpo", "steps": steps, "checkpoint_every": 2}
    with pytest.raises(RuntimeError, match=f"step {min(steps, 4)}: .*logits in every completion"):
        train.main(flags(folder, tmp_path, **given))
    errors = [row["completions/error_ratio"] for row in metrics_of(tmp_path)]
    assert errors == [0, 1, 1, 1][:steps]
    assert metrics_of(tmp_path)[-1]["skipped_steps"] == 0
    assert len(rows_in(tmp_path / "skipped/step-2.jsonl")) == 6
    assert not (tmp_path / "checkpoints").exists()


def test_dry_run_prints_the_configuration_and_writes_nothing(folder, tmp_path, capsys):
    train.main([*flags(folder, tmp_path / "run"), "--dry-run"])
    file = tmp_path / "printed.toml"
    printed = capsys.readouterr().out
    file.write_text(printed)
    assert from_toml(Train, file).steps == 4
    comments = "".join(line for line in printed.splitlines() if line.startswith("# "))
    assert "# prompt of " in comments and "<|im_start|>user" in comments
    assert "activations" in comments
    assert not (tmp_path / "run").exists()


def test_evaluate_ends_with_one_json_object(folder: Path, capsys):
    evaluate.main(
        f"--model {folder}/model --data {folder}/eval.jsonl --shots-data {folder}/train.jsonl "
        "--shots 1 --limit 4 --samples 3 --max-completion-length 8 --temperature 1".split()
    )
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["problems"] == 4
    assert row["samples"] == 3
    assert 0 <= row["pass@1"] <= row["pass@3"] <= 1
    assert row["tokens"] > 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train_data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"model": "no/such/model/here"}, "no/such/model/here"),
        ({"train_data": "builtin:geometry"}, "geometry"),
        ({"prompts_per_step": 50}, "need at least prompts_per_step=50"),
        ({"num_generations": 1}, "num_generations=1"),
        ({"max_completion_length": 250}, "the model's context holds 256"),
        ({"shots": 9}, "prompts_per_step"),
        ({"levels": 3}, "no problem of level 3"),
        ({"prompts_per_step": 3, "updates_per_batch": 2}, "updates_per_batch=2"),
        ({"reward": "no_such_module.f"}, "no_such_module"),
        ({"steps": 0}, "steps=0"),
        ({"learning_rate": -1}, "learning_rate=-1"),
        ({"resume": "nowhere"}, "checkpoint nowhere does not exist"),
        ({"resume": ""}, "resume=''"),
        ({"model": ""}, "model=''"),
        ({"output_dir": ""}, "output_dir=''"),
        ({"output_dir": "FILE"}, "eval.jsonl is a file, need a folder"),
        ({"output_dir": "FILE/run"}, "eval.jsonl is a file, need a folder"),
        ({"reward": "len", "train_data": "reserved.jsonl"}, "a column 'completions'"),
    ],
)
@pytest.mark.parametrize("only", [[], ["--dry-run"]])
def test_invalid_input_gives_one_sentence_and_exit_code_2(
    folder, tmp_path, capsys, monkeypatch, changes, sentence, only
):
    monkeypatch.chdir(tmp_path)
    data = (folder / "train.jsonl").read_text()
    last = {"question": "Q?", "answer": "A", "solution": "S", "completions": 1}
    (tmp_path / "reserved.jsonl").write_text(data + json.dumps(last))
    given = flags(folder, tmp_path / "run", **changes)
    given = [word.replace("FILE", str(folder / "eval.jsonl")) for word in given]
    code = exit_status.run(train.main, [*given, *only])
    errors = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert sentence in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["reserved.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--stepz", "3"], "--stepz"),
        (["--steps", "three"], "three"),
        (["--method", "ppo"], "ppo"),
        (["--config", "missing.toml"], "missing.toml"),
        (["--config"], "--config has no value: need a TOML file"),
    ],
)
def test_invalid_flags_give_exit_code_2_and_no_traceback(arguments, sentence, capsys):
    assert exit_status.run(train.main, arguments) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err + printed.out
    assert "Traceback" not in printed.err


def test_a_run_directory_refuses_another_configuration(folder: Path, tmp_path: Path):
    train.main(flags(folder, tmp_path, steps=1))
    with pytest.raises(ValueError, match=r"learning_rate=0.001, not 0.5"):
        train.main(flags(folder, tmp_path, steps=2, learning_rate=0.5))
    with pytest.raises(ValueError, match="already holds a run"):
        train.main(flags(folder, tmp_path, resume="never"))


def test_a_resume_refuses_changed_data(folder: Path, tmp_path: Path):
    data = tmp_path / "data.jsonl"
    data.write_text((folder / "train.jsonl").read_text())
    train.main(flags(folder, tmp_path / "run", train_data=data, steps=1))
    data.write_text(data.read_text().replace("3 + 1?", "3 plus 1?"))
    with pytest.raises(ValueError, match="other training data"):
        train.main(flags(folder, tmp_path / "run", train_data=data, steps=2))


def test_a_resume_refuses_another_model_in_one_sentence(folder: Path, tmp_path: Path):
    train.main(flags(folder, tmp_path / "run", steps=1))
    save_model(tiny_model(intermediate_size=96), tiny_tokenizer(), tmp_path / "other")
    path = tmp_path / "run" / "checkpoints" / "step-1"
    given = flags(folder, tmp_path / "new", model=tmp_path / "other", resume=path)
    for only in ([], ["--dry-run"]):
        with pytest.raises(
            ValueError, match=r"^\S+step-1 is of a model with intermediate=80, .*96"
        ):
            train.main([*given, *only])
    assert not (tmp_path / "new").exists()


def test_a_dry_run_refuses_the_same_arguments_as_a_run(folder: Path, tmp_path: Path):
    train.main(flags(folder, tmp_path, steps=1, schedule="constant"))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    for changes, message in (
        ({"learning_rate": 0.5}, "learning_rate="),
        ({"resume": "never"}, "already"),
    ):
        with pytest.raises(ValueError, match=message):
            train.main([*flags(folder, tmp_path, **changes), "--dry-run"])
    train.main([*flags(folder, tmp_path, schedule="constant"), "--dry-run"])
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_the_configuration_of_a_run_is_rewritten_only_if_it_changes(folder, tmp_path):
    train.main(flags(folder, tmp_path, steps=1, schedule="constant"))
    record = tmp_path / "config.toml"
    before = record.stat().st_ino
    train.main(flags(folder, tmp_path, steps=1, schedule="constant"))
    assert record.stat().st_ino == before
    train.main(flags(folder, tmp_path, steps=2, schedule="constant"))
    assert from_toml(Train, record).steps == 2
    assert record.stat().st_ino != before  # a new file has replaced it


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (0, "interrupted: there is no checkpoint, the same command starts the run again"),
        (1, "interrupted: the same command resumes the run from "),
    ],
)
def test_an_interrupted_run_prints_how_it_continues(
    folder: Path, tmp_path: Path, capsys, monkeypatch, step: int, sentence: str
):
    usual = train.LOOPS["grpo"]

    def interrupted(trainer, at, phases):
        if at == step:
            raise KeyboardInterrupt
        return usual(trainer, at, phases)

    monkeypatch.setitem(train.LOOPS, "grpo", interrupted)
    given = flags(folder, tmp_path / "run", checkpoint_every=1, eval_every=0)
    assert exit_status.run(train.main, given) == exit_status.INTERRUPTED
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith(sentence)
    if step:
        assert last.endswith("checkpoints/step-1")


def test_a_run_that_is_complete_prints_that(folder: Path, tmp_path: Path, capsys):
    train.main(flags(folder, tmp_path / "run", steps=2))
    path = tmp_path / "run" / "checkpoints" / "step-2"
    train.main(flags(folder, tmp_path / "new", steps=1, resume=path))
    assert (
        "step 2 is already done: there is nothing to do up to --steps 1" in capsys.readouterr().out
    )


def test_a_run_without_evaluation_needs_no_held_out_data(folder: Path, tmp_path: Path):
    train.main(flags(folder, tmp_path, eval_every=0, eval_data="nowhere.jsonl", steps=1))
    assert not (tmp_path / "evaluations.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_a_closed_pipe_is_no_error(folder: Path, tmp_path: Path, program: str):
    given = flags(folder, tmp_path / "run", steps=1)
    if program == "evaluate":
        given = f"--model {folder}/model --data {folder}/eval.jsonl --shots 0 --limit 1".split()
        given += ["--max-completion-length", "8"]
    command_line = [sys.executable, "-m", f"expo_fast.{program}", *given]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command_line, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    if program == "evaluate":
        assert done.returncode == 141
        (warning,) = done.stderr.splitlines()  # the tiny model does not end its texts
        assert "of the completions were cut at" in warning
    else:  # training continues without a console
        assert done.returncode == 0
        (warning,) = done.stderr.splitlines()
        assert warning.startswith("warning: console of ")
        assert len(metrics_of(tmp_path / "run")) == 1


def test_a_run_directory_in_use_is_refused(folder: Path, tmp_path: Path, capsys):
    with checkpoint.run_lock(tmp_path):
        assert exit_status.run(train.main, flags(folder, tmp_path)) == 2
    assert str(os.getpid()) in capsys.readouterr().err


def test_training_data_in_the_evaluation_give_a_warning(folder: Path, tmp_path: Path):
    with pytest.warns(UserWarning, match="9 problems of .* are also in"):
        training_data.load_training_data(
            parse(Train, flags(folder, tmp_path, eval_data=folder / "train.jsonl", eval_limit=9))
        )


@pytest.mark.parametrize("solution", ["so \\boxed{41}", "so \\boxed{}", "so \\boxed{42"])
def test_a_solution_that_boxes_another_answer_gives_a_warning(solution, recwarn):
    right = Problem("right", "Q?", "42", "so \\boxed{42.0}")
    other = Problem("other", "Q?", "42", solution)
    for method in ("expert-grpo", "expert-dpo", "sft"):
        with pytest.warns(UserWarning, match="1 solutions of .* the first is other"):
            training_data.check_columns(Train(method=method), [right, other])
    recwarn.clear()
    training_data.check_columns(Train(method="expert-grpo"), [right])
    training_data.check_columns(Train(method="grpo"), [other])
    assert not recwarn


@pytest.mark.slow
def test_one_step_of_the_default_model_explains_and_learns(tmp_path: Path):
    train.main(
        f"--output-dir {tmp_path} --steps 1 --prompts-per-step 3 --num-generations 2 "
        "--explanations-per-question 8 --eval-every 0 --checkpoint-every 0".split()
    )
    (row,) = metrics_of(tmp_path)
    assert row["exp/rate"] > 0
    assert row["grad_norm/exp_sft"] > 0
    assert row["exp/nll"] < row["own/nll"] + 1
    assert row["logp_gap/mean"] < 0.03  # bf16
