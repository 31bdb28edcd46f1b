"""Flags: --help by theme, hints for unknown names, presets whose values yield, and epochs."""

import dataclasses
import json
import re
import sys
import warnings
from pathlib import Path

import pytest

from expo_fast import train
from expo_fast.cli import exit_status
from expo_fast.cli.flags import from_flags, from_toml, parse, presets
from expo_fast.cli.help_text import OTHERS, THEMES, themes
from expo_fast.cli.unknown_flags import OTHER_TRAINERS, flags_in, hint
from expo_fast.config import Evaluate, Train, default_of
from expo_fast.methods import METHODS, methods_that_read
from expo_fast.report import Report
from expo_fast.weights import save_model
from jobs import write_rows
from tiny import tiny_model, tiny_tokenizer


def help_of(kind: type, monkeypatch, capsys, *words: str) -> str:
    """Return what --help prints in a wide terminal."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["expo-fast"])
    with pytest.raises(SystemExit) as stop:
        parse(kind, [*words, "--help"])
    assert not stop.value.code
    return capsys.readouterr().out


def names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("kind", [Train, Evaluate])
def test_each_flag_has_a_theme_a_text_and_a_form(kind):
    by_theme = themes(kind)
    assert OTHERS not in by_theme
    flags = [flag for members in by_theme.values() for flag in members]
    assert sorted(flag.name for flag in flags) == sorted(names(kind))
    for flag in flags:
        assert flag.text.endswith((".", ").")), flag.name
        assert flag.forms.startswith(f"--{flag.name.replace('_', '-')}")
        assert flag.default


def test_a_theme_names_each_field_once():
    listed = [name for members in THEMES.values() for name in members]
    assert len(listed) == len(set(listed))
    assert set(listed) == names(Train) | names(Evaluate)


def test_help_shows_each_flag_and_config(monkeypatch, capsys):
    printed = help_of(Train, monkeypatch, capsys)
    assert printed.startswith("usage: expo-fast train [FLAGS]\n")
    assert max(map(len, printed.splitlines())) <= 100
    assert "  --config NAME|FILE " in printed
    for name in names(Train):
        assert re.search(rf"^  --{name.replace('_', '-')}\b", printed, re.MULTILINE), name
    for title in themes(Train):
        assert f"\n\n{title}\n" in printed


def test_help_shows_the_values_of_a_preset(monkeypatch, capsys):
    printed = help_of(Train, monkeypatch, capsys, "--config", "dapo")
    (line,) = [line for line in printed.splitlines() if line.startswith("  --dynamic-sampling")]
    assert "(default: 4)" in " ".join(printed.split("--dynamic-sampling")[1].split())[:200], line


def test_help_marks_the_flags_that_only_some_methods_read():
    flags = {flag.name: flag for members in themes(Train).values() for flag in members}
    assert flags["learning_rate"].readers == ""
    assert flags["dynamic_sampling"].readers == "grpo"
    assert flags["top_p"].readers == "all but dpo, sft"
    assert flags["clip_low"].readers == "expo-grpo, grpo, expert-grpo; --objective clipped, gspo"
    for name, flag in flags.items():
        assert bool(flag.readers) is (len(methods_that_read(name)) < len(METHODS))
    assert {flag.readers for members in themes(Evaluate).values() for flag in members} == {""}


def test_a_positional_argument_is_in_the_usage(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["expo-fast"])
    with pytest.raises(SystemExit):
        from_flags(Report, ["-h"], "Write.")
    assert capsys.readouterr().out.startswith("usage: expo-fast report RUN_DIR ... [FLAGS]\n")


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--lr", "unknown --lr: use --learning-rate; see --help"),
        ("--num_train_epochs=3", "unknown --num-train-epochs: use --epochs; see --help"),
        ("--beta", "unknown --beta: use --dpo-beta for the loss of pairs, or --kl-coef for"),
        ("--dataset-name", "unknown --dataset-name: use --train-data; see --help"),
        ("--learning-rat", "unknown --learning-rat: perhaps you meant --learning-rate; see"),
        ("--budget", "unknown --budget: perhaps you meant --generation-budget; see --help"),
        ("--qwertz", "unknown --qwertz; see --help"),
    ],
)
def test_an_unknown_flag_gets_a_hint(flag, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        parse(Train, [flag, "1"])


def test_all_unknown_flags_are_named_at_once():
    with pytest.raises(ValueError) as caught:
        parse(Train, ["--lr", "1e-5", "--steps", "3", "--max-steps", "3", "--foo"])
    assert str(caught.value).splitlines() == [
        "3 unknown flags, see --help:",
        "  --lr: use --learning-rate",
        "  --max-steps: use --steps",
        "  --foo",
    ]


def test_the_hint_fits_the_command():
    with pytest.raises(ValueError, match="unknown --dataset-name: use --data; see --help"):
        parse(Evaluate, ["--dataset-name", "x"])
    with pytest.raises(ValueError, match=r"^unknown --lr; see"):
        parse(Evaluate, ["--lr", "1"])


def test_an_unknown_key_of_a_file_gets_the_same_hint(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text("num_train_epochs = 3\n")
    with pytest.raises(ValueError, match=r"unknown key 'num_train_epochs': use epochs$"):
        parse(Train, ["--config", str(file)])


def test_each_hint_names_flags_of_a_command():
    commands = [{name.replace("_", "-") for name in names(kind)} for kind in (Train, Evaluate)]
    for unknown, sentences in OTHER_TRAINERS.items():
        assert "_" not in unknown
        for sentence in sentences:
            assert any(flags_in(sentence) <= known for known in commands), unknown
    for known in commands:
        for unknown in OTHER_TRAINERS.keys() - known:
            given = hint(unknown, known)
            assert given is None or flags_in(given) <= known


@pytest.mark.parametrize("preset", presets())
@pytest.mark.parametrize("method", ["expo-grpo", "star", "expo-dpo", "dpo", "sft"])
def test_the_values_of_a_preset_yield_to_another_method(preset: str, method: str):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = parse(Train, ["--config", preset, "--method", method, "--exp-sft-coef", "0.04"])
    assert config.method == method
    of_preset = parse(Train, ["--config", preset])
    told = "".join(str(each.message) for each in caught)
    assert len(caught) <= 1
    for name in names(Train) - {"method"}:
        kept = getattr(config, name) == getattr(of_preset, name)
        assert kept or getattr(config, name) == default_of(Train, name)
        assert kept is (f" {name}=" not in told)


def test_a_preset_yields_to_another_objective_too():
    with pytest.warns(UserWarning, match=r"preset gspo .* objective=sapo, .* clip_high=0.0004"):
        config = parse(Train, ["--config", "gspo", "--objective", "sapo"])
    assert (config.clip_high, config.updates_per_batch) == (0.2, 4)


@pytest.mark.parametrize(("preset", "clip_high"), [("gspo", 0.0004), ("cispo", 4.0)])
def test_the_clip_range_of_a_preset_yields_to_another_objective(preset: str, clip_high: float):
    """Before, PPO's ratio was clipped at 1.0004 or at 5, silently."""
    told = rf"preset {preset} do not fit objective=clipped, .* clip_high={clip_high}"
    with pytest.warns(UserWarning, match=told):
        config = parse(Train, ["--config", preset, "--objective", "clipped"])
    assert (config.clip_low, config.clip_high) == (0.2, 0.2)
    flags = ["--config", preset, "--objective", "clipped", "--clip-high", "0.3"]
    config = parse(Train, flags if preset == "cispo" else [*flags, "--clip-low", "0.2"])
    assert (config.clip_low, config.clip_high) == (0.2, 0.3)


def test_two_configs_are_refused():
    with pytest.raises(ValueError, match=r"^--config is given twice: give one preset or file"):
        parse(Train, ["--config", "grpo", "--config=dpo"])


def test_an_ignored_flag_is_refused_beside_a_preset(recwarn):
    with pytest.raises(ValueError, match=r"^clip_high=0.3 has no effect with method=sft"):
        parse(Train, ["--config", "dapo", "--method", "sft", "--clip-high", "0.3"])


def test_the_values_of_a_file_do_not_yield(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text('method = "grpo"\nclip_high = 0.3\n')
    with pytest.raises(ValueError, match=r"^clip_high=0.3 has no effect with method=sft"):
        parse(Train, ["--config", str(file), "--method", "sft"])


def test_steps_and_epochs_override_each_other_and_exclude_each_other(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text("steps = 30\n")
    config = parse(Train, ["--config", str(file), "--epochs", "2"])
    assert (config.epochs, config.steps) == (2.0, 16)
    file.write_text("epochs = 3\n")
    assert parse(Train, ["--config", str(file)]).epochs == 3.0
    config = parse(Train, ["--config", str(file), "--steps", "5"])
    assert (config.epochs, config.steps) == (None, 5)
    for words in ("--epochs 1 --steps 16", "--steps=4 --epochs=1"):
        with pytest.raises(ValueError, match="--steps and --epochs are both given"):
            parse(Train, words.split())


@pytest.mark.slow
def test_a_run_of_epochs_is_recorded_in_steps_and_can_be_continued(tmp_path: Path, capsys):
    save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    rows = [{"prompt": f"{n} + 1?", "answer": n + 1, "solution": f"{n + 1}."} for n in range(6)]
    data = tmp_path / "train.jsonl"
    write_rows(data, rows)
    given = f"--method sft --model {tmp_path}/model --train-data {data} --output-dir {tmp_path}/run"
    given += " --shots 0 --eval-every 0 --prompts-per-step 2 --dtype float32 --schedule constant"
    train.main([*given.split(), "--epochs", "1", "--dry-run"])
    assert "\nsteps = 3\n" in capsys.readouterr().out
    for epochs, steps in (("0.5", 2), ("1", 3), ("1", 3)):
        train.main([*given.split(), "--epochs", epochs])
        record = from_toml(Train, tmp_path / "run/config.toml")
        assert (record.steps, record.epochs) == (steps, None)
        logged = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in logged] == [*range(1, steps + 1)]
    assert "step 3 is already done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--learning-rate fast", "--learning-rate: could not convert string to float: 'fast'"),
        ("--method sfft", "invalid choice 'sfft' for argument '--method'. Expected one of"),
    ],
)
def test_a_wrong_value_of_a_flag_is_one_sentence(words, sentence):
    with pytest.raises(ValueError) as caught:
        parse(Train, words.split())
    assert str(caught.value).startswith(sentence)
    assert ".;" not in str(caught.value)


def test_several_faults_are_printed_below_each_other(capsys):
    assert exit_status.run(train.main, ["--steps", "0", "--clip-low", "2"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: 2 options have to change:",
        "  steps=0: need more than 0",
        "  clip_low=2.0: need at most 1",
    ]
