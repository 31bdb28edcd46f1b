"""Preference training: losses, pairs, and runs that are stopped and resumed.

Losses are compared with the formulas (DPO: arXiv:2305.18290, eq. 7) in fp64, one pair at a time,
through complete logits.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expo_fast import train
from expo_fast.algorithms import dpo
from expo_fast.algorithms.dpo import (
    PreferenceLossConfig,
    nll_metrics,
    pair_metrics,
    pair_samples,
    preference_backward,
)
from expo_fast.algorithms.explanations import Positives
from expo_fast.algorithms.logprobs import ForwardOptions, completion_logprobs, sequence_logprobs
from expo_fast.algorithms.pairs import Pair, PairStore, pair_up
from expo_fast.algorithms.rollout import Group
from expo_fast.algorithms.trainer import Trainer
from expo_fast.config import Train
from expo_fast.data.problems import Problem
from expo_fast.data.prompts import Prompter
from expo_fast.generate import Completion
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.layout import Layout
from expo_fast.modeling.packing import pack
from expo_fast.objectives import PREFERENCE_OBJECTIVES
from jobs import metrics_of, trainer_of, without_times, write_rows
from judges import (
    assert_gradients_near,
    completion_logps,
    dpo_loss,
    gradients_of,
    hinge_loss,
    ipo_loss,
    rdpo_loss,
)
from tiny import tiny_model, tiny_tokenizer

T, BETA = 0.7, 0.3
SHOTS = (5, 6, 7)
PAIRS = [  # ragged; two of one prompt, with a chosen answer in common
    Pair("a", (*SHOTS, 30, 31), (50, 51, 52, 1), (60, 61), (-9.0, -8.0)),
    Pair("b", (*SHOTS, 40), (70, 1), (80, 81, 82, 83, 1), (-3.0, -20.0)),
    Pair("a", (*SHOTS, 30, 31), (50, 51, 52, 1), (62, 63, 1), (-9.0, -12.0)),
]


def config(**changes: Any) -> Train:
    given = {"method": "expo-dpo", "dpo_beta": BETA, "temperature": T, "pack_tokens": 1000}
    return Train(**(given | changes))


def summed_logp(model: Decoder, prompt: tuple[int, ...], ids: tuple[int, ...]) -> Tensor:
    return completion_logps(model, prompt, ids, T).sum()


def log_ratios(model: Decoder, pair: Pair) -> tuple[Tensor, Tensor]:
    """Return those of the chosen and of the rejected sequence."""
    chosen = summed_logp(model, pair.prompt_ids, pair.chosen_ids) - pair.ref_logp[0]
    rejected = summed_logp(model, pair.prompt_ids, pair.rejected_ids) - pair.ref_logp[1]
    return chosen, rejected


def mean_loss(model: Decoder, pairs: list[Pair], value: Any, averaged: bool = False) -> Tensor:
    """Return the mean of value(margin) over pairs; `averaged` takes log-ratios a token."""
    total = torch.zeros((), dtype=torch.float64)
    for p in pairs:
        chosen, rejected = log_ratios(model, p)
        if averaged:
            chosen = chosen / len(p.chosen_ids)
            rejected = rejected / len(p.rejected_ids)
        total = total + value(chosen - rejected) / len(pairs)
    return total


def backward(model: Decoder, c: Train, pairs: list[Pair]) -> dict[str, Any]:
    """Run the loss and its gradients over the packs; return its metrics."""
    result = preference_backward(Layout(model), pairs, PreferenceLossConfig.of(c))
    return pair_metrics(result) | nll_metrics(result, c)


VALUES = {
    "dpo": lambda margin: dpo_loss(margin, BETA),
    "smoothed": lambda margin: dpo_loss(margin, BETA, label_smoothing=0.2),
    "ipo": lambda margin: ipo_loss(margin, BETA),  # of mean log-ratios, as TRL's
    "hinge": lambda margin: hinge_loss(margin, BETA),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("pack_tokens", [1, 20, 1000])
def test_loss_and_gradients_equal_the_formula(name: str, pack_tokens: int):
    model = tiny_model(dtype=torch.float64)
    loss = mean_loss(model, PAIRS, VALUES[name], averaged=name == "ipo")
    truth = gradients_of(model, loss)
    changes = {"label_smoothing": 0.2} if name == "smoothed" else {"preference": name}
    c = config(pack_tokens=pack_tokens, **changes)
    row = backward(model, c, PAIRS)
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_gradients_near(got, truth, 1e-6)


def test_metrics_are_those_of_the_pairs_however_they_are_packed():
    model = tiny_model(dtype=torch.float64)
    ratios = torch.tensor([[x.item() for x in log_ratios(model, p)] for p in PAIRS])
    chosen, rejected = (BETA * ratios).T
    for pack_tokens in (1, 1000):
        row = backward(model, config(pack_tokens=pack_tokens), PAIRS)
        assert row["pairs"] == 3
        assert row["rewards/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-5)
        assert row["rewards/rejected"] == pytest.approx(rejected.mean().item(), rel=1e-5)
        assert row["rewards/margins"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-5)
        logps = [completion_logps(model, p.prompt_ids, p.chosen_ids, T) for p in PAIRS]
        assert row["exp/nll"] == pytest.approx(-sum(x.mean().item() for x in logps) / 3, rel=1e-5)
        shares = (chosen > rejected).float().mean().item()
        assert row["rewards/accuracies"] == pytest.approx(shares)


def test_both_sides_of_a_pair_are_in_one_pack():
    samples = pair_samples(PAIRS)
    packs = list(pack(samples, 1, together=2))
    assert [p.members for p in packs] == [(0, 1), (4, 5), (2, 3)]
    (one,) = pack(samples, 1000, together=2)
    assert one.members == (0, 1, 4, 5, 2, 3)  # by prompt, the chosen one first


def test_a_step_without_pairs_has_no_loss_and_moves_nothing():
    row = backward(tiny_model(), config(), [])
    assert row["pairs"] == 0
    assert row["loss"] is row["rewards/chosen"] is None


@pytest.mark.parametrize("preference", PREFERENCE_OBJECTIVES)
def test_every_objective_takes_its_coefficient(preference: str):
    alpha = {"rdpo_alpha": 0.1} if preference == "rdpo" else {}
    objective = PreferenceLossConfig.of(config(preference=preference, **alpha)).objective
    assert objective.beta == BETA  # pyright: ignore[reportAttributeAccessIssue]
    assert type(objective).__name__.lower().replace("positive", "p") == preference


def test_rdpo_equals_the_formula_with_its_length_term():
    model = tiny_model(dtype=torch.float64)
    total = 0.0
    for p in PAIRS:
        chosen, rejected = log_ratios(model, p)
        longer = torch.tensor(len(p.chosen_ids) - len(p.rejected_ids))
        total += rdpo_loss(chosen - rejected, longer, BETA, 0.2).item() / len(PAIRS)
    row = backward(model, config(preference="rdpo", rdpo_alpha=0.2), PAIRS)
    assert row["loss"] == pytest.approx(total, rel=1e-6)


def group(rewards: list[float | None]) -> Group:
    done = [Completion([50 + i, 1], torch.zeros(2), "stop") for i in range(len(rewards))]
    problem = Problem(id="q", prompt="Q?", answer="1", solution="S")
    n = len(rewards)
    return Group(problem, (5, 6), done, ["No."] * n, rewards, [0.0] * n)


def test_right_and_ungraded_attempts_are_never_the_rejected_side():
    found = Positives({"q": [(90, 1), (91, 1)]})
    me = trainer_of(config(pairs_per_question=9), None, Prompter(tiny_tokenizer()))
    pairs = dpo.pairs_of_groups(me, [group([0.0, 1.0, None, 0.0, -1.0])], found)
    assert [p.rejected_ids for p in pairs] == [(50, 1), (53, 1), (54, 1)]
    assert [p.chosen_ids for p in pairs] == [(90, 1), (91, 1), (90, 1)]
    assert dpo.pairs_of_groups(me, [group([1.0, None])], found) == []
    assert dpo.pairs_of_groups(me, [group([0.0])], Positives()) == []


def test_each_failed_attempt_is_in_one_pair_at_most():
    problem = Problem(id="q", prompt="Q?", answer="1")
    pairs = pair_up(problem, Prompter(tiny_tokenizer()), [(9,)], [(10,), (11,), (12,)], 2)
    assert [(p.chosen_ids, p.rejected_ids) for p in pairs] == [((9,), (10,)), ((9,), (11,))]


def test_the_reference_is_the_initial_policy_or_with_refresh_the_sampling_one():
    now, initial = tiny_model(), tiny_model(seed=1)
    me = trainer_of(config(), now, None, reference=initial)

    def got(policy_step: int) -> list[float]:
        pairs = dpo.with_reference_logprobs(me, PAIRS, policy_step)
        return [x for p in pairs for x in p.ref_logp]

    def under(model: Decoder) -> list[float]:
        scored = completion_logprobs(model, pair_samples(PAIRS), ForwardOptions(T, 1000))
        return sequence_logprobs(scored).tolist()

    assert got(3) == under(initial) != under(now)
    assert got(0) == under(now)  # before any training, the policy is the initial one
    me.config = replace(me.config, pairs_every=4, refresh_reference=True)
    assert got(3) == under(now)


def test_pairs_are_read_as_they_were_written(tmp_path: Path):
    store = PairStore(tmp_path / "pairs", {"seed": 0})
    store.begin(0)
    store.write(0, {"pairs/policy_step": 0, "pairs/tokens": 7}, PAIRS, [{"prompt": "Q"}] * 3)
    assert store.read(0) == ({"pairs/policy_step": 0, "pairs/tokens": 7}, PAIRS)
    store.write(1, {"pairs/policy_step": 1, "pairs/tokens": 0}, [], [])
    assert store.read(1)[1] == []
    assert store.count() == 2
    store.begin(0)  # older than the weights that sampled the pairs of step 1
    assert store.has(0)
    assert not store.has(1)
    for other in ({"seed": 1}, {"seed": 0, "weights": "x"}):
        with pytest.raises(ValueError, match=r"this run has .*: choose another --output-dir"):
            PairStore(tmp_path / "pairs", other).begin(0)


def test_pairs_of_another_version_of_the_grader_are_kept_with_a_warning(tmp_path: Path):
    PairStore(tmp_path / "pairs", {"seed": 0, "grader": "old"}).begin(0)
    with pytest.warns(UserWarning, match="grader='old', this run has 'new'"):
        PairStore(tmp_path / "pairs", {"seed": 0, "grader": "new"}).begin(0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from expo_fast.weights import save_model

    root = tmp_path_factory.mktemp("job")
    save_model(tiny_model(), tiny_tokenizer(), root / "model")
    rows = [
        {"question": f"{n} + 1?", "answer": str(n + 1), "solution": f"{n} + 1 = {n + 1}."}
        for n in range(9)
    ]
    write_rows(root / "train.jsonl", rows)
    pairs = [{"prompt": f"{n}?", "chosen": f"yes {n}", "rejected": "no"} for n in range(9)]
    write_rows(root / "pairs.jsonl", pairs)
    return root


def job(data: Path, run: Path, method: str, *more: object) -> list[str]:
    source = "pairs" if method == "dpo" else "train"
    given = f"--model {data}/model --train-data {data}/{source}.jsonl --shots 0 --eval-every 0 "
    given += f"--method {method} --output-dir {run} --steps 4 --prompts-per-step 2 "
    given += "--max-completion-length 8 --dtype float32 --checkpoint-every 1 "
    given += "--num-generations 2 " if method != "dpo" else ""
    return [*given.split(), "--learning-rate", "1e-3", *map(str, more)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("expert-dpo", ()),
        ("expert-dpo", ("--pairs-every", 2)),
        ("expert-dpo", ("--pairs-every", 3, "--refresh-reference")),
        ("expert-dpo", ("--pairs-every", 2, "--lora-rank", 2)),
        ("dpo", ("--instruction", "")),
        ("expo-dpo", ("--max-completion-length", 20)),
        ("expo-dpo", ("--max-completion-length", 20, "--pairs-every", 2, "--shuffle-explanations")),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, more: tuple
):
    if method == "expo-dpo":  # no explanation of a random model is right
        monkeypatch.setattr(train, "score_answers", lambda answers, texts: [1.0] * len(texts))
        rewards = tmp_path / "rewards.py"
        rewards.write_text(
            "def none(completions, **columns):\n    return [0.0] * len(completions)\n"
        )
        more = (*more, "--reward", f"{rewards}:none")
    train.main(job(data, tmp_path / "uninterrupted", method, *more, "--schedule", "constant"))
    expected = without_times(metrics_of(tmp_path / "uninterrupted"))
    assert any(row["pairs"] for row in expected)
    for cut in (-1, 1, 3):
        run = tmp_path / f"cut-{cut}"
        given = job(data, run, method, *more, "--schedule", "constant")
        stopping = stop_at(cut)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if cut < 0:
                patch.setattr(PairStore, "write", stop_within_the_first_round())
            else:
                patch.setitem(train.LOOPS, "dpo", stopping)
            train.main(given)
        train.main(given)
        assert without_times(metrics_of(run)) == expected
        for name in ("model.safetensors", "adapter_model.safetensors"):
            expected_file = tmp_path / "uninterrupted/checkpoints/step-4" / name
            if expected_file.exists():
                found_file = run / "checkpoints/step-4" / name
                assert found_file.read_bytes() == expected_file.read_bytes()


def stop_within_the_first_round() -> Any:
    usual = PairStore.write

    def write(self: PairStore, step: int, *given: Any) -> None:
        if step == 1:
            raise KeyboardInterrupt
        usual(self, step, *given)

    return write


def stop_at(cut: int) -> Any:
    usual = train.LOOPS["dpo"]

    def run_step(trainer: Trainer, step: int, phases: Any) -> Any:
        found = usual(trainer, step, phases)
        if step == cut:  # after its pairs are on disk, before its checkpoint
            raise KeyboardInterrupt
        return found

    return run_step


def test_offline_pairs_are_of_the_initial_policy_and_serve_as_data_for_dpo(data, tmp_path):
    train.main(job(data, tmp_path / "run", "expert-dpo"))
    heads = [
        json.loads(p.read_text()) for p in sorted((tmp_path / "run/pairs").glob("step-*.json"))
    ]
    assert [head["pairs/policy_step"] for head in heads] == [0] * 4
    assert metrics_of(tmp_path / "run")[0]["num_tokens"] == sum(
        head["pairs/tokens"] for head in heads
    )
    rows = "".join(p.read_text() for p in (tmp_path / "run/pairs").glob("step-*.jsonl"))
    (tmp_path / "all.jsonl").write_text(rows)
    given = job(data, tmp_path / "again", "dpo", "--train-data", tmp_path / "all.jsonl")
    train.main(given)
    assert metrics_of(tmp_path / "again")[-1]["rewards/margins"] > 0


def test_an_offline_run_without_its_pairs_is_refused(data: Path, tmp_path: Path):
    more = ("--schedule", "constant")
    train.main(job(data, tmp_path / "run", "expert-dpo", *more, "--steps", 2))
    path = tmp_path / "run/checkpoints/step-2"
    with pytest.raises(ValueError, match=r"new/pairs does not hold the pairs of step 3"):
        train.main(job(data, tmp_path / "new", "expert-dpo", *more, "--resume", path))


def test_an_extended_offline_run_repeats_its_pairs(data: Path, tmp_path: Path):
    for steps in (2, 3):
        more = ("--schedule", "constant", "--steps", steps)
        train.main(job(data, tmp_path, "expert-dpo", *more))
    assert not (tmp_path / "pairs/step-3.json").exists()
    compared = [(tmp_path / f"completions/step-{n}.jsonl").read_text() for n in (1, 3)]
    assert compared[0] == compared[1]


def test_an_extended_online_run_equals_one_of_full_length(data, tmp_path):
    more = ("--pairs-every", 4, "--schedule", "constant")
    train.main(job(data, tmp_path / "long", "expert-dpo", *more, "--steps", 4))
    train.main(job(data, tmp_path / "run", "expert-dpo", *more, "--steps", 2))
    train.main(job(data, tmp_path / "run", "expert-dpo", *more, "--steps", 4))
    extended, long = metrics_of(tmp_path / "run"), metrics_of(tmp_path / "long")
    assert without_times(extended) == without_times(long)


def test_a_round_begun_in_another_folder_is_not_finished_with_later_weights(data, tmp_path):
    more = ("--pairs-every", 3, "--schedule", "constant")
    train.main(job(data, tmp_path / "run", "expert-dpo", *more, "--steps", 4))
    path = tmp_path / "run/checkpoints"
    given = ("--resume", path / "step-4", "--steps", 6)
    with pytest.raises(ValueError, match=r"pairs of step 5, which the weights of an earlier step"):
        train.main(job(data, tmp_path / "new", "expert-dpo", *more, *given))
    assert not (tmp_path / "new").exists()


def test_pairs_of_other_initial_weights_are_refused(data: Path, tmp_path: Path):
    import shutil

    from expo_fast.weights import save_model

    shutil.copytree(data / "model", tmp_path / "model")
    given = job(data, tmp_path / "run", "expert-dpo", "--model", tmp_path / "model")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(train.LOOPS, "dpo", stop_at(0))
        train.main(given)
    save_model(tiny_model(seed=5), tiny_tokenizer(), tmp_path / "model")
    with pytest.raises(ValueError, match=r"provenance.json says weights='\w+', this run has"):
        train.main(given)


def test_pairs_judged_by_another_reward_are_refused(data: Path, tmp_path: Path):
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def none(prompts, **columns):\n    return [0.0] * len(prompts)\n")
    more = ("--reward", f"{rewards}:none", "--schedule", "constant", "--steps")
    given = job(data, tmp_path / "run", "expert-dpo", *more, 3)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(train.LOOPS, "dpo", stop_at(0))
        train.main(given)
    rewards.write_text(rewards.read_text().replace("0.0", "0.5"))
    with pytest.raises(ValueError, match=r"provenance.json says reward='\w+', this run has"):
        train.main(given)
    rewards.write_text(rewards.read_text().replace("0.5", "0.0"))
    train.main(job(data, tmp_path / "run", "expert-dpo", *more, 2))
    rewards.write_text(rewards.read_text().replace("0.0", "0.5"))
    with pytest.raises(ValueError, match="step-2 was made with other reward functions"):
        train.main(given)
    train.main([*given, "--inexact-resume"])
    assert [row.get("inexact") for row in metrics_of(tmp_path / "run")] == [
        None,
        None,
        1,
    ]


def test_pairs_of_a_version_without_the_reward_can_be_resumed_twice(data: Path, tmp_path: Path):
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def none(prompts, **columns):\n    return [0.0] * len(prompts)\n")
    more = ("--reward", f"{rewards}:none", "--schedule", "constant", "--steps")
    train.main(job(data, tmp_path / "run", "expert-dpo", *more, 1))
    file = tmp_path / "run/pairs/provenance.json"
    old = json.loads(file.read_text())
    del old["reward"]
    file.write_text(json.dumps(old))
    for steps in (2, 3):
        train.main(job(data, tmp_path / "run", "expert-dpo", *more, steps))
    assert len(metrics_of(tmp_path / "run")) == 3


def test_damaged_files_of_pairs_are_named(data: Path, tmp_path: Path):
    more = ("--schedule", "constant")
    train.main(job(data, tmp_path, "expert-dpo", *more, "--steps", 2))
    file = tmp_path / "pairs/step-2.json"
    file.write_text(file.read_text()[:9])
    with pytest.raises(ValueError, match=r"step-2.json is damaged"):
        train.main(job(data, tmp_path, "expert-dpo", *more, "--steps", 3))


@pytest.mark.parametrize("damage", ["digit", "cut", "removed"])
def test_changed_pairs_are_refused_or_sampled_again(tmp_path: Path, damage: str):
    store = PairStore(tmp_path / "pairs", {"seed": 0})
    store.begin(0)
    for step in range(2):
        store.write(step, {"pairs/policy_step": step}, PAIRS, [{} for _ in PAIRS])
    metrics, pairs = store.read(1)
    assert metrics == {"pairs/policy_step": 1}
    assert [pair.chosen_ids for pair in pairs] == [tuple(pair.chosen_ids) for pair in PAIRS]
    file = tmp_path / "pairs/step-2.jsonl"
    text = file.read_text()
    if damage == "digit":
        file.write_text(text.replace('"ref_logp": [-', '"ref_logp": [-1', 1))
    elif damage == "cut":
        file.write_text(text[: text.index("\n") + 1])
    else:
        file.unlink()
    assert damage == "removed" or file.read_text() != text
    with pytest.raises(ValueError, match=r"step-2\.jsonl is damaged .* start again in another"):
        store.read(1)
    with pytest.raises(ValueError, match=r"step-2\.jsonl is damaged"):
        store.begin(2)  # the weights of step 1 are gone
    with pytest.warns(UserWarning, match=r"step-2\.jsonl is damaged .* samples them again"):
        store.begin(1)
    assert store.has(0) and not store.has(1)


def test_rewards_of_simpo_are_mean_log_probs():
    model = tiny_model(dtype=torch.float64)
    means = [
        2 * completion_logps(model, p.prompt_ids, p.chosen_ids, T).mean().item() for p in PAIRS
    ]
    # SimPO has no reference: its log-probs are 0
    bare = [replace(p, ref_logp=(0.0, 0.0)) for p in PAIRS]
    row = backward(model, config(preference="simpo", dpo_beta=2.0), bare)
    assert row["rewards/chosen"] == pytest.approx(sum(means) / 3, rel=1e-5)
