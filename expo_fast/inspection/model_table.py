"""Write the README's table of models: python -m expo_fast.inspection.model_table

It replaces the lines between the two comments of README.md in the working folder.
"""

from collections.abc import Iterator
from pathlib import Path

from expo_fast.inference import joined_weights
from expo_fast.modeling.architectures import ARCHITECTURES, Architecture, plain_scales
from expo_fast.modeling.shape import read_shape
from expo_fast.storage import gguf

BEGIN = "<!-- models: python -m expo_fast.inspection.model_table -->"
END = "<!-- end of models -->"
WRITTEN_AS = {"mistral": "llama"}  # in GGUF files


def table() -> str:
    """Return the table in Markdown."""
    rows = [
        "| architecture | models | GGUF | decode step on a GPU | limits |",
        "|---|---|---|---|---|",
    ]
    for kind, architecture in ARCHITECTURES.items():
        rows.append(f"| {' | '.join(_cells(kind, architecture))} |")
    return "\n".join(rows)


def _cells(kind: str, architecture: Architecture) -> Iterator[str]:
    yield f"`{kind}`"
    yield architecture.examples
    yield "yes" if WRITTEN_AS.get(kind, kind) in gguf.ARCHITECTURES else "no"
    yield _decode_step(kind, architecture)
    yield architecture.limits


def _decode_step(kind: str, architecture: Architecture) -> str:
    from transformers import AutoConfig

    scales = architecture.scales is not plain_scales  # 1 in a default config of Granite
    if scales or not joined_weights.supports(read_shape(AutoConfig.for_model(kind))):
        return "PyTorch"
    return "fused; partial RoPE: PyTorch" if architecture.partial_rope else "fused"


def with_table(readme: str) -> str:
    """Return the README with the present table."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks {BEGIN!r} or {END!r}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    path = Path("README.md")
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
