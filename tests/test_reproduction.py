"""The arms of the reproduction differ only in the options that they compare."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.reproduction import __main__ as command
from benchmarks.reproduction import choose, collect
from benchmarks.reproduction.arms import ARMS, SIZES, target, train_flags
from expo_fast.cli.flags import dump_toml, parse
from expo_fast.config import Evaluate, Train
from expo_fast.data.problems import Problem
from expo_fast.reporting.runs import Run

ROOT = Path(__file__).resolve().parents[1]


def planned(size: str) -> dict[str, Train]:
    """Return the configurations of all runs, by the name of their folder."""
    command = [sys.executable, "-m", "benchmarks.reproduction", "--only", "plan", "--size", size]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    configs = [parse(Train, shlex.split(line)) for line in done.stdout.splitlines()]
    return {c.run_dir.name: c for c in configs}


@pytest.mark.slow
def test_all_arms_have_the_same_budget_questions_and_seeds():
    for size in ("tiny", "full"):
        configs = planned(size)
        assert len(configs) == 7 * 3 + 1 + 3
        assert len({c.group_size + c.n_explanations for c in configs.values()}) == 1
        for field in (
            "steps",
            "prompts_per_step",
            "train_data",
            "eval_data",
            "eval_samples",
            "model",
        ):
            assert len({getattr(c, field) for c in configs.values()}) == 1
        assert {c.seed for c in configs.values()} == {0, 1, 2}


def test_questions_are_selected_with_the_sampling_options_of_training(tmp_path, monkeypatch):
    """The flags are valid for evaluation, also where the size keeps defaults."""
    for name, size in SIZES.items():
        asked: list[Evaluate] = []

        def evaluate(command, *, check, asked=asked):
            asked.append(config := parse(Evaluate, command[3:]))
            row = {"id": "0", "verdict": 0.0}
            Path(str(config.output)).write_text(json.dumps(row) + "\n")

        monkeypatch.setattr(choose.subprocess, "run", evaluate)
        monkeypatch.setattr(choose, "load_problems", lambda source, limit: [Problem("0", "Q", "1")])
        choose.choose(size, tmp_path / name, "train")
        arm = parse(Train, train_flags(ARMS[0], size, 0, tmp_path))
        assert [c.samples for c in asked] == [*size.tries]
        assert len({c.seed for c in asked}) == len(asked)
        for c in asked:
            assert (c.shots, c.temperature) == (arm.shots, arm.temperature)
            assert c.max_completion_length == arm.max_completion_length
        (row,) = (tmp_path / name / "train.jsonl").read_text().splitlines()
        assert json.loads(row)["id"] == "0"
        with pytest.raises(SystemExit, match="take another --folder"):
            colder = replace(size, flags=size.flags | {"temperature": 0.123})
            choose.choose(colder, tmp_path / name, "train")


def test_a_run_with_other_flags_is_not_collected(tmp_path):
    size, arm = SIZES["tiny"], ARMS[1]
    run, flags = target(tmp_path, arm, 0), train_flags(arm, size, 0, tmp_path)
    steps = size.flags["steps"]
    run.mkdir()
    (run / "config.toml").write_text(dump_toml(parse(Train, flags)))
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / "evaluations.jsonl").write_text('{"step": 1}\n')
    assert collect.done(run, flags) is None  # the run is not complete
    (run / "evaluations.jsonl").write_text(f'{{"step": {steps}}}\n')
    assert collect.done(run, flags)
    for flag, value in (("steps", 12), ("generation-budget", 99), ("keep-explanations", 7)):
        rest = {k: v for k, v in size.explaining.items() if k != flag}
        other = replace(size, flags=size.flags | {flag: value}, explaining=rest)
        with pytest.raises(SystemExit, match=rf"{flag.replace('-', '_')}=\d+, the arm has {value}"):
            collect.done(run, train_flags(arm, other, 0, tmp_path))


def test_a_resumed_run_records_both_commits(tmp_path, monkeypatch):
    commits = iter(("1111111", "2222222"))
    monkeypatch.setattr(command, "commit", lambda: next(commits))
    monkeypatch.setattr(command.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    for _ in range(2):
        assert command.run(tmp_path / "grpo-0", [], 1) == 0
    assert (tmp_path / "grpo-0.commit").read_text().split() == ["1111111", "2222222"]


def test_collected_files_name_no_folder_of_the_machine(tmp_path):
    given = [str(tmp_path / "gsm8k.jsonl"), "builtin:arithmetic-1:train", 3]
    assert collect.without_folder(given) == ["gsm8k.jsonl", *given[1:]]


def test_arms_are_compared_over_their_common_seeds():
    def runs(*seeds: int) -> list[Run]:
        return [Run(str(seed), {"seed": seed}, [], []) for seed in seeds]

    same = collect.same_seeds({"a": runs(0, 1, 2), "b": runs(0), "c": runs(0, 2)})
    assert {name: [r.config["seed"] for r in found] for name, found in same.items()} == {
        "a": [0],
        "b": [0],
        "c": [0],
    }


@pytest.mark.slow
def test_the_arms_are_the_methods_of_the_paper_and_its_controls():
    configs = [c for c in planned("tiny").values() if c.seed == 0 and c.exp_sft_coef == 0.04]
    found = {(c.method, c.shuffle_explanations, bool(c.pairs_every)) for c in configs}
    assert found == {
        ("grpo", False, False),
        ("expert-grpo", False, False),
        ("expo-grpo", False, False),
        ("expo-grpo", True, False),
        ("star", False, False),
        ("expo-dpo", False, False),
        ("expo-dpo", False, True),
        ("expert-dpo", False, False),
    }
    coefficients = {c.exp_sft_coef for c in planned("tiny").values() if c.method == "expo-grpo"}
    assert coefficients == {0.01, 0.04, 0.1, 0.5}
