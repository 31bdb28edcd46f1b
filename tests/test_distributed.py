"""Runs on several ranks (gloo, in fp32) learn what a run in one process learns."""

import fcntl
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from expo_fast import train
from expo_fast.algorithms.resume import with_recorded_options
from expo_fast.algorithms.run_record import RECORD
from expo_fast.cli.flags import dump_toml, parse
from expo_fast.config import Train
from expo_fast.distributed.error_reach import Reach, mark
from expo_fast.distributed.gathering import FIRST_BYTES, gather_values
from expo_fast.distributed.launch import prints
from expo_fast.distributed.session import is_of_communication
from expo_fast.distributed.world import ALONE, PeerLostError, World, shares, within_collectives
from expo_fast.generate import Generator
from expo_fast.inference import cuda_engine
from expo_fast.inference.torch_engine import TorchEngine
from expo_fast.inspection.memory import MemoryEstimate
from expo_fast.inspection.ranks_memory import choose_gather, rank_bytes, sent_bytes
from expo_fast.reporting.metric_table import find_metric
from jobs import metrics_of, rows_in
from ranks import (
    SMALL,
    Ranks,
    difference,
    job_flags,
    state_bits,
    write_job_files,
)
from tiny import tiny_model

pytestmark = pytest.mark.usefixtures("lenient")

EXACT = "--batch-invariant --reward {root}/rewards.py:odd "
LORA = "--lora-rank 3 "
EXPLAINS = "--explanations-per-question 12 "
LAYERS = "--model {root}/deep --shard model --gather layers "

# Flags of jobs, which one process and two ranks run.
METHODS = {
    "sft": "--method sft",
    "sft-lora": "--method sft " + LORA,
    "sft-model": "--method sft --shard model --gradient-checkpointing",
    "dpo": "--method dpo --prompts-per-step 3",
    "grpo": "--method grpo --loss dapo --advantage-scale batch --eval-every 3 " + EXACT,
    "gspo": "--method grpo --objective gspo --updates-per-batch 2 " + EXACT,
    "expo-grpo": "--method expo-grpo --exp-sft-coef 1 --updates-per-batch 2 --kl-coef 0.1 "
    + EXPLAINS
    + EXACT,
    "expert-grpo-model": "--method expert-grpo --shard model --updates-per-batch 2 "
    "--reward {root}/rewards.py:odd",
    "expo-grpo-layers": "--method expo-grpo --exp-sft-coef 1 --updates-per-batch 2 --eval-every 3 "
    "--diagnose-every 1 --reward {root}/rewards.py:odd " + EXPLAINS + LAYERS,
    "uneven-layers": "--method grpo --prompts-per-step 1 --reward {root}/rewards.py:odd " + LAYERS,
    "star": "--method star " + EXPLAINS + EXACT,
    "expo-dpo": "--method expo-dpo --pairs-every 2 " + EXPLAINS + EXACT,
    "grpo-lora": "--method grpo --reward {root}/rewards.py:odd " + LORA,
}
COUNTED = ("sft", "expo-grpo-layers", "uneven-layers")  # their gathered layers
BAD = {
    "options": ["--method sft", "--method sft --learning-rate 1e-4"],
    "shard": ["--method sft", "--method sft --shard model"],
    "data": ["--method sft", "--method sft --train-data {root}/eval.jsonl"],
    "flag": ["--method sft", "--method sft --steps -1"],
    "folder": ["--method sft", "--method sft --output-dir {root}/elsewhere"],
    "reward": "--method grpo --reward {root}/rewards.py:fails",
}


class Runs:
    """The folders of the runs.

    root: the files of the jobs and the runs of two ranks, which all workers of pytest share.
    alone: the runs in this process.
    """

    def __init__(self, root: Path, alone: Path):
        self.root = root
        self.alone = alone
        self.flags = SMALL + job_flags(root)

    def job(self, name: str, flags: str | list[str]) -> dict[str, Any]:
        """Return a job of two ranks."""
        folder = self.of_two(name)
        common = f"{self.flags} --output-dir {folder}/run "
        if isinstance(flags, list):
            own: Any = [common + each.format(root=self.root) for each in flags]
        else:
            own = common + flags.format(root=self.root)
        return {"flags": own, "folder": str(folder), "counts_layers": name in COUNTED}

    def train_alone(self, name: str, flags: str, output: Path | None = None) -> Path:
        """Train in this process. Return the run's folder."""
        folder = output or self.alone / name
        flags = f"{self.flags} --output-dir {folder} {flags.format(root=self.root)}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train.main(flags.split())
        return folder

    def of_two(self, name: str) -> Path:
        return self.root / "two" / name

    def ended(self, name: str) -> list[dict[str, Any]]:
        """Return how a job ended on each rank."""
        folder = self.of_two(name)
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return the runs of two ranks. The first worker of pytest that needs them makes them."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "distributed"
    root.mkdir(exist_ok=True)
    runs = Runs(root, alone=tmp_path_factory.mktemp("alone"))
    made = root / "made"
    with open(root / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            make_runs(runs)
            made.touch()
    return runs


def make_runs(runs: Runs) -> None:
    """Run all jobs with two ranks."""
    ranks = Ranks(2, runs.root / "two")  # they start while this process trains
    write_job_files(runs.root)
    jobs = [runs.job(name, flags) for name, flags in METHODS.items()]
    jobs.append(runs.job("again", METHODS["expo-grpo"]))
    jobs.append(runs.job("resumed", METHODS["expo-grpo"] + "--steps 2"))
    jobs.append(runs.job("resumed", METHODS["expo-grpo"]))
    jobs.append(runs.job("resumed-layers", METHODS["expo-grpo-layers"] + "--steps 2"))
    jobs.append(runs.job("resumed-layers", METHODS["expo-grpo-layers"]))
    jobs.append(runs.job("bf16", METHODS["grpo"] + "--dtype bfloat16 --steps 2"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "score_answers", lambda answers, texts: [1.0] * len(texts))
        runs.train_alone("", METHODS["sft"] + " --steps 2", runs.of_two("continued") / "run")
    jobs.append(runs.job("continued", METHODS["sft"]))
    jobs += [runs.job(f"bad-{name}", flags) for name, flags in BAD.items()]
    ranks.run(jobs)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_learn_what_one_process_learns(name: str, runs: Runs):
    assert [end["status"] for end in runs.ended(name)] == [0, 0], runs.ended(name)
    alone = runs.train_alone(name, METHODS[name])
    two = runs.of_two(name) / "run"
    found = difference(alone, two, runs.root / ("deep" if "layers" in name else "model"))
    assert found.loss <= 1e-6
    assert found.gradient <= 1e-5
    if name != "grpo-lora":  # without --batch-invariant, rounding may change a sampled token
        assert found.update <= 1e-3
        for ours, theirs in zip(metrics_of(alone), metrics_of(two), strict=True):
            assert_same_metrics(ours, theirs)
    texts = "completions/step-1.jsonl"
    assert columns(two / texts) == columns(alone / texts)


def assert_same_metrics(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Compare all metrics but times. Only rounding may differ."""
    of_ranks = {name for name in theirs if name.startswith("rank/") or name == "idle"}
    assert len(of_ranks) == 7
    assert all(find_metric(name) for name in of_ranks)
    assert ours.keys() == theirs.keys() - of_ranks
    for name, value in ours.items():
        if value is None:
            assert theirs[name] is None
        elif name == "rewards/accuracies" and abs(ours["rewards/margins"]) < 1e-4:
            continue  # the policy is still the reference, so the sign of a margin is rounding
        elif not name.startswith("time/"):
            assert theirs[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def columns(path: Path) -> list[tuple[str, str, str]]:
    """Return what was trained on, in the order of the file."""
    rows = rows_in(path)
    return [(row["id"], row["kind"], row["completion"]) for row in rows]


@pytest.mark.slow
def test_runs_on_two_ranks_are_bit_identical_also_after_a_resume(runs: Runs):
    expected = state_bits(runs.of_two("expo-grpo") / "run/checkpoints/step-3")
    for name in ("again", "resumed"):
        run = runs.of_two(name) / "run"
        assert state_bits(run / "checkpoints/step-3") == expected
        assert len(metrics_of(run)) == 3


@pytest.mark.slow
def test_a_run_that_gathers_by_layer_resumes_to_the_bit(runs: Runs):
    expected = state_bits(runs.of_two("expo-grpo-layers") / "run/checkpoints/step-3")
    run = runs.of_two("resumed-layers") / "run"
    assert state_bits(run / "checkpoints/step-3") == expected
    assert len(metrics_of(run)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["expo-grpo-layers", "uneven-layers"])
def test_a_rank_uses_one_layer_at_a_time(name: str, runs: Runs):
    """The model has 5 layers. FSDP may gather the next one, which is not in its module yet."""
    assert [end["gathered_layers"] for end in runs.ended(name)] == [1, 1]
    assert [end["gathered_layers"] for end in runs.ended("sft")] == [2, 2]  # both of the model


@pytest.mark.slow
def test_a_run_continues_on_another_number_of_ranks(runs: Runs):
    """From two ranks to one process, and from one process to two ranks."""
    alone = runs.train_alone("sft", METHODS["sft"])
    assert difference(alone, runs.of_two("continued") / "run", runs.root / "model").update <= 1e-3
    two = runs.of_two("sft") / "run"
    back = runs.alone / "back"
    runs.train_alone("", f"{METHODS['sft']} --resume {two}/checkpoints/step-1", back)
    expected = state_bits(two / "checkpoints/step-2")
    found = state_bits(back / "checkpoints/step-2")
    assert expected.keys() == found.keys()
    assert len(metrics_of(back)) == 2


@pytest.mark.slow
def test_bf16_weights_are_those_of_the_sharded_masters(runs: Runs):
    ended = runs.ended("bf16")
    assert [end["status"] for end in ended] == [0, 0], ended
    alone = runs.train_alone("bf16", METHODS["grpo"] + "--dtype bfloat16 --steps 2")
    found = difference(alone, runs.of_two("bf16") / "run", runs.root / "model")
    assert found.loss <= 1e-3
    assert found.gradient <= 2e-2  # bf16 gradients of two packs in place of one


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("options", "option learning_rate is 0.001 on rank 0 and 0.0001 on rank 1"),
        ("shard", "option shard is 'optimizer' on rank 0 and 'model' on rank 1"),
        ("data", "option train_data is"),
        ("flag", "rank 1: steps=-1: need more than 0"),
        ("folder", "option output_dir is"),
    ],
)
def test_ranks_that_differ_are_one_sentence_and_write_nothing(name: str, message: str, runs: Runs):
    first, second = runs.ended(f"bad-{name}")
    assert first["status"] == second["status"] == 2, (first, second)
    assert message in first["error"]
    assert not (runs.of_two(f"bad-{name}") / "run").exists()


@pytest.mark.slow
def test_a_reward_function_that_raises_on_one_rank_ends_both(runs: Runs):
    first, second = runs.ended("bad-reward")
    assert first["status"] == second["status"] == 2
    assert first["error"].startswith("rank 1: reward function fails raised KeyError: 'gone'")
    assert "rank 1: " + second["error"] == first["error"]


def test_the_deal_is_balanced_and_complete():
    costs = [5.0, 1.0, 1.0, 4.0, 1.0]
    dealt = shares(costs, 2)
    assert dealt == [[0, 2], [1, 3, 4]]
    assert shares(costs, 1) == [[0, 1, 2, 3, 4]]
    assert shares([], 3) == [[], [], []]
    assert shares([1.0], 3) == [[0], [], []]


def test_the_memory_of_a_rank_is_that_of_the_formula():
    """The formula of docs/scaling.md, and with --shard model only two layers in training."""
    model = tiny_model(tie_word_embeddings=True)
    total = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    unit = max(layer, total - 4 * layer)
    estimate = MemoryEstimate(
        weights=2 * total,
        optimizer=12 * total,
        gradients=4 * total,
        activations=10**6,
        head=10**5,
        kv_cache=0,
        runtime=0,
    )
    for ranks in (1, 2, 4):
        expected = 2 * total + 16 * total / ranks + (4 + 4 / ranks) * unit + 1.1e6
        found = rank_bytes(Train(method="sft"), model, estimate, ranks)
        assert found == pytest.approx(expected, rel=1e-6)
        sharded = rank_bytes(Train(method="sft", shard="model"), model, estimate, ranks)
        assert sharded == pytest.approx(expected - 2 * 2 * layer, rel=1e-6)
    estimate = replace(estimate, kv_cache=10**7)
    by_layer = rank_bytes(Train(method="sft", shard="model"), model, estimate, 2, "layers")
    assert by_layer == pytest.approx(2 * total + 8 * total - 2 * 2 * layer + 1e7, rel=1e-6)


def test_layers_are_gathered_if_all_weights_do_not_fit_beside_the_state():
    model = tiny_model()
    total = sum(p.numel() for p in model.parameters())
    needed = 2 * total + 20 * total // 4  # expo-grpo sums two gradients
    enough = needed * 10 // 7 + 2
    config = Train(shard="model")
    assert choose_gather(config, model, 4, enough).kind == "weights"
    chosen = choose_gather(config, model, 4, enough - 4)
    assert chosen.kind == "layers"
    assert str(chosen).startswith("sampling gathers layer by layer, which is slow")
    assert choose_gather(Train(shard="model", gather="weights"), model, 4, 1).kind == "weights"


def test_a_model_gathered_by_layer_is_sampled_by_the_torch_engine(
    monkeypatch: pytest.MonkeyPatch,
):
    model = tiny_model()
    monkeypatch.setattr(cuda_engine, "supports", lambda model: True)
    model.gathers_by_layer = True  # as `Sharded` sets it
    assert isinstance(Generator(model).engine(), TorchEngine)


def test_a_frozen_reference_counts_for_the_choice_of_what_is_gathered():
    model = tiny_model()
    total = sum(p.numel() for p in model.parameters())
    plain = choose_gather(Train(shard="model"), model, 4, 1)
    with_reference = choose_gather(Train(shard="model", kl_coef=0.1), model, 4, 1)
    assert with_reference.needed == plain.needed + 2 * total


def test_the_result_of_a_run_by_layer_names_where_the_model_is(tmp_path: Path):
    result = train.TrainResult(tmp_path, tokenizer=None, _generator=None, _model=None)
    for name in ("model", "generator"):
        with pytest.raises(RuntimeError, match=r"load the model from .* TrainResult\.model_path"):
            getattr(result, name)


def test_a_resume_with_auto_takes_what_the_run_gathered(tmp_path: Path):
    config = Train(shard="model", output_dir=str(tmp_path))
    (tmp_path / RECORD).write_text(dump_toml(replace(config, gather="layers")))
    assert with_recorded_options(config).gather == "layers"
    assert with_recorded_options(replace(config, gather="weights")).gather == "weights"
    assert with_recorded_options(replace(config, shard="optimizer")).gather == "auto"


def test_gathering_by_layer_is_refused_where_all_weights_stay():
    with pytest.raises(ValueError, match="gather=layers: this needs shard=model"):
        parse(Train, ["--gather", "layers"])


def test_a_rank_sends_all_parts_but_its_own():
    model = tiny_model()
    total = sum(p.numel() for p in model.parameters())
    assert sent_bytes(Train(), model, 1) == 0
    assert sent_bytes(Train(), model, 2) == 6 * total // 2
    assert sent_bytes(Train(shard="model"), model, 4) == 10 * total * 3 // 4


def test_one_process_exchanges_nothing():
    assert World() == ALONE
    assert ALONE.exchange(3) == [3]
    assert ALONE.broadcast("a") == "a"
    assert ALONE.sums(1.0, 2.0) == [1.0, 2.0]
    deal = ALONE.deal([1.0, 5.0])
    assert deal.collect(deal.own(["a", "b"])) == ["a", "b"]
    with pytest.raises(KeyError), ALONE.agreed():
        raise KeyError


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (RuntimeError("Connection reset by peer"), True),
        (RuntimeError("ProcessGroup is not ready"), True),
        (PeerLostError(), True),
        (RuntimeError("no reward for 1 completion"), False),
        (OSError("Connection reset by peer"), False),
    ],
)
def test_an_error_of_communication_is_told_by_its_words(error: Exception, expected: bool):
    assert is_of_communication(error) == expected
    mark(error, Reach.TOLD_TO_ALL)  # such as that of a reward function
    assert is_of_communication(error) == isinstance(error, PeerLostError)


@pytest.mark.parametrize(("rank", "expected"), [("0", True), ("1", False)])
def test_rank_0_prints_what_all_ranks_raise(
    rank: str, expected: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = ValueError("a mistake")
    assert prints(error)
    with pytest.raises(ValueError), within_collectives():
        raise error
    assert prints(error)
    mark(error, Reach.RAISED_BY_ALL)
    assert prints(error) == expected


def test_values_of_any_length_are_exchanged():
    """Each rank is a thread. A long value needs a second collective."""
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    values = [["a" * n, None][:n] for n in (0, 1, 2 * FIRST_BYTES)]

    def rank(number: int) -> list[list[Any]]:
        group = dist.ProcessGroupGloo(store, number, 2, timedelta(seconds=10))
        return [gather_values((number, value)[: number + 1], 2, group) for value in values]

    with ThreadPoolExecutor(2) as ranks:
        first, second = ranks.map(rank, range(2))
    assert first == second == [[(0,), (1, value)] for value in values]
