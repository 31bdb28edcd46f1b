"""The table of metrics has every metric that runs log, and no other."""

from pathlib import Path

import pytest

from expo_fast import train
from expo_fast.reporting import metric_table
from expo_fast.reporting.jsonl import read_rows
from expo_fast.reporting.metric_table import EVALUATIONS, STEP_SECTIONS, find_metric, trl_names
from expo_fast.weights import save_model
from jobs import write_rows
from tiny import tiny_model, tiny_tokenizer

NOT_METRICS = {"step", "levels", "template", "grader"}
EVALUATED = "--eval-every 2 --eval-limit 2 --eval-samples 2"
RUNS = {
    "expo-grpo": f"--method expo-grpo --explanations-per-question 3 {EVALUATED}",
    "grpo": "--method grpo --kl-coef 0.1 --reward {root}/rewards.py:odd --alarm-steps 1",
    "expert-grpo": "--method expert-grpo",
    "star": "--method star --explanations-per-question 3",
    "expo-dpo": "--method expo-dpo --explanations-per-question 3 --pairs-every 1",
    "expert-dpo": "--method expert-dpo",
    "dpo": "--method dpo",
    "sft": "--method sft",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, data and a reward function."""
    root = tmp_path_factory.mktemp("metrics")
    save_model(tiny_model(), tiny_tokenizer(), root / "model")
    for name in ("train", "eval"):
        rows = [
            {"question": f"{n} + {len(name)}?", "answer": str(n), "solution": f"It is {n}."}
            | {"chosen": f"It is {n}.", "rejected": "No.", "level": 1 + n % 2}
            for n in range(4)
        ]
        write_rows(root / f"{name}.jsonl", rows)
    (root / "rewards.py").write_text(
        "def odd(completion_ids, **columns):\n    return [len(ids) % 2 for ids in completion_ids]\n"
    )
    return root


def logged(root: Path, name: str) -> tuple[set[str], set[str]]:
    """Train and return the names of the metrics of steps and of evaluations."""
    folder = root / name
    given = f"--model {root}/model --train-data {root}/train.jsonl --eval-data {root}/eval.jsonl "
    given += f"--output-dir {folder} --shots 0 --steps 1 --prompts-per-step 2 "
    given += "--max-completion-length 8 --dtype float32 --checkpoint-every 0 --report-to none "
    if "eval-every" not in RUNS[name]:
        given += "--eval-every 0 "
    if name not in ("dpo", "sft"):
        given += "--num-generations 2 "
    if not (folder / "metrics.jsonl").exists():
        train.main((given + RUNS[name].format(root=root)).split())
    names = []
    for file in ("metrics.jsonl", "evaluations.jsonl"):
        keys = {key for row in read_rows(folder / file) for key in row}
        names.append({key for key in keys - NOT_METRICS if not key.endswith("/interval")})
    return names[0], names[1]


@pytest.mark.parametrize("name", ["expo-grpo", "sft"])
def test_each_logged_metric_is_in_the_table(root: Path, name: str):
    steps, evaluations = logged(root, name)
    assert {key for key in steps if find_metric(key) is None} == set()
    assert {key for key in evaluations if find_metric(key, [EVALUATIONS]) is None} == set()


@pytest.mark.slow
def test_the_table_has_exactly_the_metrics_of_all_methods(root: Path):
    found = set()
    found_in_evaluations = set()
    for name in RUNS:
        steps, evaluations = logged(root, name)
        found |= {find_metric(key) for key in steps}
        found_in_evaluations |= {find_metric(key, [EVALUATIONS]) for key in evaluations}
    metrics = {metric for section in STEP_SECTIONS for metric in section.metrics}
    # test_distributed.py has those of several ranks, and test_resume.py that of inexact runs.
    others = {x for x in metrics if x.name in ("idle", "inexact") or x.name.startswith("rank/")}
    assert found == metrics - others
    found_in_evaluations.add(find_metric("maj@2", [EVALUATIONS]))  # only evaluate has --k
    assert found_in_evaluations == set(EVALUATIONS.metrics)


def test_the_page_of_the_documentation_is_that_of_the_table():
    page = Path(__file__).parent.parent / "docs" / "metrics.md"
    assert page.read_text() == metric_table.page(), "python -m expo_fast.reporting.metric_table"


def test_names_of_trl_replace_the_part_in_capitals():
    assert trl_names("rewards/my_F1/mean") == ["rewards/my_F1/mean"]
    assert trl_names("clip_ratio/high") == ["clip_ratio/high_mean"]
    assert trl_names("reward_std") == trl_names("unknown") == trl_names("exp/lift") == []
    assert find_metric("rewards/margins") != find_metric("rewards/margins/mean")
    assert find_metric("pass@16", [EVALUATIONS]) == find_metric("pass@1", [EVALUATIONS])
