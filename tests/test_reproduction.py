"""The reproduction's arms are what they claim: alike in all but what they compare."""

import shlex
import subprocess
import sys
from pathlib import Path

from expo_fast.config import Train
from expo_fast.flags import parse

ROOT = Path(__file__).resolve().parents[1]


def planned(size: str) -> dict[str, Train]:
    """The configurations of all runs, by the name of their folder."""
    command = [sys.executable, "-m", "benchmarks.reproduction", "--only", "plan", "--size", size]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    configs = [parse(Train, shlex.split(line)) for line in done.stdout.splitlines()]
    return {c.run_dir.name: c for c in configs}


def test_all_arms_sample_as_much_from_the_same_questions_with_the_same_seeds():
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


def test_the_arms_are_the_methods_of_the_paper_and_its_controls():
    configs = [c for c in planned("tiny").values() if c.seed == 0 and c.exp_sft_coef == 0.04]
    told = {(c.method, c.shuffle_explanations, bool(c.pairs_every)) for c in configs}
    assert told == {
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
