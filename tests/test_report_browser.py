"""The report's interaction in a headless Chromium: hover values, filters, search and files.

The program is $CHROMIUM, or the first of the usual names on the path. Without one, the tests are
skipped.
"""

import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import Browser, find_browser
from expo_fast import report
from test_report import HOSTILE, evaluation, write_lines, write_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_browser() is None, reason="no Chromium: install it, or name it in CHROMIUM"
    ),
]

LIMIT = 5_000_000  # bytes of a report


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a report on two configurations, one of which has two seeds."""
    root = tmp_path_factory.mktemp("report")
    runs = []
    for method, seed in (("expo-grpo", 0), ("expo-grpo", 1), ("grpo", 0)):
        rows = []
        for step in range(1, 4):
            row = {"reward": 0.1 * step + 0.2 * seed, "time/generate": 2.0, "own/nll": 0.5}
            if method == "expo-grpo":
                row |= {"exp/nll": 0.25, "expert/nll": 0.75, "exp/lift": 1.5}
                row |= {"exp/leak_rate": 0.5, "own/leak_rate": 0.25}
            rows.append(row)
        ends = [evaluation(0, 0.1), evaluation(3, 0.2)]
        folder = root / f"{method}-{seed}"
        run = write_run(folder, rows=rows, evaluations=ends, method=method, seed=seed, steps=3)
        for step in range(1, 4):
            texts = [text_row(i, f"attempt {i} of {method} at {step}") for i in range(10)]
            texts[9]["completion"] = HOSTILE
            texts[8] |= {"kind": "explanation", "reward": None, "completion": "=1+1, Needle"}
            write_lines(Path(run) / "completions" / f"step-{step}.jsonl", texts)
        runs.append(run)
    one_step = write_run(root / "one", rows=[{"reward": 0.5}], method="star", steps=1)
    report.main([*runs, one_step, "--output", str(root / "report.html")])
    return root / "report.html"


def text_row(i: int, text: str) -> dict[str, Any]:
    row = {"id": i, "prompt": f"What is {i} + 1?", "answer": i + 1, "level": 1 + i % 3}
    return row | {"kind": "own", "completion": text, "reward": i / 10, "finish_reason": "stop"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    assert program is not None
    with Browser(program, tmp_path_factory.mktemp("downloads")) as browser:
        yield browser


def saved(browser: Browser, name: str) -> str:
    """Return the text of a file that the page has saved."""
    path = browser.downloads / name
    end = time.monotonic() + 30
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    return path.read_bytes().decode()


def choose(browser: Browser, name: str, value: str) -> None:
    """Set a filter: an entry of a list by its text, or the value of a field."""
    browser.run(f"""(() => {{
        const control = document.querySelector(`.filters [name="{name}"]`);
        const option = [...(control.options ?? [])].find((x) => x.text === {json.dumps(value)});
        control.value = option ? option.value : {json.dumps(value)};
        control.dispatchEvent(new Event("input", {{ bubbles: true }}));
    }})()""")


def count(browser: Browser) -> str:
    return browser.run("document.querySelector('.count').textContent").split(" completions")[0]


@pytest.mark.parametrize("width, dark", [(1280, False), (1280, True), (390, False)])
def test_the_page_is_drawn_without_errors_and_loads_no_other_file(browser, page, width, dark):
    browser.errors.clear()
    browser.requests.clear()
    browser.open(page, width=width, dark=dark)
    assert browser.errors == []
    assert browser.requests == [page.resolve().as_uri()]
    assert page.stat().st_size < LIMIT
    n_charts = browser.run("document.querySelectorAll('figure[data-chart]').length")
    assert browser.run("document.querySelectorAll('.plot svg').length") == n_charts == 6
    assert browser.run("document.documentElement.scrollWidth") <= width
    too_wide = (
        "[...document.querySelectorAll('.plot svg')].filter((x) => x.clientWidth > {}).length"
    )
    assert browser.run(too_wide.format(width)) == 0
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(22, 22, 22)" if dark else "rgb(255, 255, 255)")


def test_no_text_of_a_chart_overlaps_another_one_or_is_cut(browser, page):
    for width in (1280, 390):
        browser.open(page, width=width)
        overlapping = browser.run("""(() => {
            const found = [];
            for (const svg of document.querySelectorAll(".plot svg")) {
                const end = svg.getBoundingClientRect().right;
                const texts = [...svg.querySelectorAll("text")]
                    .filter((x) => x.textContent.trim() && x.getAttribute("opacity") !== "0")
                    .map((x) => [x.textContent, x.getBoundingClientRect()]);
                texts.forEach(([a, r]) => { if (r.right > end + 1) found.push([a, "the edge"]); });
                texts.forEach(([a, r], i) => texts.slice(i + 1).forEach(([b, s]) => {
                    const wide = Math.min(r.right, s.right) - Math.max(r.left, s.left);
                    const high = Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top);
                    if (wide > 1 && high > 3) found.push([a, b]);
                }));
            }
            return found;
        })()""")
        assert overlapping == []


def test_pointing_at_a_curve_shows_the_values_of_its_point(browser, page):
    browser.open(page)
    place = browser.run("""(() => {
        const figure = document.querySelector('figure[aria-label="Reward"]');
        figure.scrollIntoView({ block: "center" });
        const points = [...figure.querySelectorAll(".mark-symbol.role-mark path")];
        const box = points[1].getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2];
    })()""")
    browser.point_at(*place)
    browser.wait_for("!document.querySelector('#tooltip').hidden")
    shown = browser.run("document.querySelector('#tooltip').innerText")
    cells = dict(line.split("\t") for line in shown.splitlines())
    assert cells["configuration"] == "1. expo-grpo"
    assert (cells["step"], cells["mean"]) == ("2", "0.3")
    assert (cells["low"], cells["high"]) == ("0.2", "0.4")  # of both seeds


def test_a_click_on_the_legend_dims_the_other_curves(browser, page):
    browser.open(page)
    lines = """[...document.querySelectorAll('figure[aria-label="Reward"] .mark-line path')]
        .map((x) => x.getAttribute("opacity"))"""
    assert {opacity or "1" for opacity in browser.run(lines)} == {"1"}
    place = browser.run("""(() => {
        const figure = document.querySelector('figure[aria-label="Reward"]');
        figure.scrollIntoView({ block: "center" });
        const labels = [...figure.querySelectorAll(".role-legend-label text")];
        const box = labels.find((x) => x.textContent === "2. grpo").getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2];
    })()""")
    browser.click(*place)
    browser.wait_for(f"new Set({lines}).size > 1")
    assert sorted(browser.run(lines)) == ["0.12", "0.12", "1"]


def test_completions_are_filtered_and_searched(browser, page):
    browser.open(page)
    assert count(browser) == "90 of 90"
    assert browser.run("document.querySelectorAll('.sample').length") == 20
    browser.run("document.querySelector('#completions > button').click()")
    assert browser.run("document.querySelectorAll('.sample').length") == 40
    choose(browser, "method", "grpo")
    assert count(browser) == "30 of 90"
    choose(browser, "step", "2")
    assert count(browser) == "10 of 90"
    choose(browser, "level", "2")
    assert count(browser) == "3 of 90"
    choose(browser, "reward-from", "0.4")
    assert count(browser) == "2 of 90"  # 0.4 and 0.7, not 0.1
    choose(browser, "reward-to", "0.5")
    assert count(browser) == "1 of 90"
    shown = browser.run("document.querySelector('.sample').innerText")
    assert "attempt 4 of grpo at 2" in shown
    assert "reward 0.4" in shown
    for name in ("method", "step", "level"):
        choose(browser, name, "all")
    choose(browser, "reward-from", "")
    choose(browser, "reward-to", "")
    choose(browser, "text", "NEEDLE")
    assert count(browser) == "9 of 90"
    assert browser.run("document.querySelector('.sample mark').textContent") == "Needle"
    choose(browser, "text", "nowhere")
    assert count(browser) == "0 of 90"
    choose(browser, "text", "alert(")
    assert count(browser) == "9 of 90"
    assert "<script>alert" in browser.run("document.querySelector('.sample').innerText")


def test_figures_and_data_are_saved_as_files(browser, page):
    browser.open(page, dark=True)
    for label in ("SVG", "CSV"):
        browser.run(f"""[...document.querySelectorAll('figure[aria-label="Reward"] button')]
            .find((x) => x.textContent === "{label}").click()""")
    svg = saved(browser, "reward.svg")
    assert svg.startswith("<svg ")
    assert "currentColor" not in svg
    assert ">2. grpo</text>" in svg
    rows = list(csv.reader(saved(browser, "reward.csv").splitlines()))
    assert rows[0] == ["configuration", "metric", "step", "mean", "low", "high"]
    assert rows[2] == ["1. expo-grpo", "reward", "2", "0.3", "0.2", "0.4"]
    choose(browser, "text", "needle")
    browser.run("document.querySelector('.filters button').click()")
    table = list(csv.DictReader(saved(browser, "completions.csv").splitlines()))
    assert len(table) == 9
    assert table[0]["completion"] == "'=1+1, Needle"  # not a formula of a spreadsheet
    assert (table[0]["prompt"], table[0]["level"], table[0]["reward"]) == (
        "What is 8 + 1?",
        "3",
        "",
    )


def test_ticks_of_a_run_of_one_step_are_integers(browser, page, tmp_path):
    run = write_run(tmp_path / "run", rows=[{"reward": 0.5}], steps=1)
    report.main([run, "--output", str(tmp_path / "one.html")])
    browser.open(tmp_path / "one.html")
    labels = browser.run("""(() => {
        const figure = document.querySelector('figure[aria-label="Reward"]');
        const labels = [...figure.querySelectorAll(".role-axis-label text")];
        const bottom = Math.max(...labels.map((x) => x.getBoundingClientRect().bottom));
        const under = labels.filter((x) => x.getBoundingClientRect().bottom > bottom - 2);
        return under.map((x) => x.textContent);
    })()""")
    assert labels == ["1"]
