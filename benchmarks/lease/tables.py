"""Print the findings of a check and of timings as Markdown tables.

    python -m benchmarks.lease.tables FOLDER

FOLDER contains the JSON files of an unpacked archive.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.summary import ms

Findings = dict[str, Any]
ALIGN_RIGHT = "--:"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    items = {file.stem: json.loads(file.read_text()) for file in sorted(folder.rglob("*.json"))}
    for lines in (parts(items), ops(items), decoding(items), training(items)):
        print(*lines, sep="\n", end="\n\n")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table whose first column is text."""
    rule = ["---"] + [ALIGN_RIGHT] * (len(head) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def parts(items: dict[str, Findings]) -> Iterator[str]:
    """Yield a table of measured and forecast times for each model and number of rows."""
    for item in items.values():
        for found in item.get("parts", []):
            yield f"**Parts, {found['model']}, {found['rows']} rows**\n"
            rows = []
            for name, seconds in found["seconds"].items():
                floor = found["floors"][name]
                expected = found["expected"][name]
                rows.append([name, ms(seconds), ms(floor), ms(expected), f"{floor / seconds:.0%}"])
            yield from table(["", "ms", "floor", "forecast", "of floor"], rows)
            yield ""


def ops(items: dict[str, Findings]) -> Iterator[str]:
    """Yield a table of ours and the peers for each op, model and number of rows."""
    for name, item in items.items():
        if not name.startswith(("ops", "liger")):
            continue
        for found in item.get("results", []):
            zeros = ", two rows of five without a gradient" if found["zeros"] else ""
            yield f"**{found['op']}, {found['model']}, {found['rows']} rows{zeros}**\n"
            rows = []
            for contestant, timed in found["contestants"].items():
                spread = f"{ms(min(timed['seconds']))}-{ms(max(timed['seconds']))}"
                rows.append(
                    [
                        contestant,
                        ms(timed["median_s"]),
                        spread,
                        f"{timed['times_ours']:.2f}",
                        f"{timed['of_limit']:.0%}",
                        f"{timed['extra_bytes'] / 1e6:.0f}",
                        f"{timed['error']['value']:.1e}",
                    ]
                )
            head = ["", "median ms", "spread", "times ours", "of limit", "extra MB", "error"]
            yield from table(head, rows)
            yield ""


def decoding(items: dict[str, Findings]) -> Iterator[str]:
    """Yield a table of the generator: a decode step alone, and end to end."""
    rows = []
    for item in items.values():
        result = item.get("result", {})
        if "contestants" not in result:
            continue
        for name, timed in result["contestants"].items():
            step = item.get("step", {}).get("seconds") if name == "expo_fast" else None
            rows.append(
                [
                    f"{result['model']}, {name}",
                    ms(step) if step else "",
                    f"{timed['tokens_per_second']:.0f}",
                    f"{timed['of_limit']:.0%}",
                    f"{result['decoding']['of limit']:.0%}" if step else "",
                ]
            )
    if rows:
        head = ["", "step alone, ms", "tokens/s", "of limit", "of limit, prompts left out"]
        yield from table(head, rows)


def training(items: dict[str, Findings]) -> Iterator[str]:
    """Yield a table of training steps: seconds of phases and of kinds of kernels."""
    for name, item in items.items():
        result = item.get("result", {})
        if "phases" not in result:
            continue
        steady = result["seconds"][1:]
        seconds = sum(steady) / len(steady)
        memory = f", {result['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in result else ""
        yield f"**{name}: {seconds:.3f} s a step, {result['mfu']:.0%} MFU{memory}**\n"
        rows = [[phase, f"{s:.3f}"] for phase, s in result["phases"].items()]
        rows += [[f"GPU: {kind}", f"{s:.3f}"] for kind, s in result.get("kernels", {}).items()]
        yield from table(["", "s"], rows)
        yield ""


if __name__ == "__main__":
    main()
