"""Draw the README's picture from committed measurements: python -m benchmarks.picture

The ops come from lease/results (an H100), the sampler from the table in RESULTS.md (two CPU cores).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMES = ROOT / "benchmarks/lease/results/h100-2/time"
OUTPUT = ROOT / "docs/assets/peers.svg"
MODEL = "qwen2.5-0.5b"
ROWS = 16384
OURS = "expo_fast"
NAMES = {
    "TRL selective_log_softmax": "TRL, selective_log_softmax",
    "Liger scaled cross entropy": "Liger, scaled cross entropy",
    "LigerFusedLinearDPOLoss": "Liger, fused linear DPO",
    "eager": "eager PyTorch",
}

WIDTH = 880
MARGIN = 18
LABELS = MARGIN + 210  # where the bars begin
BAR = 20
GAP = 8
TITLE = 46
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2328; }
.title { font-weight: 600; }
.note { fill: #59636e; font-size: 12px; }
.page { fill: #ffffff; }
.peer { fill: #b6bec9; }
.ours { fill: #3f51b5; }
@media (prefers-color-scheme: dark) {
  .page { fill: #161b22; }
  text { fill: #e6edf3; }
  .note { fill: #9198a1; }
  .peer { fill: #515a66; }
  .ours { fill: #8c9eff; }
}
"""


@dataclass(frozen=True)
class Bar:
    """A value, and its text at the end of the bar."""

    name: str
    value: float
    text: str


@dataclass(frozen=True)
class Panel:
    """A group of bars with a title and a note on what was measured."""

    title: str
    note: str
    bars: Sequence[Bar]

    @property
    def height(self) -> int:
        return TITLE + len(self.bars) * (BAR + GAP)


def main() -> None:
    OUTPUT.write_text(picture())
    print(f"picture: {OUTPUT.relative_to(ROOT)}")


def picture() -> str:
    """Return the SVG."""
    panels = [*op_panels(), sampler_panel()]
    height = MARGIN + sum(panel.height + 2 * GAP for panel in panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        "<title>expo_fast beside its peers: times, memory and sampling speed</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}" rx="8"/>',
    ]
    top = MARGIN
    for panel in panels:
        parts += draw(panel, top)
        top += panel.height + 2 * GAP
    return "\n".join([*parts, "</svg>", ""])


def op_panels() -> list[Panel]:
    """Return the panels of the ops: time and memory of log-probs with gradients, time of DPO."""
    ops = json.loads((TIMES / "ops-0.5b.json").read_text())["results"]
    liger = json.loads((TIMES / "liger.json").read_text())["results"]
    logprob = times_of(ops, "logprob forward+backward")
    logprob |= times_of(liger, "logprob forward+backward", without=OURS)
    dpo = times_of(ops, "preference loss")
    note = f"H100, bf16, vocabulary 151936, {ROWS} tokens of a 0.5B model"
    return [
        Panel("Log-probs and gradients, ms (less is better)", note, milliseconds(logprob)),
        Panel(
            "Extra memory of log-probs and gradients, GB (less is better)", note, gigabytes(logprob)
        ),
        Panel("DPO loss and gradients, ms (less is better)", note, milliseconds(dpo)),
    ]


def times_of(results: list[dict], op: str, without: str = "") -> dict[str, dict]:
    """Return what was measured of one op, by the name of the implementation."""
    for result in results:
        if (result["op"], result["model"], result["rows"]) == (op, MODEL, ROWS):
            measured = result["contestants"]
            return {k: v for k, v in measured.items() if k in (OURS, *NAMES) and k != without}
    raise ValueError(f"{TIMES} has no {op} of {MODEL} with {ROWS} rows")


def milliseconds(measured: dict[str, dict]) -> list[Bar]:
    found = [(name, 1e3 * each["median_s"]) for name, each in measured.items()]
    return [Bar(name, value, f"{value:.1f}") for name, value in sorted(found, key=by_value)]


def gigabytes(measured: dict[str, dict]) -> list[Bar]:
    found = [(name, each["extra_bytes"] / 1e9) for name, each in measured.items()]
    return [Bar(name, value, f"{value:.1f}") for name, value in sorted(found, key=by_value)]


def by_value(item: tuple[str, float]) -> float:
    return item[1]


def sampler_panel() -> Panel:
    """Return the panel of the sampler, from the table of `python -m benchmarks.decode`."""
    text = (ROOT / "benchmarks/RESULTS.md").read_text()
    section = text.split("## The generator on a CPU")[1].split("\n## ")[0]
    names = {
        r"\*\*expo_fast\*\*": OURS,
        r"llama\.cpp": "llama.cpp",
        r"\.\.\. static cache": "transformers, static cache",
        r"transformers `generate`": "transformers, generate",
    }
    bars = []
    for pattern, name in names.items():
        row = re.search(rf"^\| {pattern} \| [\d.]+ \| [\d.-]+ \| (\d+) \|", section, re.MULTILINE)
        assert row is not None, pattern
        bars.append(Bar(name, float(row[1]), row[1]))
    note = "two cores of an AMD Zen 5, SmolLM2-135M bf16, 64 samples of 128 tokens"
    return Panel("Sampling, tokens a second (more is better)", note, bars)


def draw(panel: Panel, top: int) -> list[str]:
    """Return the SVG elements of a panel."""
    most = max(bar.value for bar in panel.bars)
    parts = [
        f'<text class="title" x="{MARGIN}" y="{top + 16}">{escape(panel.title)}</text>',
        f'<text class="note" x="{MARGIN}" y="{top + 34}">{escape(panel.note)}</text>',
    ]
    for index, bar in enumerate(panel.bars):
        y = top + TITLE + index * (BAR + GAP)
        width = max(1.0, (WIDTH - LABELS - 70) * bar.value / most)
        kind = "ours" if bar.name == OURS else "peer"
        name = escape(NAMES.get(bar.name, bar.name))
        middle = y + BAR - 5
        parts += [
            f'<text x="{LABELS - 10}" y="{middle}" text-anchor="end">{name}</text>',
            f'<rect class="{kind}" x="{LABELS}" y="{y}" width="{width:.1f}" height="{BAR}"/>',
            f'<text x="{LABELS + width + 6:.1f}" y="{middle}">{bar.text}</text>',
        ]
    return parts


if __name__ == "__main__":
    main()
