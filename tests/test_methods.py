"""Every method and preset trains when it is named; invalid configurations are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from expo_fast import train
from expo_fast.algorithms import resume
from expo_fast.algorithms.logprobs import ForwardOptions
from expo_fast.algorithms.sft import sft_backward, sft_samples
from expo_fast.cli import exit_status
from expo_fast.cli.flags import parse, presets
from expo_fast.config import Train
from expo_fast.data.problems import Problem
from expo_fast.data.prompts import Prompter
from expo_fast.methods import METHODS
from expo_fast.modeling.layout import Layout
from expo_fast.runtime.endings import Collapsed
from expo_fast.weights import load_model, save_model
from jobs import metrics_of, write_rows
from judges import assert_gradients_near, completion_logps, gradients_of
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model, problems, and a reward that some samples earn."""
    root = tmp_path_factory.mktemp("job")
    save_model(tiny_model(), tiny_tokenizer(), root / "model")
    rows = [
        {"question": f"{n} + 1?", "answer": str(n + 1), "solution": f"{n} + 1 = {n + 1}."}
        | {"chosen": f"{n} + 1 = {n + 1}, {{{n + 1}}}", "rejected": "I can't."}
        for n in range(12)
    ]
    write_rows(root / "train.jsonl", rows)
    (root / "rewards.py").write_text(
        "def odd(prompts, completions, completion_ids, **columns):\n"
        "    return [float(sum(ids) % 2) for ids in completion_ids]\n"
    )
    return root


def flags(folder: Path, run: Path, *more: object) -> list[str]:
    given = f"--model {folder}/model --train-data {folder}/train.jsonl --output-dir {run} "
    given += "--shots 0 --eval-every 0 --steps 2 --prompts-per-step 4 --dtype float32 "
    given += "--max-completion-length 20 --learning-rate 1e-3"
    if not {"sft", "dpo"} & {*more}:  # these methods have no reward
        given += f" --reward {folder}/rewards.py:odd"
    return [*given.split(), *map(str, more)]


@pytest.mark.slow
@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("preset", presets())
def test_a_preset_trains(folder: Path, tmp_path: Path, preset: str):
    train.main(flags(folder, tmp_path, "--config", preset))
    made = metrics_of(tmp_path)
    assert len(made) == 2
    assert any(row["update_norm"] > 0 for row in made)
    if preset.startswith(("expo", "star")):
        assert all(row["exp/accepted"] > 0 for row in made)
        assert all(row["exp/nll"] > 0 for row in made)
        assert made[0]["exp/lift"] is not None  # the first step is diagnosed
    if preset.startswith("expo-dpo"):
        assert all(row["pairs"] > 0 for row in made)
    _, tokenizer = load_model(tmp_path / "checkpoints/step-2", dtype=torch.float32)
    assert tokenizer is not None


@pytest.mark.slow
@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize(
    "more",
    [
        "--shuffle-explanations",
        "--choose-explanations lift",
        "--choose-explanations first",
        "--keep-explanations 1",
        "--exp-sft-schedule cosine",
        "--exp-sft-max-accuracy 0.5",
        "--exp-sft-reduction seq_sum",
        "--method expo-dpo --pairs-every 1 --preference simpo --dpo-beta 2",
        "--method expo-dpo --shuffle-explanations --preference orpo",
        "--method expo-dpo --preference rdpo --rdpo-alpha 0.1",
        "--method expo-grpo --kl-coef 0.1 --generation-budget 12",
        "--method expo-grpo --kl-coef 0.1 --updates-per-batch 2 --objective gspo",
    ],
)
def test_options_train_and_change_the_result(folder: Path, tmp_path: Path, more: str):
    kind = [] if "--method" in more else ["--method", "expo-grpo"]
    train.main(flags(folder, tmp_path / "with", *kind, *more.split()))
    method = more.split()[1] if "--method" in more else "expo-grpo"
    train.main(flags(folder, tmp_path / "without", "--method", method))
    with_, without = metrics_of(tmp_path / "with"), metrics_of(tmp_path / "without")
    assert any(row["update_norm"] > 0 for row in with_)
    assert [row["loss"] for row in with_] != [row["loss"] for row in without]


def test_every_method_has_a_preset_and_each_preset_begins_with_a_comment():
    from expo_fast.cli.flags import PRESETS

    named = {parse(Train, ["--config", name]).method for name in presets()}
    assert named == METHODS.keys()
    for name in presets():
        assert (PRESETS / f"{name}.toml").read_text().startswith("# ")
    assert {"dr-grpo", "dapo", "gspo", "cispo"} <= set(presets())


def test_the_scale_of_adapters_is_alpha_over_rank(folder: Path, tmp_path: Path):
    more = ("--method", "sft", "--lora-rank", 2, "--lora-alpha", 6)
    train.main(flags(folder, tmp_path, *more))
    saved = json.loads((tmp_path / "checkpoints/step-2/adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (2, 6)


def test_a_checkpoint_of_another_method_is_refused(folder: Path, tmp_path: Path):
    train.main(flags(folder, tmp_path / "run", "--method", "grpo"))
    path = tmp_path / "run/checkpoints/step-2"
    with pytest.raises(ValueError, match="was made with other method"):
        train.main(flags(folder, tmp_path / "new", "--method", "sft", "--resume", path))


def test_a_resume_notices_other_ends_of_turns(folder, tmp_path, monkeypatch):
    """A checkpoint of a version that did not record the ends is resumed as before."""
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    given = flags(folder, tmp_path / "run", "--method", "sft", "--model", model)
    given += ["--schedule", "constant"]
    recorded = resume.identity
    for records in (True, False):
        run = tmp_path / f"recorded-{records}"
        first = [*given, "--output-dir", run]
        if not records:
            monkeypatch.setattr(resume, "identity", lambda trainer: without_ends(recorded(trainer)))
        train.main([*map(str, first)])
        monkeypatch.undo()
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6, 7]}))
    more = [*given, "--steps", "3", "--output-dir"]
    train.main([*more, str(tmp_path / "recorded-False")])
    with pytest.raises(ValueError, match="was made with other ends of turns"):
        train.main([*more, str(tmp_path / "recorded-True")])


def without_ends(identity: dict[str, str]) -> dict[str, str]:
    return {what: value for what, value in identity.items() if what != "ends of turns"}


@pytest.mark.parametrize("preset", ["gspo", "cispo", "dapo"])
def test_without_weight_changes_no_ratio_is_clipped(folder: Path, tmp_path: Path, preset: str):
    """In bf16, the generator's log-probs differ from the trainer's by more than GSPO's bounds."""
    given = ("--config", preset, "--dtype", "bfloat16", "--prompts-per-step", 8)
    train.main(flags(folder, tmp_path, *given, "--learning-rate", 1e-12, "--updates-per-batch", 4))
    assert any(row["grad_norm/policy"] > 0 for row in metrics_of(tmp_path))
    assert any(row["logp_gap/max"] > 1e-3 for row in metrics_of(tmp_path))
    assert all(row["clip_ratio/low"] == row["clip_ratio/high"] == 0 for row in metrics_of(tmp_path))


@pytest.mark.parametrize(("above", "failing"), [(0.0, 0.0), (0.5, 1.0)])
def test_an_attempt_is_right_if_its_reward_exceeds_the_threshold(folder, tmp_path, above, failing):
    (tmp_path / "rewards.py").write_text(
        "def partly(completions, **columns):\n"
        "    return [0.1 * (n % 2) for n, _ in enumerate(completions)]\n"
    )
    given = ("--reward", f"{tmp_path}/rewards.py:partly", "--right-above", above)
    train.main(flags(folder, tmp_path / "run", "--method", "expert-dpo", *given))
    row = metrics_of(tmp_path / "run")[0]
    assert row["frac_all_fail"] == failing
    assert row["pairs"] == 8


def test_an_offline_run_without_a_pair_is_refused(folder: Path, tmp_path: Path):
    """It would train on nothing, and end as if it had."""
    (tmp_path / "rewards.py").write_text(
        "def right(completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    given = flags(folder, tmp_path / "run", "--method", "expert-dpo")
    given += ["--reward", f"{tmp_path}/rewards.py:right"]
    for _ in range(2):  # a resume finds the stored pairs
        with pytest.raises(Collapsed, match="made no pair for the questions of its 2 steps: a q"):
            train.main(given)


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_adapters_alone(folder: Path, tmp_path: Path, method: str):
    more = ("--method", method, "--lora-rank", 2)
    train.main(flags(folder, tmp_path, *more))
    saved = tmp_path / "checkpoints/step-2"
    assert (saved / "adapter_model.safetensors").exists()
    assert not (saved / "model.safetensors").exists()
    merged, _ = load_model(saved, dtype=torch.float32)
    base = tiny_model()
    assert torch.equal(merged.head_weight, base.head_weight)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(merged.get_parameter(name), base.get_parameter(name))


def test_the_gradient_of_sft_is_that_of_the_mean_log_likelihood():
    model, prompter = tiny_model(dtype=torch.float64), Prompter(tiny_tokenizer())
    problems = [
        Problem("a", "1 + 1?", "2", "1 + 1 = 2."),
        Problem("b", "Who?", "", pair=("Me, of course.", "No one.")),
    ]
    total = torch.zeros((), dtype=torch.float64)
    for p in problems:
        logps = completion_logps(model, prompter.solve(p), prompter.target(p))
        total = total - logps.mean() / len(problems)
    truth = gradients_of(model, total)
    targets = [(p, [prompter.target(p)]) for p in problems]
    samples = sft_samples(targets, prompter, coef=1.0, n_questions=2, reduction="token_mean")
    result = sft_backward(Layout(model), samples, ForwardOptions(1.0, 4096))
    assert result.loss == pytest.approx(total.item(), rel=1e-6)
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_gradients_near(got, truth, 1e-6)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--method dpo --train-data NOPAIRS", "has no 'chosen' and 'rejected' columns"),
        ("--method expo-grpo --train-data PAIRS", "needs one to explain"),
        ("--method expert-dpo --train-data UNSOLVED", "has no expert solution"),
        ("--method sft --train-data UNSOLVED", "has no expert solution"),
        ("--method expo-grpo --dynamic-sampling 2", "dynamic_sampling=2 has no effect with method"),
        ("--method star --kl-coef 0.1", "kl_coef=0.1 has no effect with method=star: only"),
        ("--method grpo --shuffle-explanations", "shuffle_explanations=True has no effect"),
        ("--method sft --preference ipo", "preference='ipo' has no effect with method=sft"),
        (
            "--method expo-dpo --explain-every 2",
            "explain_every=2 has no effect with method=expo-dpo",
        ),
        ("--method expo-dpo --refresh-reference", "pairs_every=0: need more than 0"),
        (
            "--method dpo --preference ipo --label-smoothing 0.1",
            "label_smoothing=0.1: need the default: preference=ipo does not read it",
        ),
        ("--method dpo --rdpo-alpha 0.1", "rdpo_alpha=0.1: need the default: preference=dpo"),
        ("--method dpo --preference rdpo", "rdpo_alpha=0.0: need more than 0"),
        ("--method star --exp-sft-coef 0", "exp_sft_coef=0.0: need more than 0"),
        ("--method expert-dpo --dpo-beta -1", "dpo_beta=-1.0: need more than 0"),
        ("--method expert-dpo --pairs-per-question 0", "pairs_per_question=0: need more than 0"),
        ("--lora-rank 2 --lora-alpha 0", "lora_alpha=0.0: need more than 0"),
        ("--generation-budget 12 --explain-every 2", "need 0 with explain_every"),
        (
            "--method grpo --dynamic-sampling 2 --advantage-scale batch",
            "advantage_scale='batch': need group or none",
        ),
        ("--eval-every 1 --eval-data PAIRS", "has no 'answer' to judge attempts by"),
        ("--generation-budget 9", "generation_budget=9: need at least 10, 8 of them explanations"),
        ("--method sft --updates-per-batch 2", "updates_per_batch=2 has no effect with method=sft"),
        ("--lora-rank 2 --batch-invariant", "batch_invariant needs plain weights"),
        ("--lora-rank 99", "rank is 99"),
        ("--overlong-buffer 20", "overlong_buffer=20"),
        ("--method sft --top-p 0.5", "top_p=0.5 has no effect with method=sft"),
        ("--method dpo --generation-budget 4", "generation_budget=4 has no effect with method=dpo"),
        ("--objective sapo --clip-high 0.3", "clip_high=0.3: need the default: objective=sapo"),
        ("--objective cispo --clip-low 0.3", "clip_low=0.3: need the default: objective=cispo"),
        (
            "--method grpo --dynamic-sampling 2 --generation-budget 4",
            "generation_budget=4: need 0 with dynamic_sampling",
        ),
        (
            "--method expo-dpo --pairs-every 2 --refresh-reference --preference simpo",
            "need False: preference=simpo has no reference",
        ),
        ("--method dpo --label-smoothing 0.5", "label_smoothing=0.5"),
        ("--exp-sft-max-accuracy 1.5", "exp_sft_max_accuracy=1.5"),
        (
            "--config no-such-preset",
            "no file no-such-preset: --config needs a TOML file, or one of",
        ),
    ],
)
def test_invalid_configurations_are_refused_in_one_sentence(
    folder, tmp_path, capsys, more, sentence
):
    rows = {
        "NOPAIRS": {"question": "Q?", "answer": "1", "solution": "S"},
        "PAIRS": {"prompt": "Q?", "chosen": "a", "rejected": "b"},
        "UNSOLVED": {"question": "Q?", "answer": "1"},
    }
    for name, row in rows.items():
        lines = "".join(json.dumps(row | {"id": n}) + "\n" for n in range(4))
        (tmp_path / name).write_text(lines)
        more = f"{more} ".replace(f" {name} ", f" {tmp_path / name} ")
    assert exit_status.run(train.main, flags(folder, tmp_path / "run", *more.split())) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert sentence in errors[0]
    assert not (tmp_path / "run").exists()


def user(n: int) -> dict[str, str]:
    return {"role": "user", "content": f"{n} + 1?"}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


DATA_FORMS = {
    "UltraFeedback's": (
        "dpo",
        lambda n: {
            "chosen": [user(n), assistant(f"It is {n + 1}.")],
            "rejected": [user(n), assistant("No.")],
        },
    ),
    "verl's": (
        "grpo",
        lambda n: {"prompt": [user(n)], "reward_model": {"ground_truth": str(n + 1)}},
    ),
    "TRL's": ("grpo", lambda n: {"prompt": [user(n)], "solution": f"$\\boxed{{{n + 1}}}$"}),
    "TRL's without a box": (
        "grpo",
        lambda n: {"prompt": [user(n)], "solution": f"One\nis {n + 1} - {n}."},
    ),
    "with the answer's beginning": (
        "expo-grpo",
        lambda n: {"prompt": [user(n), assistant("It is")], "answer": str(n + 1)},
    ),
}


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("form", DATA_FORMS)
def test_data_of_trl_and_verl_are_trained_on(form: str, folder: Path, tmp_path: Path):
    method, row = DATA_FORMS[form]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row(n)) + "\n" for n in range(8)))
    given = ("--train-data", data, "--method", method, "--steps", 1)
    train.main(flags(folder, tmp_path / "run", *given))
    (logged,) = metrics_of(tmp_path / "run")
    assert logged["grad_norm"] > 0
