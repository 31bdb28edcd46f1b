"""Write docs/flags.md: python -m expo_fast.cli.flags_page > docs/flags.md"""

from collections.abc import Iterator

from expo_fast.cli.flags import preset_or_file, presets
from expo_fast.cli.help_text import Flag, themes
from expo_fast.config import Evaluate, Train

HEADER = """# Flags

<!-- Generated: python -m expo_fast.cli.flags_page > docs/flags.md -->

A flag is a field of [`expo_fast/config.py`](../expo_fast/config.py): `--learning-rate 1e-6` on the
command line, `learning_rate = 1e-6` in a TOML file, and `Train(learning_rate=1e-6)` in Python.
`--config` takes the values of a TOML file or of a preset in place of the defaults, and flags
override them. The presets are:

{presets}

Where *read by* names methods, the other methods refuse values other than the default: none is
ignored silently.
"""


def page() -> str:
    """Return docs/flags.md."""
    listed = "\n".join(f"- `{name}`: {about_preset(name)}" for name in presets())
    sections = [HEADER.format(presets=listed)]
    sections += command("expo_fast.train", Train)
    sections += command("expo_fast.evaluate", Evaluate)
    return "\n".join(sections)


def about_preset(name: str) -> str:
    """Return the description of a preset, which are the comments at the head of its file."""
    words = []
    for line in preset_or_file(name).read_text().splitlines():
        if not line.startswith("# "):
            break
        words.append(line.removeprefix("# "))
    return " ".join(words)


def command(name: str, kind: type) -> Iterator[str]:
    """Yield the sections of a command."""
    yield f"## {name}\n"
    for title, flags in themes(kind).items():
        readers = any(flag.readers for flag in flags)
        yield f"### {title}\n"
        if readers:
            yield "| flag | default | meaning | read by |\n|---|---|---|---|"
        else:
            yield "| flag | default | meaning |\n|---|---|---|"
        yield "\n".join(row(flag, readers=readers) for flag in flags) + "\n"


def row(flag: Flag, *, readers: bool) -> str:
    """Return the row of a flag in a table."""
    default = f"`{flag.default}`" if flag.default else ""
    cells = [f"`{cell(flag.forms)}`", default, cell(flag.text)]
    if readers:
        cells.append(flag.readers or "all")
    return f"| {' | '.join(cells)} |"


def cell(text: str) -> str:
    """Return a text without what ends a cell."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
