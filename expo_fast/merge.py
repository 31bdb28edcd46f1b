"""Merge a LoRA adapter into its base model: python -m expo_fast.merge ADAPTER --output FOLDER.

The folder loads in transformers, vLLM and llama.cpp's converter without PEFT.
"""

if __name__ == "__main__":  # before the imports below, because one of their packages may be missing
    from expo_fast.cli.exit_status import run_command

    raise SystemExit(run_command("merge"))

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from expo_fast.cli.flags import from_flags
from expo_fast.storage.checkpoint import newest
from expo_fast.storage.lora_files import holds_adapter
from expo_fast.weights import find_model, load_model, save_model


@dataclass(frozen=True)
class Merge:
    """Write a model folder with W + (alpha / r) B A for each projection of a LoRA adapter."""

    adapter: str
    """Run directory, checkpoint, folder of a PEFT adapter, or hub id."""
    output: str = "merged"
    """Folder to write, which must be new or empty."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the merged weights. Each is computed in fp32 and rounded once."""


def main(argv: Sequence[str]) -> None:
    """Run the command line. Raise ValueError or OSError for files it cannot read or write."""
    config = from_flags(Merge, argv, str(Merge.__doc__))
    output = Path(config.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {config.output!r} exists: name a new or an empty folder")
    adapter = find_adapter(config.adapter)
    model, tokenizer = load_model(adapter, dtype=getattr(torch, config.dtype), device="cpu")
    save_model(model, tokenizer, output)
    print(f"merged {adapter}: {output}", flush=True)


def find_adapter(name: str) -> Path:
    """Return the folder of an adapter. That of a run directory is its newest checkpoint.

    Raise ValueError if there is no adapter.
    """
    path = Path(name).expanduser()
    if (path / "config.toml").is_file():
        checkpoint = newest(path)
        if checkpoint is None:
            raise ValueError(f"{name}: the run has no complete checkpoint: resume it")
        path = checkpoint
    elif not path.exists():
        path = find_model(name)
    if not path.is_dir() or not holds_adapter(path):
        raise ValueError(f"{path} holds no LoRA adapter: a model without one needs no merge")
    return path
