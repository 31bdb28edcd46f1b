"""Configurations from TOML files and flags, and the errors of invalid ones."""

import math
import re
from pathlib import Path

import pytest
import torch

from expo_fast.cli.flags import dump_toml, from_toml, parse
from expo_fast.config import Evaluate, Train


def test_an_unknown_key_of_a_config_file_is_named(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text("steps = 3\nlearning-rates = 1e-5\n")
    with pytest.raises(ValueError, match=r"unknown key 'learning_rates'"):
        parse(Train, ["--config", str(file)])
    file.write_text("steps = 3\nlevels = [1, 2]\nlearning-rate = 1e-5\n")
    config = parse(Train, ["--steps", "5", "--config", str(file)])
    assert (config.steps, config.levels, config.learning_rate) == (5, (1, 2), 1e-5)


@pytest.mark.parametrize("kind", [Train, Evaluate])
def test_a_dumped_config_reads_back(kind, tmp_path: Path):
    config = kind(shots=3, levels=(1, 4), system_prompt='Say "yes"\n\\boxed')
    (tmp_path / "c.toml").write_text(dump_toml(config))
    assert from_toml(kind, tmp_path / "c.toml") == config


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            'method = "ppo"',
            "run.toml: method='ppo': need one of 'expo-grpo', 'grpo', 'expert-grpo'",
        ),
        ('steps = "three"', "run.toml: steps='three': need the type int"),
        ("steps = 3.5", "steps=3.5: need the type int"),
        ("steps = true", "steps=True: need the type int"),
        ("learning-rate = true", "learning_rate=True: need the type float"),
        (f"learning-rate = {'9' * 400}", "need the type float"),
        ("reward = 1", "reward=1: need the type str"),
        ('levels = ["a"]', r"levels=\['a'\]: need a list of int"),
        ("levels = 3", "levels=3: need a list of int"),
        ("betas = [0.9]", r"betas=\[0.9\]: need a list of 2 float"),
        ("betas = [0.9, 0.99, 0.999]", "need a list of 2 float"),
        ("steps = 3\nprompts-per-step = 1\nprompts_per_step = 2", "has prompts_per_step twice"),
        ("learning_rate = nan", "learning_rate=nan"),
        ("steps = ", "is not TOML"),
    ],
)
def test_a_value_of_the_wrong_type_in_a_config_file_is_named(tmp_path: Path, line, sentence):
    file = tmp_path / "run.toml"
    file.write_text(line)
    with pytest.raises(ValueError, match=sentence):
        parse(Train, [f"--config={file}"])


def test_each_configuration_has_its_own_run_directory():
    assert Train().run_dir == Train(steps=99, eval_every=3, resume="never").run_dir
    assert len({Train(seed=s).run_dir for s in range(3)} | {Train(method="grpo").run_dir}) == 4
    assert Train(output_dir="here").run_dir == Path("here")


@pytest.mark.parametrize(
    "changes",
    [
        {"top_p": 0.0},
        {"top_k": -1},
        {"min_p": 2.0},
        {"clip_low": 2.0},
        {"explain_temperature": -1.0},
        {"eval_temperature": -0.1},
        {"warmup_steps": -3},
        {"diagnose": -1},
        {"learning_rate": float("inf")},
        {"kl_coef": float("nan")},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"betas": (float("nan"), 0.9)},
        {"output_dir": ""},
        {"resume": ""},
        {"model": ""},
    ],
)
def test_a_value_out_of_range_is_refused_by_name(changes):
    ((name, _),) = changes.items()
    with pytest.raises(ValueError, match=f"{name}="):
        Train(**changes)


@pytest.mark.parametrize("changes", [{"temperature": math.inf}, {"model": ""}, {"limit": 0}])
def test_an_evaluation_refuses_values_out_of_range_too(changes):
    ((name, _),) = changes.items()
    with pytest.raises(ValueError, match=f"{name}="):
        Evaluate(**changes)


def test_run_directories_do_not_change_with_new_options():
    """The names are those of commit c8c507a, before --rdpo-alpha."""
    assert Train().run_dir == Path("runs/expo-grpo-0b30e83d")
    assert Train(method="dpo").run_dir.name == "dpo-2bfd9111"
    assert Train(method="dpo", preference="rdpo", rdpo_alpha=0.1).run_dir.name != "dpo-2bfd9111"


def test_all_faults_of_a_configuration_are_named_at_once():
    with pytest.raises(ValueError) as caught:
        Train(method="sft", clip_low=0.1, preference="ipo", steps=0, betas=(0.9, 1.0))
    first, *lines = str(caught.value).splitlines()
    assert first == "4 options have to change:"
    names = [line.split("=")[0].strip() for line in lines]
    assert names == ["clip_low", "preference", "steps", "betas"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"learning_rate": math.nan}, "learning_rate=nan: need a finite number"),
        ({"updates_per_batch": 0}, "updates_per_batch=0: need more than 0"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1: need at least 0"),
        ({"generation_budget": -1}, "generation_budget=-1: need at least 0"),
    ],
)
def test_a_fault_is_named_without_the_faults_that_follow_from_it(changes, sentence):
    with pytest.raises(ValueError) as caught:
        Train(method="dpo" if "label_smoothing" in changes else "expo-grpo", **changes)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("epochs", "problems", "size", "steps"),
    [(1, 12, 4, 3), (1, 13, 4, 4), (0.5, 12, 4, 2), (1.1, 10, 11, 1), (0.001, 12, 4, 1)],
)
def test_epochs_are_passes_over_the_problems(epochs, problems, size, steps):
    resolved = Train(epochs=epochs, prompts_per_step=size).resolve_epochs(problems)
    assert (resolved.steps, resolved.epochs) == (steps, None)
    assert resolved.run_dir == Train(prompts_per_step=size).run_dir
    assert Train(steps=7).resolve_epochs(problems).steps == 7


@pytest.mark.parametrize("changes", [{"epochs": 0.0}, {"epochs": math.inf}, {"steps": 3}])
def test_epochs_out_of_range_or_beside_steps_are_refused(changes):
    with pytest.raises(ValueError, match="epochs="):
        Train(**{"epochs": 1.0} | changes)


def test_a_program_may_give_paths_lists_and_single_values(tmp_path: Path):
    """A list in place of a tuple gave the run another folder, and a path could not be recorded."""
    config = Train(
        model=tmp_path,  # pyright: ignore[reportArgumentType]
        train_data=[tmp_path / "a.jsonl", "b.jsonl"],  # pyright: ignore[reportArgumentType]
        report_to="none",  # pyright: ignore[reportArgumentType]
        levels=3,  # pyright: ignore[reportArgumentType]
        betas=[0.9, 0.95],  # pyright: ignore[reportArgumentType]
    )
    as_flags = Train(
        model=str(tmp_path),
        train_data=(f"{tmp_path}/a.jsonl", "b.jsonl"),
        report_to=("none",),
        levels=(3,),
        betas=(0.9, 0.95),
    )
    assert config == as_flags
    assert config.run_dir == as_flags.run_dir
    assert dump_toml(config) == dump_toml(as_flags)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"method": "ppo"}, "method='ppo': need one of 'expo-grpo', 'grpo', "),
        ({"objective": "ppo"}, "objective='ppo': need one of 'clipped', "),
        ({"report_to": ("x",)}, "report_to=('x',): need a list of 'tensorboard', 'wandb', "),
        ({"dtype": torch.bfloat16}, "dtype=torch.bfloat16: need one of 'float32', 'bfloat16'"),
        ({"learning_rate": "1e-4"}, "learning_rate='1e-4': need the type float"),
        ({"steps": True}, "steps=True: need the type int"),
        (
            {"reward": print},
            "reward=<built-in function print>: need the type str: rewards.py:f, or __main__:f",
        ),
        ({"betas": 0.9}, "betas=0.9: need a list of 2 float"),
    ],
)
def test_a_program_gets_one_sentence_for_a_value_of_a_wrong_type(option, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        Train(**option)


def test_a_tracker_is_named_once():
    with pytest.raises(ValueError, match="need none alone, or the names of tools, each once"):
        parse(Train, ["--report-to", "wandb", "wandb"])
