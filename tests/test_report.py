"""The report shows the data of the records, and escapes text of models."""

import base64
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from expo_fast import report, train
from expo_fast.cli import exit_status
from expo_fast.cli.flags import dump_toml
from expo_fast.config import Train
from expo_fast.reporting import page as report_page
from expo_fast.reporting import samples
from expo_fast.reporting.drawing import COLORS, charts, draw, step_ticks
from expo_fast.reporting.markup import resource
from expo_fast.reporting.panels import (
    GRADIENT_NORM,
    LEARNING,
    PROPERTIES,
    Curve,
    Panel,
    PlottedPanel,
    curves,
    plotted,
    split_crowded,
)
from expo_fast.reporting.runs import Run, group_runs, load_run
from expo_fast.weights import save_model
from jobs import write_rows
from tiny import tiny_model, tiny_tokenizer

HOSTILE = "<script>alert('$x^{$')</script> & \x1b[2J \u202e \ud800 \u2028 &lt;b&gt;"


def write_run(path: Path, *, rows: Any = None, evaluations: Any = (), **config: Any) -> str:
    """Write a run directory and return it; `rows` are steps 1, 2, ... unless they name a step."""
    path.mkdir(parents=True, exist_ok=True)
    known = {k: v for k, v in config.items() if k in Train.__dataclass_fields__}
    text = dump_toml(Train(**known))
    text += "".join(f"{k} = {json.dumps(v)}\n" for k, v in config.items() if k not in known)
    (path / "config.toml").write_text(text)
    rows = [{"reward": 0.5}] if rows is None else rows
    numbered = [{"step": i, **row} for i, row in enumerate(rows, 1)]
    write_lines(path / "metrics.jsonl", numbered)
    write_lines(path / "evaluations.jsonl", evaluations)
    return str(path)


def write_lines(path: Path, rows: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    write_rows(path, rows)


def evaluation(step: int, right: float, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "problems": 64,
        "samples": 4,
        "pass@1": right,
        "pass@1/interval": [right - 0.05, right + 0.07],
        "pass@4": right + 0.1,
        "pass@4/interval": None,
        "all_fail": 0.9 - right,
    } | more


TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3"}
TAGS |= {"section", "p", "b", "br"}
TAGS |= {"ul", "li", "div", "table", "thead", "tr", "th", "td", "small", "pre"}
TAGS |= {"figure", "script", "noscript"}


@pytest.fixture(autouse=True)
def short_library(monkeypatch):
    """Replace the library of the charts, which takes seconds to join. test_browser.py uses it."""
    monkeypatch.setattr(report_page, "library", lambda: "/* library */")


class Page(HTMLParser):
    """The text of a page with spaces for tags, its tags, the cells of its tables, and its data."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.rows: list[list[str]] = []
        self.data: dict[str, Any] = {}
        self._in_data = self._in_style = self._in_cell = False
        self.feed(source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self._in_style = tag in ("style", "script")
        self._in_data = tag == "script" and ("id", "data") in attrs
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self._in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._in_style = self._in_data = False
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self._in_data:
            self.data = json.loads(data)
        if self._in_style:
            return
        self.text += f" {data}"
        if self._in_cell:
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())

    @property
    def titles(self) -> list[str]:
        return [chart["title"] for chart in self.data["charts"]]

    def cells(self, first: str) -> list[str]:
        """Return the row whose first cell starts with `first`, without that cell."""
        return next(row[1:] for row in self.rows if row and row[0].startswith(first))


def source_of(tmp_path: Path, *runs: str) -> str:
    report.main([*runs, "--output", str(tmp_path / "report.html")])
    return (tmp_path / "report.html").read_text()


def page_of(tmp_path: Path, *runs: str) -> Page:
    return Page(source_of(tmp_path, *runs))


def test_runs_that_differ_only_in_their_seed_are_one_configuration(tmp_path: Path):
    runs = [
        write_run(
            tmp_path / f"s{seed}",
            rows=[{"num_tokens": 1000, "time/generate": 30.0}, {"num_tokens": 2000 + 100 * seed}],
            evaluations=[evaluation(0, 0.1), evaluation(2, right)],
            seed=seed,
            steps=2,
            output_dir=f"s{seed}",
            diagnose=seed + 1,
        )
        for seed, right in ((3, 0.2), (5, 0.4))
    ]
    page = page_of(tmp_path, *runs)
    cells = page.cells("1. expo-grpo")
    assert page.cells("configuration") == [
        *("seeds", "steps", "pass@1", "pass@4", "all fail", "tokens", "time of steps"),
    ]
    assert cells[0] == "3, 5"
    assert cells[1] == "2"
    assert cells[2] == "0.100 \u2192 0.300 0.100 \u2026 0.100 \u2192 0.200 \u2026 0.400"
    assert cells[4].startswith("80% \u2192 60% ")
    assert cells[5:] == ["2,400", "0:00:30"]
    assert "Runs: 2, configurations: 1." in page.text


def test_a_single_run_shows_its_interval_over_questions(tmp_path: Path):
    run = write_run(tmp_path / "a", evaluations=[evaluation(0, 0.1), evaluation(1, 0.2)], steps=1)
    cells = page_of(tmp_path, run).cells("1. expo-grpo")
    assert cells[2] == "0.100 \u2192 0.200 [0.050, 0.170] \u2192 [0.150, 0.270]"
    assert cells[3] == "0.200 \u2192 0.300"  # its interval is null


def test_only_fields_that_differ_are_shown(tmp_path: Path):
    runs = [
        write_run(tmp_path / "a", steps=1, eval_every=1),
        write_run(tmp_path / "b", steps=1, learning_rate=3e-4),
        write_run(tmp_path / "c", steps=1, method="grpo", of_a_later_version="new"),
        write_run(tmp_path / "d", steps=2),
    ]
    page = page_of(tmp_path, *runs)
    shown = [page.cells(f"{i}. ")[-1] for i in (1, 2, 3, 4)]
    assert shown[0] == "steps 1 learning_rate 5e-05 of_a_later_version unset"
    assert shown[1] == "steps 1 learning_rate 0.0003 of_a_later_version unset"
    assert shown[2] == "steps 1 learning_rate 5e-05 of_a_later_version new"
    assert shown[3] == "steps 2 learning_rate 5e-05 of_a_later_version unset"
    assert page.cells("3. grpo")


def test_an_incomplete_run_shows_its_steps_and_counts_only_where_evaluated(tmp_path: Path):
    complete = write_run(
        tmp_path / "a",
        rows=[{}] * 4,
        evaluations=[evaluation(0, 0.1), evaluation(4, 0.3)],
        steps=4,
    )
    incomplete = write_run(
        tmp_path / "b", rows=[{}] * 3, evaluations=[evaluation(0, 0.5)], steps=4, seed=1
    )
    with open(Path(incomplete) / "metrics.jsonl", "a") as file:
        file.write('null\n[1]\n{"reward": 1}\n{"step": 4, "rew')
    cells = page_of(tmp_path, complete, incomplete).cells("1. expo-grpo")
    assert cells[1] == "3\u20134 of 4"
    assert cells[2] == "0.100 \u2192 0.300 [0.050, 0.170] \u2192 [0.250, 0.370] 1 of 2 runs"
    assert page_of(tmp_path, incomplete).cells("1. ")[2].startswith("0.500 \u2192 \u2013")


def test_an_evaluation_before_the_last_step_is_shown_with_its_step(tmp_path: Path):
    rows = [evaluation(0, 0.1), evaluation(2, 0.2)]
    run = write_run(tmp_path / "a", rows=[{}] * 3, evaluations=rows, steps=9)
    assert page_of(tmp_path, run).cells("1. ")[1] == "3 of 9 evaluated after 2"


def test_the_reasons_of_verdicts_are_shown(tmp_path: Path):
    last = evaluation(1, 0.2, verdicts={"exact": 3, "wrong": 12, "<b>": 1, "timeout": "x"})
    run = write_run(tmp_path / "a", evaluations=[evaluation(0, 0.1), last], steps=1)
    assert "wrong 75.0%, exact 18.8%, <b> 6.2%" in page_of(tmp_path, run).text
    run = write_run(tmp_path / "b", evaluations=[evaluation(0, 0.1, verdicts=[1])], steps=1)
    assert "verdicts on the samples" not in page_of(tmp_path, run).text


def test_accuracy_by_level_is_shown_for_more_than_one_level(tmp_path: Path):
    def at(step: int, *right: float) -> dict[str, Any]:
        levels = [
            {"level": i, "problems": 10 * i, "pass@1": x, "pass@1/interval": [0, 1], "all_fail": 0}
            for i, x in enumerate(right, 1)
        ]
        return evaluation(step, 0.5, levels=levels)

    one = write_run(tmp_path / "one", evaluations=[at(0, 0.1), at(1, 0.2)], steps=1)
    assert "Accuracy by level" not in page_of(tmp_path, one).text
    two = write_run(tmp_path / "two", evaluations=[at(0, 0.1, 0.3), at(1, 0.2, 0.6)], steps=1)
    page = page_of(tmp_path, two)
    assert page.cells("1. expo-grpo, pass@1") == [
        "0.100 \u2192 0.200 [0.000, 1.000] \u2192 [0.000, 1.000]",
        "0.300 \u2192 0.600 [0.000, 1.000] \u2192 [0.000, 1.000]",
    ]
    assert "level 2 20 questions" in page.text


def test_accuracies_of_different_evaluations_get_a_warning(tmp_path: Path):
    def run(name: str, **more: Any) -> str:
        rows = [evaluation(0, 0.1, **more), evaluation(1, 0.2, **more)]
        return write_run(tmp_path / name, evaluations=rows, steps=1, clip_low=0.1 * len(name))

    a, b, c = run("a", grader="x"), run("bb", grader="y", problems=8), run("ccc", grader="x")
    warning = "evaluations differ in problems, grader."
    assert warning in page_of(tmp_path, a, b).text
    assert "Measured differently" not in page_of(tmp_path, a, c).text


PROPERTY_ROWS = [
    {"exp/nll_over_expert": -0.5, "exp/lift": 2.0, "exp/lift_stated": 9.0},
    {"exp/nll_over_expert": -0.5, "exp/lift": -0.5, "exp/lift_stated": 7.0},
    {"exp/nll_over_expert": 0.4, "exp/lift": 0.0, "exp/lift_stated": None},
    {"exp/nll_over_expert": None, "expert/nll": 0.7, "own/nll": 0.2, "exp/lift": None},
]


def test_both_properties_are_reported_with_their_numbers(tmp_path: Path):
    text = page_of(tmp_path, write_run(tmp_path / "a", rows=PROPERTY_ROWS)).text
    assert (
        "In-distribution: holds in 2 of 3 measured steps: the explanation's NLL is below the "
        "expert's. Mean difference -0.2 nats per token."
    ) in text
    assert (
        "Learning signal: fails in 2 of 3 measured steps: the lift is not above 0. "
        "Mean 0.5 nats, lowest -0.5, highest 2; with the answer stated, mean 8."
    ) in text


def test_a_property_without_measurements_is_reported_as_not_measured(tmp_path: Path):
    plain = write_run(tmp_path / "a", rows=[{"own/nll": 0.4}], method="grpo", steps=1)
    text = page_of(tmp_path, plain).text
    assert "In-distribution: not measured." in text
    assert "Learning signal: not measured." in text
    assert "holds" not in text
    old = write_run(tmp_path / "b", rows=[{"exp/lift": 1.0}, {"exp/lift": 3.0}], steps=1)
    assert (
        "Learning signal (the files do not say whether the answer was masked): holds in 2 of 2 "
        "measured steps: the lift is above 0. Mean 2 nats, lowest 1, highest 3."
    ) in page_of(tmp_path, old).text


def test_sections_without_data_are_left_out(tmp_path: Path):
    bare = page_of(tmp_path, write_run(tmp_path / "a", rows=[{"kl": None, "reward": None}]))
    assert bare.data["charts"] == bare.data["completions"] == []
    for title in (
        *("Learning curves", "two properties", "updates the weights", "Preference pairs"),
        *("Time by phase", "Completions", "by level", "norm of 0"),
    ):
        assert title not in bare.text
    pairs = {"rewards/chosen": 0.2, "rewards/rejected": -0.1, "rewards/margins": 0.3}
    pairs |= {"rewards/accuracies": 0.75, "logps/chosen": -9.0, "logps/rejected": -8.0}
    full = page_of(tmp_path, write_run(tmp_path / "b", rows=[pairs, pairs]))
    assert "Preference pairs" in full.text
    assert full.titles == ["Rewards", "Margin", "Pairs ranked correctly", "Log-probability"]
    rewards = full.data["charts"][0]
    assert rewards["columns"] == ["configuration", "metric", "step", "mean", "low", "high"]
    assert rewards["rows"][0] == ["1. expo-grpo", "chosen", 1, 0.2, 0.2, 0.2]
    assert "Learning curves" not in full.text


def test_norms_of_zero_are_counted_because_a_logarithm_cannot_show_them(tmp_path: Path):
    rows = [{"grad_norm/policy": x, "grad_norm/exp_sft": 0.1} for x in (0.0, 0.01, 30.0, 0.0, None)]
    run = write_run(tmp_path / "a", rows=rows)
    groups = group_runs([load_run(run)])
    policy, sft = curves(groups, GRADIENT_NORM)
    assert (policy.steps, sft.steps) == ([2, 3], [1, 2, 3, 4, 5])
    page = page_of(tmp_path, run)
    assert "Steps with a norm of 0, not drawn: 1. expo-grpo: policy 2 of 4." in page.text
    (chart,) = page.data["charts"]
    assert chart["title"] == "Gradient norm of each term"
    assert chart["spec"]["encoding"]["y"]["scale"]["type"] == "log"
    assert chart["spec"]["encoding"]["y"]["scale"]["domain"] == [0.01, 30.0]


def test_seconds_by_phase_are_means_over_steps_with_percentages(tmp_path: Path):
    rows = [{"time/generate": 3.0, "time/forward_backward": 1.0}, {"time/generate": 5.0}]
    page = page_of(tmp_path, write_run(tmp_path / "a", rows=rows))
    assert ["configuration", "generate", "forward backward", "sum"] in page.rows
    assert ["1. expo-grpo", "4 89%", "0.5 11%", "4.5"] in page.rows
    (chart,) = page.data["charts"]
    assert chart["title"] == "Mean time of a step"
    assert chart["rows"] == [
        ["1. expo-grpo", "generate", 4.0],
        ["1. expo-grpo", "forward backward", 0.5],
    ]


def test_curves_are_means_and_ranges_over_runs(tmp_path: Path):
    def run(seed: int, *rewards: float | None, right: float = 0.5, steps: int = 2) -> Run:
        at = [evaluation(0, right), evaluation(steps, right + 0.1)]
        path = write_run(
            tmp_path / str(seed), rows=[{"reward": r} for r in rewards], evaluations=at, seed=seed
        )
        return load_run(path)

    held_out, training, _ = LEARNING
    groups = group_runs([run(0, 0.0, None, 1.0), run(1, 0.5, None, 0.0, right=0.3, steps=3)])
    (reward,) = curves(groups, training)
    assert (reward.metric, reward.steps, reward.middle) == ("reward", [1, 3], [0.25, 0.5])
    assert (reward.low, reward.high) == ([0.0, 0.0], [0.5, 1.0])
    (both,) = curves(groups, held_out)
    assert both.steps == [0, 2, 3]
    assert both.low == pytest.approx([0.3, 0.6, 0.4])  # of one run of two: no interval
    (alone,) = curves(group_runs([run(0, 1.0)]), held_out)
    assert alone.low == pytest.approx([0.45, 0.55])
    assert alone.high == pytest.approx([0.57, 0.67])


def test_a_panel_of_many_curves_is_split_by_configuration_with_a_common_scale(tmp_path: Path):
    nlls = {"exp/nll": 1.0, "own/nll": 2.0}
    low, high = (nlls | {"exp/lift": x, "exp/lift_stated": 2.0} for x in (1.0, 40.0))
    kinds = [[low, high], [low], [nlls], [low], [low]]
    runs = [
        write_run(tmp_path / str(n), rows=rows, learning_rate=n * 1e-6)
        for n, rows in enumerate(kinds, 1)
    ]
    groups = group_runs([load_run(path) for path in runs])
    names = [group.name for group in groups]
    panels = [PlottedPanel(panel, curves(groups, panel)) for panel in PROPERTIES]
    nll, lift = panels
    assert (len(nll.curves), len(lift.curves)) == (10, 8)
    one_metric = PlottedPanel(LEARNING[0], lift.curves)
    shown = split_crowded([one_metric, *panels], names)
    expected = []
    for name in names:
        expected.append((name, nll.panel.title, 2))
        expected.append((name, lift.panel.title, 0 if name == names[2] else 2))
    expected.append(("", LEARNING[0].title, 8))  # of one metric: its curves have different colours
    assert [(x.panel.only, x.panel.title, len(x.curves)) for x in shown] == expected
    drawn = charts(panels, names)
    titles = [chart.title for chart in drawn]
    assert [sum(name in title for title in titles) for name in names] == [2, 2, 1, 2, 2]
    domains = [chart.spec["encoding"]["y"]["scale"]["domain"] for chart in drawn]
    assert domains.count([0.0, 40.0]) == 4  # also on the axes of those whose lift is 1 or 2
    few = plotted(PROPERTIES, groups[:2])
    assert split_crowded(few, names[:2]) == few


def test_text_of_models_and_configs_is_escaped(tmp_path: Path):
    hostile = write_run(tmp_path / "a", rows=PROPERTY_ROWS, steps=1)
    config = Path(hostile) / "config.toml"
    config.write_text(config.read_text().replace('"expo-grpo"', json.dumps(HOSTILE[:35])))
    with open(config, "a") as file:
        file.write(f'"<script>key" = {json.dumps("<img src=x onerror=alert(1)> $^{ ")}\n')
    completions = [
        {"id": 1, "prompt": HOSTILE, "answer": HOSTILE, "kind": kind, "completion": HOSTILE}
        for kind in ("own", "explanation", "</pre><script>", None)
    ]
    write_lines(Path(hostile) / "completions" / "step-1.jsonl", completions)
    other = write_run(tmp_path / "<script>b", rows=PROPERTY_ROWS, learning_rate=1e-3)
    source = source_of(tmp_path, hostile, other)
    page = Page(source)
    assert page.tags <= TAGS
    assert not any(name.startswith("on") or name in ("src", "href") for name in page.attributes)
    escaped = "<script>alert('$x^{$')</script> & \\x1b[2J \\u202e \\ud800   &lt;b&gt;"
    assert {row[6] for row in page.data["completions"]} == {escaped}
    assert page.data["charts"][0]["rows"][0][0] == "1. <script>alert('$x^{$')</script> & \\x1b"
    for forbidden in ("\x1b", "\u202e", "\u2028"):
        assert forbidden not in source
    assert source.count("<script") == 3  # the data, the library and the report's own
    assert "<" not in source.split('id="data">')[1].split("</script>")[0]


def test_the_page_allows_only_its_own_scripts_and_is_reproducible(tmp_path: Path):
    run = write_run(tmp_path / "a", rows=PROPERTY_ROWS, evaluations=[evaluation(0, 0.2)])
    source = source_of(tmp_path, run)
    assert source_of(tmp_path, run) == source
    policy = source.split('Content-Security-Policy" content="')[1].split('"')[0]
    hashes = []
    for script in source.split("<script>")[1:]:
        digest = hashlib.sha256(script.split("</script>")[0].encode()).digest()
        hashes.append(f"'sha256-{base64.b64encode(digest).decode()}'")
    assert policy == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {' '.join(hashes)}"
    )
    for forbidden in ("innerHTML", "eval(", "://", "@import"):
        assert forbidden not in source


def write_completions(run: str, steps: Any, text: str = "c", n: int = 1) -> None:
    for step in steps:
        rows = []
        for i in range(n):
            row = {"id": i, "prompt": f"q{i}?", "answer": i, "level": 2, "kind": "own"}
            row |= {"completion": f"{text} {i} at {step}", "reward": 0.5, "finish_reason": "length"}
            rows.append(row)
        write_lines(Path(run) / "completions" / f"step-{step}.jsonl", rows)


def test_completions_of_all_runs_and_steps_are_data_of_the_page(tmp_path: Path):
    runs = [write_run(tmp_path / str(seed), rows=[{}] * 12, seed=seed) for seed in (3, 4)]
    write_completions(runs[0], (1, 2, 12))
    text = {"prompt": "q0?", "answer": 0, "level": 2, "kind": "expert", "completion": "y" * 5000}
    write_lines(Path(runs[1]) / "completions" / "step-1.jsonl", [text | {"reward": None}, {}])
    (Path(runs[0]) / "completions" / "step-x.jsonl").write_text("")
    data = page_of(tmp_path, *runs).data
    assert data["runs"] == [
        {"name": "1. expo-grpo, seed 3", "method": "expo-grpo", "seed": "3"},
        {"name": "1. expo-grpo, seed 4", "method": "expo-grpo", "seed": "4"},
    ]
    assert data["questions"] == [["q0?", "0", 2.0], ["null", "null", None]]
    first, second, third, fourth, empty = data["completions"]
    assert first == [0, 1, "own", 0.5, "length", 0, "c 0 at 1"]
    assert (second[1], third[1]) == (2, 12)
    assert fourth[:6] == [1, 1, "expert", None, None, 0]
    assert fourth[6].endswith("yyy ... and 3800 more characters")
    assert empty[2:5] == ["null", None, None]
    assert data["kinds"]["expert"] == "expert's solution"


def test_completions_beyond_the_limit_are_left_out_evenly(tmp_path: Path, monkeypatch):
    run = write_run(tmp_path / "a", rows=[{}] * 100)
    write_completions(run, range(1, 101), text="x" * 900, n=2)
    monkeypatch.setattr(samples, "MOST_BYTES", 18000)
    page = page_of(tmp_path, run)
    steps = sorted({row[1] for row in page.data["completions"]})
    assert (steps[0], steps[-1]) == (1, 100)
    assert max(after - before for before, after in itertools.pairwise(steps)) <= 13
    assert 9 <= len(steps) <= 17
    assert f"The completions of {100 - len(steps)} steps are left out" in page.text


def curve(*steps: int, values: Any = None) -> PlottedPanel:
    values = list(values or [0.5] * len(steps))
    panel = Panel("t", "u", {"m": "label"}, zero_line=True)
    return PlottedPanel(panel, [Curve(0, "m", list(steps), values, values, values)])


def test_ticks_of_steps_are_integers_and_a_single_step_is_in_the_middle():
    assert step_ticks(1, 3) == [1, 2, 3]
    assert step_ticks(0, 7) == [0, 2, 4, 6]
    assert step_ticks(1, 16) == [5, 10, 15]
    assert step_ticks(3, 1200) == [200, 400, 600, 800, 1000, 1200]
    assert step_ticks(1, 10**30) == [2 * 10**29, 4 * 10**29, 6 * 10**29, 8 * 10**29, 10**30]
    (chart,) = charts([curve(2)], ["a"])
    x = chart.spec["encoding"]["x"]
    assert (x["axis"]["values"], x["scale"]["domain"]) == ([2], [1, 3])


def test_the_range_of_an_axis_is_never_empty():
    def domain(*values: float) -> list[float]:
        (chart,) = charts([curve(*range(len(values)), values=values)], ["a"])
        return chart.spec["encoding"]["y"]["scale"]["domain"]

    assert domain(0.0, 0.0) == [0.0, 1.0]
    assert domain(-2.0, -2.0) == [-2.0, 0.0]
    assert domain(0.5, 3.0) == [0.0, 3.0]


def test_a_long_curve_keeps_every_kth_point_and_its_last_one():
    (chart,) = charts([curve(*range(1, 14001))], ["a"])
    steps = [row[2] for row in chart.rows]
    assert steps[:3] == [1, 4, 7]
    assert steps[-1] == 14000
    assert len(steps) < 5000


def luminance(color: str) -> float:
    parts = []
    for i in (1, 3, 5):
        x = int(color[i : i + 2], 16) / 255
        parts.append(x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4)
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_colors_have_contrast_with_both_backgrounds():
    """WCAG 2.2 asks for a ratio of 3 for graphics (1.4.11) and of 4.5 for text (1.4.3)."""
    themes = [
        dict(re.findall(r"--(\w+): (#\w+)", x)) for x in resource("report.css").split(":root")
    ]
    light, dark = themes[1:3]
    for theme in (light, dark):
        page = luminance(theme["page"])
        for colors, least in (
            (COLORS, 3),
            ([theme[x] for x in ("text", "quiet", "good", "bad")], 4.5),
        ):
            for color in colors:
                low, high = sorted((page, luminance(color)))
                assert (high + 0.05) / (low + 0.05) >= least, (color, theme["page"])


@pytest.mark.slow
def test_a_file_is_drawn_from_the_same_charts(tmp_path: Path):
    rows = [{"reward": 0.1, "exp/nll": 1.0, "own/nll": 2.0}, {"reward": 0.4}]
    runs = [load_run(write_run(tmp_path / x, rows=rows, steps=len(x))) for x in ("a", "bb")]
    groups = group_runs(runs)
    names = [group.name for group in groups]
    svg = draw(plotted([*LEARNING, *PROPERTIES], groups), names)
    for text in ("Reward", "(a) Negative log-likelihood", *names, "explanation", "own attempt"):
        assert f">{text}</text>" in svg
    assert "currentColor" in svg


def test_an_error_is_printed_in_one_sentence(tmp_path: Path, capsys):
    good = write_run(tmp_path / "good")
    unlogged = write_run(tmp_path / "unlogged", rows=[])
    broken = write_run(tmp_path / "broken")
    (Path(broken) / "config.toml").write_text("steps = ")
    (tmp_path / "no_config").mkdir()
    (tmp_path / "no_config" / "metrics.jsonl").write_text('{"step": 1}\n')
    for given, message in (
        ([], "need the folder of at least one run"),
        ([str(tmp_path / "absent"), good], "absent' is not a folder"),
        (
            [str(tmp_path / "no_config")],
            "no_config' is not the folder of a run: it has no config.toml",
        ),
        ([unlogged], "unlogged' has no logged step"),
        ([broken], "config.toml is not TOML"),
        ([good, good + "/."], "a run is given twice"),
        ([good, "--outptu", "x"], "--outptu"),
        ([good, "--output", str(tmp_path / "none" / "r.html")], "r.html': there is no folder"),
        ([good, "--output", str(tmp_path)], "exists and is not a file: name a file"),
        ([good, "--output", str(tmp_path / ("x" * 300))], "File name too long"),
    ):
        assert exit_status.run(report.main, given) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert message in lines[0]
    assert exit_status.run(report.main, [good, "--output", str(tmp_path / "r.html")]) == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'r.html'}\n"


def test_runs_that_cannot_be_read_are_left_out_with_a_warning(tmp_path: Path):
    good = write_run(tmp_path / "good")
    truncated = write_run(tmp_path / "truncated")
    (Path(truncated) / "config.toml").write_text('method = "gr')
    unlogged = write_run(tmp_path / "unlogged", rows=[])
    (tmp_path / "<b>empty").mkdir()
    given = [truncated, good, str(tmp_path / "<b>empty"), unlogged]
    output = tmp_path / "r.html"
    with pytest.warns(UserWarning, match="^a run is left out: ") as seen:
        assert exit_status.run(report.main, [*given, "--output", str(output)]) == 0
    for name, warning in zip((truncated, "<b>empty", unlogged), seen, strict=True):
        assert name in str(warning.message)
    page = Page(output.read_text())
    assert "Runs: 1, configurations: 1." in page.text
    assert "Left out: " in page.text
    assert "<b>empty' is not the folder of a run: it has no config.toml" in page.text


def test_rows_that_no_run_writes_do_not_stop_the_report(tmp_path: Path):
    """A nested line, which the JSON decoder refuses, a huge step and a time of huge seconds."""
    rows = [{"step": 1, "loss": 1.0, "time/sample": 1e299}, {"step": 10**30, "loss": 2.0}]
    run = write_run(tmp_path / "run", rows=rows)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write("[" * 100_000 + "\n")
    output = tmp_path / "r.html"
    assert exit_status.run(report.main, [run, "--output", str(output)]) == 0
    assert "1e+299 s" in output.read_text()


def test_a_run_of_the_trainer_is_reported(tmp_path: Path):
    save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    for name in ("train", "eval"):
        rows = [
            {"id": f"{name}-{n}", "question": f"{n} + {len(name)}?", "answer": str(n + len(name))}
            | {"solution": f"It is {n + len(name)}.", "level": n % 2 + 1}
            for n in range(4)
        ]
        write_lines(tmp_path / f"{name}.jsonl", rows)
    given = {
        "model": tmp_path / "model",
        "train-data": tmp_path / "train.jsonl",
        "eval-data": tmp_path / "eval.jsonl",
        "output-dir": tmp_path / "run",
        "method": "expert-grpo",
        "steps": 2,
        "prompts-per-step": 2,
        "num-generations": 2,
        "max-completion-length": 6,
        "shots": 0,
        "eval-samples": 2,
        "dtype": "float32",
        "checkpoint-every": 0,
    }
    train.main([word for name, value in given.items() for word in (f"--{name}", str(value))])
    page = page_of(tmp_path, str(tmp_path / "run"))
    cells = page.cells("1. expert-grpo")
    assert cells[:2] == ["0", "2"]
    assert cells[2].startswith("0.000 \u2192 0.000")
    for text in (
        *("Accuracy by level", "level 2 2 questions", "forward backward"),
        *("In-distribution: not measured.", "Learning signal: not measured."),
    ):
        assert text in page.text
    assert {"Held-out pass@1", "Reward", "Loss", "Mean time of a step"} <= {*page.titles}
    assert {row[2] for row in page.data["completions"]} == {"own", "expert"}
    assert {question[2] for question in page.data["questions"]} <= {1.0, 2.0}
