"""The scaling curves of benchmarks/curves.py: points, charts and messages."""

import json
import math
from pathlib import Path

import pytest

from benchmarks import body, curves, decode
from benchmarks.cases import OPS, OURS, Contestant, eager
from benchmarks.curve_charts import (
    SECONDS,
    TOKENS_PER_S,
    Measured,
    Panel,
    Point,
    draw,
    value_ticks,
)
from benchmarks.measure import Ceilings
from benchmarks.samplers import Load
from expo_fast.weights import save_model
from tiny import tiny_model, tiny_tokenizer, tiny_vocabulary

RATES = Ceilings(flops=1e11, bytes=1e10)
SIZES = {"n": (8, 16), "v": (64, 128), "g": (1, 2), "length": (3, 4), "prompts": (1, 2)}


@pytest.fixture
def small(monkeypatch, tmp_path: Path) -> str:
    """Make all sizes tiny. Return the folder of a tiny model."""
    op = OPS[curves.OP]

    def contestants(device: str):
        yield next(op.contestants(device))
        yield "eager", Contestant(lambda case: eager(case.hidden, case.weight, case.targets), 4)

    monkeypatch.setitem(OPS, curves.OP, op._replace(contestants=contestants))
    monkeypatch.setattr(curves, "SIZES", SIZES)
    monkeypatch.setattr(curves, "ROWS", 8)
    monkeypatch.setattr(curves, "LOAD", Load(prompts=2, samples=2, prompt_tokens=5, new_tokens=4))
    monkeypatch.setattr(curves, "ceilings", lambda device: RATES)
    monkeypatch.setattr(body, "fp32_rate", lambda: RATES.flops)
    monkeypatch.setattr(decode, "SEQUENCES", 8)
    folder = tmp_path / "model"
    save_model(tiny_model("llama", num_hidden_layers=1), tiny_tokenizer(), folder)
    return str(folder)


def run(capsys, *arguments: str) -> dict:
    """Run the command and return the object of its last line."""
    curves.main(arguments)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_every_curve_has_the_points_of_all_contestants(small, tmp_path, capsys):
    output = tmp_path / "points.json"
    svg = tmp_path / "curves.svg"
    found = run(
        capsys, "--model", small, "--repeats", "2", "--output", str(output), "--svg", str(svg)
    )
    assert json.loads(output.read_text()) == found
    assert found["left_out"] == []
    assert {"date", "commit", "torch"} <= found["machine"].keys()
    sizes: dict[tuple[str, str, str], list[int]] = {}
    for point in found["points"]:
        line = (point["curve"], point["quantity"], point["contestant"])
        sizes.setdefault(line, []).append(point["size"])
        assert math.isfinite(point["value"])
        assert point["value"] > 0
        # A contestant of the head that is slow beside the GEMMs skips every second round.
        rounds = (1, 2) if point["curve"] in ("n", "v") else (2,)
        assert len(point["seconds"]) in rounds
    expected = {}
    for curve in ("n", "v"):
        expected[curve, SECONDS, OURS] = list(SIZES[curve])
        expected[curve, SECONDS, "eager"] = list(SIZES[curve])
    for curve in ("g", "length", "prompts"):
        expected[curve, TOKENS_PER_S, OURS] = list(SIZES[curve])
        expected[curve, TOKENS_PER_S, curves.STATIC] = list(SIZES[curve])
        expected[curve, SECONDS, OURS] = list(SIZES[curve])
        expected[curve, SECONDS, body.THEIRS] = list(SIZES[curve])
    assert sizes == expected
    text = svg.read_text()
    head = f"V {len(tiny_vocabulary())}, D 48"
    for title in ("Sampling", "rows, N", "transformers, static cache", head):
        assert f">{title}</text>" in text
    assert "prefers-color-scheme: dark" in text


def test_a_load_of_several_curves_is_measured_once(small, capsys):
    found = run(capsys, "--model", small, "--curves", "n", "g", "prompts", "--no-peers")
    assert {p["curve"] for p in found["points"]} == {"n", "g", "prompts"}
    assert {p["contestant"] for p in found["points"]} == {OURS}
    shared = [p for p in found["points"] if p["size"] == 2]
    first = [p["seconds"] for p in shared if p["curve"] == "g"]
    second = [p["seconds"] for p in shared if p["curve"] == "prompts"]
    assert len(first) == 2
    assert first == second


def test_saved_points_are_drawn_without_measuring(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(curves, "measure_curves", None)
    panel = Panel("n", SECONDS, "LM head", "V 8, D 4", "rows")
    points = [Point("n", size, SECONDS, OURS, size / 1e3, [size / 1e3]) for size in (512, 2048)]
    measured = Measured({"date": "today"}, "a model", [panel], points)
    file = tmp_path / "points.json"
    measured.write(file)
    svg = tmp_path / "new.svg"
    found = run(capsys, "--plot", str(file), "--svg", str(svg))
    assert found["points"][1]["size"] == 2048
    assert svg.read_text() == draw(measured)
    assert ">2k</text>" in svg.read_text()


def test_one_size_is_drawn_too():
    panel = Panel("n", SECONDS, "LM head", "V 8, D 4", "rows")
    measured = Measured({}, "a model", [panel], [Point("n", 64, SECONDS, OURS, 0.5, [0.5])])
    assert ">64</text>" in draw(measured)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (60, 550, [100, 200, 500]),
        (0.07, 24, [0.1, 1, 10]),
        (1e-6, 1e-3, [1e-6, 1e-5, 1e-4, 1e-3]),
        (0.6, 0.9, [0.6, 0.9]),
    ],
)
def test_ticks_of_values_are_round_numbers(low: float, high: float, ticks: list[float]):
    assert value_ticks(low, high) == ticks


def test_wrong_input_is_refused_in_one_sentence(tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text('{"results": []}')
    text = tmp_path / "text.json"
    text.write_text("no JSON")
    for arguments, message in (
        (["--curves", "m"], "invalid choice: 'm'"),
        (["--repeats", "0"], "--repeats 0: need at least 1"),
        (["--output", str(tmp_path / "none" / "x.json")], "there is no folder"),
        (["--plot", str(tmp_path / "absent.json")], "No such file"),
        (["--plot", str(other)], "other.json: need a file that --output has written"),
        (["--plot", str(text)], "text.json: need a file that --output has written"),
        (["--model", str(tmp_path)], "config.json"),
    ):
        with pytest.raises(SystemExit):
            curves.main(arguments)
        assert message in capsys.readouterr().err
