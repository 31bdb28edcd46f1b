"""Reward functions of users get the same arguments as in TRL, and errors name the function."""

import asyncio
import functools
import json
import math
import re
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expo_fast import train
from expo_fast.algorithms.training_data import TrainingData
from expo_fast.config import Train
from expo_fast.data.problems import Problem
from expo_fast.generate import Completion
from expo_fast.reward_functions import (
    TRAINERS_COLUMNS,
    RewardError,
    RewardFunction,
    Rewards,
    TrainerState,
    custom_reward,
    load_rewards,
    name_of,
)
from expo_fast.weights import save_model
from jobs import metrics_of, rows_in, write_rows
from tiny import tiny_model, tiny_tokenizer

TEXTS = ["<think>\nOne\n</think>\nIt is \\boxed{2}.", "It is \\boxed{4}."]
DONE = [Completion([5] * n, torch.zeros(n), "stop") for n in (9, 12)]
TEXT = [
    Problem("a", "1 + 1?", "2", solution="\\boxed{2}", columns={"hint": "two"}),
    Problem("b", "1 + 2?", "3", solution="\\boxed{3}", columns={"hint": "three"}),
]
CHAT = [replace(p, prompt=({"role": "user", "content": str(p.prompt)},)) for p in TEXT]


def load(folder: Path, source: str, *names: str) -> list[RewardFunction]:
    """Write a file with this source, and return functions of it."""
    path = folder / "mine.py"
    path.write_text(textwrap.dedent(source))
    return load_rewards([f"{path}:{name}" for name in names])


def rewarded(
    functions: Any,
    problems: list[Problem] = TEXT,
    weights: tuple[float, ...] = (),
    state: TrainerState | None = None,
) -> Rewards:
    rewards = custom_reward(functions, weights, state)(problems, TEXTS, DONE)
    assert isinstance(rewards, Rewards)
    return rewards


# Arguments of a function


def test_chat_data_gives_messages_and_text_data_gives_strings():
    given: list[dict[str, Any]] = []

    def spy(**arguments):
        given.append(arguments)
        return [0.0, 1.0]

    rewarded(spy, CHAT)
    rewarded(spy, TEXT)
    chat, text = given
    assert chat["prompts"] == [[{"role": "user", "content": p.prompt}] for p in TEXT]
    assert chat["completions"] == [[{"role": "assistant", "content": text}] for text in TEXTS]
    assert chat["prompts"][0] + chat["completions"][0]  # lists, as a chat template needs
    assert text["prompts"] == ["1 + 1?", "1 + 2?"] and text["completions"] == TEXTS
    assert chat["completion_ids"] == text["completion_ids"] == [[5] * 9, [5] * 12]
    assert chat["hint"] == ["two", "three"]
    assert {"trainer_state", "log_extra", "log_metric"} <= chat.keys()
    chat["prompts"][0][0]["content"] = "changed"
    assert CHAT[0].prompt[0] == {"role": "user", "content": "1 + 1?"}


TRL_REWARDS = """
    from trl.rewards import *
    from trl.rewards import (
        accuracy_reward, get_cosine_scaled_reward, get_repetition_penalty_reward,
        get_soft_overlong_punishment, reasoning_accuracy_reward, think_format_reward,
    )
    overlong = get_soft_overlong_punishment(max_completion_len=12, soft_punish_cache=4)
    repetition = get_repetition_penalty_reward(ngram_size=2)
    cosine = get_cosine_scaled_reward(max_len=12)
"""
# The values for TEXTS, which have 9 and 12 tokens, by the formulas in TRL's docstrings.
TRL_VALUES = {
    "accuracy_reward": [1.0, 0.0],
    "reasoning_accuracy_reward": [1.0, 0.0],
    "think_format_reward": [1.0, 0.0],
    "overlong": [-0.25, -1.0],
    "repetition": [-(1 - 1 / 8), -(1 - 1 / 11)],
    "cosine": [0.5 + 0.25 * (1 + math.cos(0.75 * math.pi)), -0.5],
}


@pytest.mark.parametrize("problems", [TEXT, CHAT], ids=["text", "chat"])
@pytest.mark.parametrize("name", TRL_VALUES)
def test_trls_own_rewards_run_unchanged(tmp_path, name, problems):
    pytest.importorskip("trl")
    functions = load(tmp_path, TRL_REWARDS, name)
    assert rewarded(functions, problems) == pytest.approx(TRL_VALUES[name])


@pytest.mark.parametrize("problems", [TEXT, CHAT], ids=["text", "chat"])
def test_several_of_trls_rewards_are_summed_with_weights(tmp_path, problems):
    pytest.importorskip("trl")
    names = ("accuracy_reward", "think_format_reward", "overlong")
    functions = load(tmp_path, TRL_REWARDS, *names)
    assert [f.name for f in functions] == [*names[:2], "soft_overlong_punishment_reward"]
    rewards = rewarded(functions, problems, weights=(1.0, 0.5, 2.0))
    assert rewards == [1.0 + 0.5 - 0.5, -2.0]
    assert rewards.log.by_function["accuracy_reward"] == [1.0, 0.0]
    assert rewards.log.columns["solution"] == ["\\boxed{2}", "\\boxed{3}"]


@pytest.mark.parametrize(
    "annotation",
    ["list[list[dict[str, str]]]", "List[List[Dict]]", "Sequence[Sequence[dict]]", "'list[list]'"],
)
def test_an_annotation_of_messages_gives_messages_for_text_data_too(tmp_path, annotation):
    source = f"""
    from collections.abc import Sequence
    from typing import Dict, List
    def f(prompts, completions: {annotation}):
        assert prompts[0][0]["role"] == "user"
        return [len(c[0]["content"]) for c in completions]
    """
    assert rewarded(load(tmp_path, source, "f")) == [len(text) for text in TEXTS]


@pytest.mark.parametrize(
    "annotation",
    ["list[str]", "list", "list[str] | list[list[dict]]", "list[list[dict]] | list[str]"],
)
def test_other_annotations_give_the_form_of_the_data(tmp_path, annotation):
    source = f"""
    def f(completions: {annotation}, **kwargs):
        return [len(c) for c in completions]
    """
    assert rewarded(load(tmp_path, source, "f")) == [len(text) for text in TEXTS]
    assert rewarded(load(tmp_path, source, "f"), CHAT) == [1, 1]


def test_a_function_gets_only_what_it_takes():
    def by_hint(completions, hint):
        return [len(h) for h in hint]

    def with_default(completions, level=7):
        return [level for _ in completions]

    assert rewarded(by_hint) == [3, 5]
    assert rewarded(with_default) == [7, 7]  # the data have no level


class Length:
    """A callable object."""

    def __call__(self, completion_ids, scale=1.0, **kwargs):
        return [scale * len(ids) for ids in completion_ids]


class AsyncLength:
    async def __call__(self, completion_ids, **kwargs):
        await asyncio.sleep(0)
        return [len(ids) for ids in completion_ids]


def scaled(completion_ids, level, **kwargs):
    return [level * len(ids) for ids in completion_ids]


def hinted(completion_ids, hint, **kwargs):
    return [hint * len(ids) for ids in completion_ids]


async def awaited(completion_ids, **kwargs):
    await asyncio.sleep(0)
    return [float(len(ids)) for ids in completion_ids]


FORMS: dict[str, tuple[Callable, list[float], str]] = {
    "a callable object": (Length(), [9, 12], "Length"),
    "a partial": (functools.partial(Length(), scale=2.0), [18, 24], "Length"),
    "a partial of what would be a column": (functools.partial(scaled, level=3), [27, 36], "scaled"),
    "a partial of a column": (functools.partial(hinted, hint=3), [27, 36], "hinted"),
    "a bound method": (Length().__call__, [9, 12], "__call__"),
    "a coroutine function": (awaited, [9, 12], "awaited"),
    "a partial of one": (functools.partial(awaited), [9, 12], "awaited"),
    "an object with an async __call__": (AsyncLength(), [9, 12], "AsyncLength"),
    "a lambda of a coroutine": (lambda **given: awaited(**given), [9, 12], "<lambda>"),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_callable_is_a_reward_function(form):
    fn, expected, name = FORMS[form]
    assert rewarded(fn) == expected
    assert name_of(fn) == name


def test_coroutines_run_concurrently_in_one_loop_for_all_steps(tmp_path):
    source = """
    import asyncio
    arrived = asyncio.Event()
    loops = set()
    async def first(completions, **kwargs):
        loops.add(asyncio.get_running_loop())
        await asyncio.wait_for(arrived.wait(), 20)
        return [1.0 for _ in completions]
    async def second(completions, **kwargs):
        loops.add(asyncio.get_running_loop())
        arrived.set()
        return [len(loops) for _ in completions]
    """
    functions = load(tmp_path, source, "first", "second")
    assert rewarded(functions) == rewarded(functions) == [2.0, 2.0]


def test_coroutine_functions_work_inside_a_running_event_loop():
    async def notebook() -> Rewards:
        return rewarded(awaited)

    assert asyncio.run(notebook()) == [9, 12]


# Results of a function


NO_VALUE = [None, math.nan, np.nan, torch.tensor(math.nan)]


@pytest.mark.parametrize("nothing", NO_VALUE, ids=str)
def test_none_is_left_out_of_a_sum_and_a_sum_of_none_is_none(nothing):
    one = RewardFunction("one", lambda **_: [1.0, nothing])
    two = RewardFunction("two", lambda **_: [nothing, nothing])
    four = RewardFunction("four", lambda **_: [4.0, 4.0])
    assert rewarded([one, two, four], weights=(1.0, 10.0, 0.5)) == [3.0, 2.0]
    rewards = rewarded([one, two])
    assert rewards == [1.0, None]
    assert rewards.log.by_function == {"one": [1.0, None], "two": [None, None]}


@pytest.mark.parametrize(
    "returned",
    [
        (1, 2),
        [True, 2],
        np.array([1, 2], dtype=np.float16),
        np.array([1, 2]),
        [np.float32(1), np.int64(2)],
        torch.tensor([1.0, 2.0], requires_grad=True),
        torch.tensor([1, 2], dtype=torch.bfloat16),
        [torch.tensor(1.0), torch.tensor(2)],
        iter([1, 2]),
        map(float, (1, 2)),
    ],
    ids=lambda value: f"{type(value).__name__}",
)
def test_numbers_of_any_kind_are_rewards(returned):
    rewards = rewarded(lambda **_: returned)
    assert rewards == [1.0, 2.0]
    assert all(type(reward) is float for reward in rewards)


BAD = {
    "None": (None, "returned None: return a list of 2"),
    "a number": (1.0, "returned a float: return a list of 2"),
    "text": ("ab", "returned a str: return a list of 2"),
    "a dict": ({0: 1.0, 1: 2.0}, "returned a dict: return a list of 2"),
    "too few": ([1.0], "returned a list of 1: return a list of 2"),
    "too many": (torch.zeros(3), r"returned a Tensor of shape \(3,\): return a list of 2"),
    "no dimension": (torch.tensor(1.0), r"returned a Tensor of shape \(\): return a list of 2"),
    "a column": (np.zeros((2, 1)), r"returned \[0\.0\] at index 0: return a finite number"),
    "text inside": ([1.0, "1"], "returned '1' at index 1: return a finite number"),
    "infinity": ([math.inf, 0], "returned inf at index 0: return a finite number"),
    "beyond fp32": (
        [1e39, 0],
        r"returned 1e\+39 at index 0: return a finite number, at most",
    ),
    "beyond fp64": ([10**400, 0], r"returned 10+\.\.\.0+ at index 0: return a finite number"),
    "complex": ([1j, 0], "returned 1j at index 0: return a finite number"),
}


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
@pytest.mark.parametrize("case", BAD)
def test_a_result_that_is_no_list_of_numbers_is_refused_with_the_functions_name(case, is_async):
    returned, says = BAD[case]

    def mine(**given):
        return returned

    async def mine_async(**given):
        return returned

    with pytest.raises(ValueError, match=rf"^reward function mine\w* {says}"):
        rewarded(mine_async if is_async else mine)


def test_a_weighted_sum_beyond_fp32_is_refused():
    with pytest.raises(ValueError, match=r"the weighted sum of the rewards \[2\.0\] is 4e\+38"):
        rewarded(lambda **_: [2.0, 1.0], weights=(2e38,))


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_an_exception_keeps_its_traceback_and_names_the_function(is_async):
    def mine(**given):
        return given["completions"]["oops"]

    async def mine_async(**given):
        return mine(**given)

    fn = mine_async if is_async else mine
    with pytest.raises(RewardError, match=r"reward function mine\w* raised TypeError: list") as e:
        rewarded(fn)
    assert isinstance(e.value.__cause__, TypeError)


# Logs of a function


def test_a_function_logs_columns_and_metrics():
    def mine(completions, log_extra, log_metric, trainer_state):
        log_extra("length", [len(c) for c in completions])
        log_extra(column="vector", values=torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        log_extra("object", [{1}, None])
        log_metric("share", 0.25)
        log_metric(name="share", value=torch.tensor(0.75))
        log_metric("nothing", math.nan)
        return [trainer_state.global_step / trainer_state.max_steps for _ in completions]

    rewards = rewarded(mine, state=TrainerState(global_step=1, max_steps=4))
    assert rewards == [0.25, 0.25]
    assert rewards.log.columns == {
        "length": [len(text) for text in TEXTS],
        "vector": [[1.0, 2.0], [3.0, 4.0]],
        "object": ["{1}", None],
    }
    assert rewards.log.metrics == {"share": [0.25, 0.75]}


@pytest.mark.parametrize(
    ("log", "says"),
    [
        (lambda given: given["log_extra"]("x", [1]), "log_extra got 1 values for the column 'x'"),
        (lambda given: given["log_metric"]("x", "a"), "log_metric got 'a' for the metric 'x'"),
    ],
)
def test_an_invalid_log_is_refused_with_the_functions_name(log, says):
    def mine(**given):
        log(given)
        return [0.0, 0.0]

    with pytest.raises(RewardError, match=f"reward function mine raised ValueError: {says}"):
        rewarded(mine)


# Places of functions


SEVERAL = """
    import functools
    def length(completions): return [len(c) for c in completions]
    short = lambda completions, **kwargs: [-len(c) for c in completions]
    half = functools.partial(length)
    class Rewards:
        @staticmethod
        def zero(completions): return [0 for _ in completions]
        def __call__(self, completions): return [1 for _ in completions]
    calls = []
    def first(completions):
        calls.append(1)
        return [len(calls) for _ in completions]
    def second(completions): return [len(calls) for _ in completions]
"""


def test_functions_are_found_in_files_and_modules_by_dot_or_colon(tmp_path, monkeypatch):
    (tmp_path / "several.py").write_text(textwrap.dedent(SEVERAL))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    lengths = [len(text) for text in TEXTS]
    for place in ("several.length", "several:length", "several.py:length"):
        assert rewarded(load_rewards([place])) == lengths
    for place in ("several:Rewards.zero", f"{tmp_path}/several.py:Rewards.zero"):
        assert rewarded(load_rewards([place])) == [0, 0]


def test_functions_of_one_file_share_its_module_and_get_unique_names(tmp_path):
    functions = load(tmp_path, SEVERAL, "first", "second", "short", "length", "half")
    assert [f.name for f in functions] == ["first", "second", "short", "length", "length_2"]
    assert rewarded(functions[:2]) == [2, 2]


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("mine.py:Rewards", "Rewards is a class: make an instance"),
        ("mine.py:absent", r"mine\.py has no function 'absent'"),
        ("mine.py:calls", r"mine\.py has no function 'calls'"),
        ("mine.py:", "write it as package.module.function or path/to/file.py:function"),
    ],
)
def test_a_place_without_a_function_is_refused(tmp_path, monkeypatch, place, says):
    (tmp_path / "mine.py").write_text(textwrap.dedent(SEVERAL))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says):
        load_rewards([place])


# Functions in a run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model, data of both forms and reward functions."""
    root = tmp_path_factory.mktemp("functions")
    save_model(tiny_model(), tiny_tokenizer(), root / "model")
    for name in ("text", "chat"):
        rows = []
        for n in range(6):
            question = f"{n} + 1?"
            prompt = question if name == "text" else [{"role": "user", "content": question}]
            rows.append({"prompt": prompt, "answer": str(n + 1), "solution": f"\\boxed{{{n + 1}}}"})
        write_rows(root / f"{name}.jsonl", rows)
    (root / "rewards.py").write_text(
        textwrap.dedent(TRL_REWARDS)
        + textwrap.dedent("""
        def odd(completion_ids, log_metric, log_extra, trainer_state, **kwargs):
            log_metric("odd/step", trainer_state.global_step + trainer_state.epoch)
            log_extra("n", [len(ids) for ids in completion_ids])
            return [float(sum(ids) % 2) for ids in completion_ids]
        async def never(completions, **kwargs):
            return [None for _ in completions]
        def takes_over(completions, log_metric, log_extra):
            log_metric("loss", 1.0)
            return [0.0 for _ in completions]
        def takes_over_dpo(completions, log_metric):
            log_metric("rewards/margins", 1.0)
            return [float(i % 2) for i, _ in enumerate(completions)]
        def takes_over_pairs(completions, log_metric):
            log_metric("pairs/tokens", 1.0)
            return [float(i % 2) for i, _ in enumerate(completions)]
        def steps(completions, log_metric):
            log_metric("steps of the proof", 2.0)
            return [0.0 for _ in completions]
        def takes_a_column(completions, log_extra):
            log_extra("advantage", [0 for _ in completions])
            return [0.0 for _ in completions]
        def needs(completions, difficulty):
            return [0.0 for _ in completions]
        """)
    )
    return root


def run(folder: Path, to: Path, data: str, rewards: str, *more: str) -> list[dict[str, Any]]:
    places = [f"{folder}/rewards.py:{name}" for name in rewards.split()]
    given = f"--model {folder}/model --train-data {folder}/{data}.jsonl --shots 0 --method grpo "
    given += "--eval-every 0 --checkpoint-every 0 --steps 2 --prompts-per-step 3 --dtype float32 "
    given += f"--num-generations 4 --max-completion-length 8 --output-dir {to}"
    train.main([*given.split(), "--reward", *places, *more])
    return metrics_of(to)


@pytest.mark.parametrize("data", ["text", "chat"])
def test_a_run_logs_each_function_as_trl_does(folder: Path, tmp_path: Path, data: str):
    pytest.importorskip("trl")
    names = "accuracy_reward think_format_reward overlong odd never"
    weights = ("--reward-weights", "1", "0.5", "2", "3", "1")
    rows = run(folder, tmp_path / "run", data, names, *weights)
    for step, row in enumerate(rows):
        attempts = rows_in(tmp_path / f"run/completions/step-{step + 1}.jsonl")
        odd = np.array([attempt["rewards"]["odd"] for attempt in attempts])
        overlong = [attempt["rewards"]["soft_overlong_punishment_reward"] for attempt in attempts]
        assert row["rewards/odd/mean"] == pytest.approx(odd.mean())
        assert row["rewards/odd/std"] == pytest.approx(odd.std(ddof=1))
        assert row["rewards/accuracy_reward/mean"] == row["rewards/think_format_reward/std"] == 0
        assert row["rewards/never/mean"] is row["rewards/never/std"] is None
        sums = 3 * odd + 2 * np.array(overlong)
        assert [attempt["reward"] for attempt in attempts] == pytest.approx(sums)
        assert row["reward"] == pytest.approx(sums.mean())
        assert row["odd/step"] == 1.5 * step  # 3 of 6 problems a step
        assert all(attempt["n"] > 0 and "gold_parsed" in attempt for attempt in attempts)


@pytest.mark.parametrize(
    ("names", "error", "says"),
    [
        ("needs", ValueError, r"needs needs the argument 'difficulty', which is neither a"),
        ("takes_a_column", RewardError, "log_extra: 'advantage' is a column of the trainer's"),
        ("takes_over", RewardError, "log_metric: 'loss' is a metric of the trainer's"),
        ("get_cosine_scaled_reward", ValueError, "needs the argument 'max_len'"),
    ],
)
def test_functions_that_do_not_fit_a_run_are_refused(folder, tmp_path, names, error, says):
    with pytest.raises(error) as e:
        run(folder, tmp_path / "run", "text", names)
    assert re.search(says, f"{e.value} {e.value.__cause__}")


@pytest.mark.parametrize(
    ("name", "metric"),
    [("takes_over_dpo", "rewards/margins"), ("takes_over_pairs", "pairs/tokens")],
)
def test_a_metric_of_preference_training_is_not_overwritten(folder, tmp_path, name, metric):
    expert_dpo = ("--method", "expert-dpo")
    with pytest.raises(RewardError) as e:
        run(folder, tmp_path / "run", "text", name, *expert_dpo)
    assert f"log_metric: '{metric}' is a metric of the trainer's" in str(e.value)


@pytest.mark.parametrize(
    "name", ["step", "alarms", "alarm/collapse", "idle", "inexact", "learning_rate", "exp/mine"]
)
def test_each_metric_of_the_loop_is_refused_when_it_is_logged(name: str):
    def mine(completions, log_metric):
        log_metric(name, 1.0)

    with pytest.raises(RewardError, match=f"mine raised ValueError: log_metric: '{name}' is a"):
        rewarded(mine)


def test_the_columns_of_the_trainer_are_those_that_it_writes(folder: Path, tmp_path: Path):
    run(folder, tmp_path, "text", "odd never")
    lines = (tmp_path / "completions/step-1.jsonl").read_text().splitlines()
    written = {name for line in lines for name in json.loads(line)}
    # only the built-in reward has verdicts, and only `odd` logs n
    assert written == {*TRAINERS_COLUMNS, "n"} - {"verdict"}


def test_a_metric_may_begin_with_the_name_of_another(folder: Path, tmp_path: Path):
    rows = run(folder, tmp_path / "run", "text", "steps")
    assert rows[0]["steps of the proof"] == 2


@pytest.mark.parametrize("name", ["log_metric", "trainer_state", "prompts"])
def test_a_column_with_the_name_of_an_argument_is_refused(name: str, folder: Path, tmp_path: Path):
    row = {"question": "1?", "answer": "1", name: 1}
    (tmp_path / "reserved.jsonl").write_text(json.dumps(row) + "\n")
    given = ("--train-data", f"{tmp_path}/reserved.jsonl", "--prompts-per-step", "1")
    with pytest.raises(ValueError, match=f"has a column '{name}', but the trainer passes"):
        run(folder, tmp_path / "run", "text", "odd", *given)


def test_one_function_may_be_a_string_in_toml_and_several_a_list(folder: Path, tmp_path: Path):
    places = [f"{folder}/rewards.py:odd", f"{folder}/rewards.py:never"]
    for written, expected in ((places[0], tuple(places[:1])), (places, tuple(places))):
        (tmp_path / "one.toml").write_text(f"reward = {json.dumps(written)}\n")
        config = train.parse(Train, ["--config", str(tmp_path / "one.toml")])
        assert config.reward_functions == expected
        (tmp_path / "again.toml").write_text(train.dump_toml(config))
        assert train.parse(Train, ["--config", str(tmp_path / "again.toml")]) == config


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"reward_weights": (1.0,)}, r"reward_weights=\(1\.0,\): need one for each function"),
        ({"reward": ("a.f", "b.g"), "reward_weights": (1.0,)}, "need one for each function of"),
        ({"reward": "a.f", "reward_weights": (math.nan,)}, "need finite numbers"),
        ({"reward": ()}, r"reward=\(\): need one or more functions"),
        ({"reward": ("a.f", "")}, "need one or more functions"),
        ({"method": "sft", "reward_weights": (1.0,)}, "reward_weights"),
    ],
)
def test_invalid_functions_and_weights_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Train(**options)


def test_without_functions_the_reward_is_the_boxed_answer():
    reward = train.build_reward(Train(), TrainingData([], (), []), (), TrainerState())
    assert reward(TEXT, TEXTS, DONE) == [1.0, 0.0]
