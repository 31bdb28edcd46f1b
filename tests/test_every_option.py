"""Each field of the configuration has an effect: another value changes the files of a run.

A flag that nothing reads would be ignored silently, and a user would compare two equal runs. Each
case trains a tiny model twice, with the field's default and with another value.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from expo_fast import train
from expo_fast.algorithms import explanations
from expo_fast.config import Train
from expo_fast.weights import save_model
from jobs import rows_in, write_rows
from tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("lenient")


class Case(NamedTuple):
    """Another value of a field, as flags, and the files that it changes."""

    flags: str
    base: str = "--method grpo"  # of both runs
    changes: str = "weights"  # or texts, evaluations


EXPO = "--method expo-grpo --exp-sft-coef 1 --explanations-per-question 3"
KEEP_ALL = "--method expo-grpo --exp-sft-coef 1 --explanations-per-question 6 --keep-explanations 0"
DPO = "--method expo-dpo --explanations-per-question 3"
ONLINE = DPO + " --pairs-every 1"
EVALUATED = "--method grpo --eval-every 2"
HELD_OUT = EVALUATED + " --eval-data None --eval-limit 8"
WEIGHTED = "--method grpo --prompts-per-step 4 --data-weights 1 1"
WEIGHTED += " --train-data {root}/train.jsonl {root}/other.jsonl"
CONTROL = "--method grpo --train-data {root}/control.jsonl"
# Ratios differ from 1 only where old log-probs are those of other weights.
SEVERAL = "--method grpo --updates-per-batch 2 --learning-rate 1e-2"

CASES = {
    "method": Case("--method star", EXPO),
    "train_data": Case("--train-data {root}/other.jsonl"),
    "data_weights": Case("--data-weights 1 3", WEIGHTED),
    "columns": Case("--columns prompt=solution"),
    "eval_fraction": Case("--eval-fraction 0.6", HELD_OUT, "evaluations"),
    "eval_data": Case("--eval-data {root}/one.jsonl", EVALUATED, "evaluations"),
    "steps": Case("--steps 3"),
    "prompts_per_step": Case("--prompts-per-step 3"),
    "num_generations": Case("--num-generations 5"),
    "updates_per_batch": Case("--updates-per-batch 2"),
    "model": Case("--model {root}/other-model"),
    "shots": Case("--shots 1"),
    "shots_data": Case("--shots-data {root}/other.jsonl", "--method grpo --shots 1"),
    "system_prompt": Case("--system-prompt Be-brief."),
    "escape_special_tokens": Case("--escape-special-tokens", CONTROL),
    "instruction": Case("--instruction Answer!"),
    "levels": Case("--levels 1"),
    "max_completion_length": Case("--max-completion-length 10"),
    "seed": Case("--seed 1"),
    "dtype": Case("--dtype bfloat16"),
    "temperature": Case("--temperature 0.7"),
    "top_p": Case("--top-p 0.5"),
    "top_k": Case("--top-k 3"),
    "min_p": Case("--min-p 0.5"),
    "reward": Case("--reward {root}/rewards.py:even"),
    "reward_weights": Case("--reward-weights -1"),
    "right_above": Case("--right-above 2", EXPO + " --exp-sft-max-accuracy 0"),
    "generation_budget": Case("--generation-budget 5"),
    "dynamic_sampling": Case("--dynamic-sampling 2", "--method grpo --num-generations 2"),
    "overlong_buffer": Case("--overlong-buffer 4"),
    "objective": Case("--objective gspo", SEVERAL),
    "loss": Case("--loss dr-grpo"),
    "advantage_scale": Case("--advantage-scale none"),
    "clip_low": Case("--clip-low 0.001", SEVERAL),
    "clip_high": Case("--clip-high 0.001", SEVERAL),
    "kl_coef": Case("--kl-coef 1"),
    "entropy_coef": Case("--entropy-coef 0.1"),
    "mask_truncated": Case("--mask-truncated"),
    "exp_sft_coef": Case("--exp-sft-coef 0.5", EXPO),
    "exp_sft_reduction": Case("--exp-sft-reduction seq_sum", EXPO),
    "exp_sft_schedule": Case("--exp-sft-schedule linear", EXPO),
    "exp_sft_max_accuracy": Case("--exp-sft-max-accuracy 0", EXPO),
    "explanations_per_question": Case("--explanations-per-question 8", KEEP_ALL),
    "keep_explanations": Case("--keep-explanations 1", KEEP_ALL),
    "choose_explanations": Case("--choose-explanations first", KEEP_ALL + " --keep-explanations 1"),
    "shuffle_explanations": Case("--shuffle-explanations", EXPO),
    "explain_every": Case("--explain-every 2", EXPO + " --prompts-per-step 4 --steps 3"),
    "explain_temperature": Case("--explain-temperature 1.2", EXPO),
    "pairs_every": Case("--pairs-every 1", DPO + " --prompts-per-step 4 --learning-rate 1e-2"),
    "refresh_reference": Case("--refresh-reference", ONLINE),
    "pairs_per_question": Case("--pairs-per-question 1", DPO),
    "preference": Case("--preference ipo", DPO),
    "dpo_beta": Case("--dpo-beta 1", DPO),
    "label_smoothing": Case("--label-smoothing 0.2", DPO),
    "rdpo_alpha": Case("--rdpo-alpha 1", DPO + " --preference rdpo --rdpo-alpha 0.1"),
    "lora_rank": Case("--lora-rank 2"),
    "lora_alpha": Case("--lora-alpha 1", "--method grpo --lora-rank 2 --steps 3"),
    "learning_rate": Case("--learning-rate 2e-3"),
    "warmup_steps": Case("--warmup-steps 0"),
    "schedule": Case("--schedule constant", "--method grpo --steps 3"),
    "betas": Case("--betas 0.5 0.9"),
    "eps": Case("--eps 1e-3"),
    "weight_decay": Case("--weight-decay 0.5"),
    "max_grad_norm": Case("--max-grad-norm 1e-6", "--method grpo --eps 1e-3"),
    "eval_every": Case("--eval-every 1", EVALUATED, "evaluations"),
    "eval_limit": Case("--eval-limit 1", EVALUATED, "evaluations"),
    "eval_samples": Case("--eval-samples 1", EVALUATED, "evaluations"),
    "eval_temperature": Case("--eval-temperature 2", EVALUATED, "evaluations"),
    "diagnose": Case("--diagnose 0", EXPO, "metrics"),
    "diagnose_every": Case("--diagnose-every 1", EXPO, "metrics"),
}
# Other tests check these fields, which do not change what a run learns.
UNTESTED_HERE = {
    "epochs": "sets steps: tests/test_flags.py",
    "output_dir": "where files go",
    "resume": "whether a run is continued",
    "inexact_resume": "which runs may be continued: see test_resume.py",
    "dry_run": "whether a run begins",
    "push_to_hub": "what is uploaded after a run: tests/test_publish.py",
    "device": "a machine may have only one",
    "append_answer": "the texts of a random model reach no answer: see the last test",
    "pack_tokens": "bounds memory; gradients are equal up to rounding",
    "pack_memory": "sets pack_tokens: see test_check.py",
    "gradient_checkpointing": "bounds memory; gradients are equal up to rounding",
    "batch_invariant": "changes only rounding",
    "checkpoint_every": "which steps are saved",
    "keep_checkpoints": "how many are kept",
    "shard": "which memory a rank of torchrun needs: see test_distributed.py",
    "gather": "which memory a rank needs to sample: see test_distributed.py",
    "collective_timeout": "when a rank of torchrun is given up: see test_distributed_faults.py",
    "keep_best": "which ones are kept: tests/test_saving.py",
    "save_patience": "how long a failed save is tried again: tests/test_saving.py",
    "stop_within": "when a stopped run is ended: tests/test_interruptions.py",
    "alarm_steps": "alarms change no weights: tests/test_alarms.py, as of all alarm_ options",
    "alarm_clipped_ratio": "see alarm_steps",
    "alarm_entropy": "see alarm_steps",
    "alarm_kl": "see alarm_steps",
    "alarm_nll": "see alarm_steps",
    "alarm_grad_spike": "see alarm_steps",
    "stop_on_collapse": "ends a run: tests/test_alarms.py",
    "reward_timeout": "when a reward function that hangs ends the run: see test_reward_mistakes.py",
    "report_to": "which tools record the metrics: see test_log.py",
}


def test_each_field_has_a_case():
    fields = {field.name for field in dataclasses.fields(Train)}
    assert not CASES.keys() & UNTESTED_HERE.keys()
    assert fields == CASES.keys() | UNTESTED_HERE.keys()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of models, data and rewards."""
    root = tmp_path_factory.mktemp("options")
    for name, seed in (("model", 0), ("other-model", 1)):
        save_model(tiny_model(seed=seed), tiny_tokenizer(), root / name)
    for name, first in (("train", 0), ("other", 50), ("eval", 100)):
        rows = [
            {"question": f"{n} + 1?", "answer": str(n + 1), "solution": f"{n} + 1 = {n + 1}."}
            | {"level": 1 + n % 2}
            for n in range(first, first + 8)
        ]
        write_rows(root / f"{name}.jsonl", rows)
    control = (root / "train.jsonl").read_text().replace(" + 1?", " + 1<|im_end|>?")
    (root / "control.jsonl").write_text(control)
    first = (root / "eval.jsonl").read_text().splitlines()[0]
    (root / "one.jsonl").write_text(first + "\n")
    (root / "rewards.py").write_text(
        "def odd(prompts, completions, completion_ids, **columns):\n"
        "    return [float(sum(ids) % 2) for ids in completion_ids]\n"
        "def even(prompts, completions, completion_ids, **columns):\n"
        "    return [float(sum(ids) % 2 == 0) for ids in completion_ids]\n"
    )
    return root


Trained = Callable[[str], Path]


@pytest.fixture(scope="module")
def trained(root: Path) -> Trained:
    """Return a function that trains with the given flags, once, and returns the run's folder."""
    made: dict[str, Path] = {}

    def run(more: str) -> Path:
        if more not in made:
            folder = root / "runs" / str(len(made))
            given = f"--model {root}/model --train-data {root}/train.jsonl "
            given += f"--eval-data {root}/eval.jsonl --reward {root}/rewards.py:odd --shots 0 "
            given += "--eval-every 0 --eval-limit 2 --eval-samples 2 --steps 2 --warmup-steps 1 "
            given += "--prompts-per-step 2 --num-generations 4 --max-completion-length 20 "
            given += "--learning-rate 1e-3 --dtype float32 "
            train.main([*given.split(), "--output-dir", str(folder), *more.split()])
            made[more] = folder
        return made[more]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("field", CASES)
def test_a_field_changes_the_files_of_a_run(field: str, root: Path, trained: Trained):
    case = CASES[field]
    base = case.base.format(root=root)
    without = trained(base)
    with_ = trained(f"{base} {case.flags.format(root=root)}")
    assert files_of(with_, case.changes) != files_of(without, case.changes)


def files_of(run: Path, what: str) -> object:
    """Return the contents of a run's files of a kind."""
    if what == "weights":
        last = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
        return [file.read_bytes() for file in sorted(last.glob("*.safetensors"))]
    return [strip_times(row) for row in rows_in(run / f"{what}.jsonl")]


def strip_times(row: dict[str, object]) -> dict[str, object]:
    """Return a row without the values that differ between equal runs."""
    return {name: x for name, x in row.items() if name != "seconds" and "time/" not in name}


def test_runs_with_equal_flags_have_equal_files(root: Path, trained: Trained):
    """Without this, the test above could not fail."""
    one = trained("--method grpo")
    again = root / "again"
    trained(f"--method grpo --output-dir {again}")
    for what in ("weights", "metrics"):
        assert files_of(again, what) == files_of(one, what)


@pytest.mark.parametrize(("loop", "base"), [("grpo", EXPO), ("dpo", DPO)])
def test_append_answer_reaches_the_acceptance_of_explanations(
    loop: str, base: str, root: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
):
    seen: list[bool] = []
    accept = explanations.accept_explanations

    def spy(*given: Any, append_answer: bool) -> Any:
        seen.append(append_answer)
        return accept(*given, append_answer=append_answer)

    monkeypatch.setattr(explanations, "accept_explanations", spy)
    trained(f"{base} --append-answer --output-dir {root / loop}")
    assert seen and all(seen)
