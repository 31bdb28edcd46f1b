"""The model card of a trained model, as the README.md of a repository of the Hugging Face hub."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import expo_fast
from expo_fast.reporting.runs import Run, group_runs, load_run, number
from expo_fast.reporting.verdicts import in_distribution, learning_signal

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CITATION = "[arXiv:2507.02834](https://arxiv.org/abs/2507.02834)"


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside the logs of the run."""

    title: str
    base: str  # a hub id, or a path
    is_adapter: bool
    step: int  # of the checkpoint
    hashes: Mapping[str, str]  # by what they identify, such as the training data


def model_card(run_dir: Path, facts: CardFacts) -> str:
    """Return the card in Markdown: base, method, accuracies, properties, hashes, configuration."""
    run = load_run(str(run_dir))
    sections = [
        _front_matter(run, facts),
        f"# {facts.title}\n\n{_summary(run, facts)}",
        "\n".join(_accuracies(run)),
        "\n".join(_properties(run)),
        "\n".join(_last_step(run)),
        "\n".join(_origin(facts)),
        "\n".join(_configuration(run_dir)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(run: Run, facts: CardFacts) -> str:
    lines = [
        "---",
        f"library_name: {'peft' if facts.is_adapter else 'transformers'}",
        "pipeline_tag: text-generation",
    ]
    if HUB_ID.fullmatch(facts.base):
        lines.append(f"base_model: {facts.base}")
    lines += ["tags:", "- expo_fast", f"- {_method(run)}", "---"]
    return "\n".join(lines)


def _method(run: Run) -> str:
    return str(run.config.get("method"))


def _summary(run: Run, facts: CardFacts) -> str:
    what = "A LoRA adapter of" if facts.is_adapter else "A model trained from"
    base = facts.base if HUB_ID.fullmatch(facts.base) else Path(facts.base).name
    return (
        f"{what} `{base}`, after step {facts.step} of `{_method(run)}` with expo_fast "
        f"{expo_fast.__version__}. The method is that of ExPO ({CITATION}), or one of its controls."
    )


def _accuracies(run: Run) -> Iterator[str]:
    """Yield the table of the first and the last evaluation, or nothing if there is none."""
    if not run.evaluations:
        return
    samples = run.samples or 1
    keys = list(dict.fromkeys(("pass@1", f"pass@{samples}")))
    yield "## Accuracy on held-out problems\n"
    yield f"| step | problems | {' | '.join(keys)} |"
    yield f"|---|---|{'---|' * len(keys)}"
    rows = {row["step"]: row for row in (run.evaluations[0], run.evaluations[-1])}
    for step, row in rows.items():
        cells = [_accuracy(row, key) for key in keys]
        yield f"| {step} | {row.get('problems', '')} | {' | '.join(cells)} |"
    temperature = run.config.get("eval_temperature")
    yield f"\n{samples} samples of each problem at temperature {temperature}. Intervals are 95%."


def _accuracy(row: Mapping[str, object], key: str) -> str:
    value = number(dict(row), key)
    interval = row.get(f"{key}/interval")
    text = "" if value is None else f"{value:.3f}"
    if isinstance(interval, list):
        low, high = interval
        text += f" [{low:.3f}, {high:.3f}]"
    return text


def _properties(run: Run) -> Iterator[str]:
    """Yield the verdicts on the two properties of a good positive sample, if they are measured."""
    if not any(number(row, "exp/lift") is not None for row in run.steps):
        return
    (group,) = group_runs([run])
    yield "## The two properties of its explanations\n"
    for verdict in (in_distribution(group), learning_signal(group)):
        yield f"- {re.sub('<.*?>', '', verdict)}"


def _last_step(run: Run) -> Iterator[str]:
    """Yield the metrics of the last step."""
    yield f"## Metrics of step {run.steps[-1]['step']}\n"
    yield "| metric | value |\n|---|---|"
    for key in run.steps[-1]:
        value = number(run.steps[-1], key)
        if value is not None and key != "step" and not key.startswith("time/"):
            yield f"| {key} | {value:.4g} |"


def _origin(facts: CardFacts) -> Iterator[str]:
    yield "## What it was made from\n"
    yield "Hashes are compared when a run is resumed.\n"
    yield "| | hash |\n|---|---|"
    for what, value in facts.hashes.items():
        yield f"| {what} | `{value}` |"


def _configuration(run_dir: Path) -> Iterator[str]:
    """Yield the configuration without the folders of this machine."""
    yield "## Configuration\n"
    yield "```toml"
    for line in (run_dir / "config.toml").read_text(encoding="utf-8").strip().splitlines():
        name, _, value = line.partition(" = ")
        if name in ("output_dir", "resume", "dry_run", "push_to_hub"):
            continue
        yield f"{name} = {_without_folders(value)}"
    yield "```"


def _without_folders(value: str) -> str:
    """Return a TOML value in which absolute paths are names of files."""
    return re.sub(r'"(/[^"\n]*)"', lambda match: json.dumps(Path(match[1]).name), value)
