"""What a command imports before it answers. An import of torch._dynamo takes half a second."""

import subprocess
import sys
from pathlib import Path

import pytest

from expo_fast.weights import save_model
from jobs import write_rows
from tiny import tiny_model, tiny_tokenizer

NOT_FOR_HELP = {"transformers", "huggingface_hub", "tokenizers", "safetensors", "sympy", "triton"}
NOT_FOR_HELP |= {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "pyarrow"}
# transformers' configs import its layers, generation and accelerate.
NOT_FOR_A_DRY_RUN = {"transformers.activations", "transformers.generation.utils", "accelerate"}
NOT_FOR_A_DRY_RUN |= {"transformers.modeling_utils", "transformers.integrations.hub_kernels"}
NOT_FOR_A_DRY_RUN |= {"peft", "datasets", "pyarrow", "rich"}

PROGRAM = """
import sys
from expo_fast.cli.exit_status import run_command
status = run_command(sys.argv[1], sys.argv[2:])
print("imported:", *sys.modules)
sys.exit(status)
"""


def imported_by(*words: str) -> set[str]:
    """Return the names of the modules that a command has imported at its end."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("imported:")[2].split())


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_imports_only_what_names_the_flags(command: str):
    assert not imported_by(command, "--help") & NOT_FOR_HELP


def test_a_dry_run_imports_no_model_of_transformers(tmp_path: Path):
    save_model(tiny_model("llama-tied"), tiny_tokenizer(), tmp_path / "model")
    rows = [{"id": f"p{n}", "question": f"{n} + 1?", "answer": str(n + 1)} for n in range(9)]
    write_rows(tmp_path / "train.jsonl", rows)
    flags = {
        "--model": tmp_path / "model",
        "--train-data": tmp_path / "train.jsonl",
        "--output-dir": tmp_path / "run",
        "--prompts-per-step": 2,
        "--shots": 0,
        "--max-completion-length": 8,
        "--eval-every": 0,
    }
    words = ["train", "--dry-run"]
    for name, value in flags.items():
        words += [name, str(value)]
    assert not imported_by(*words) & NOT_FOR_A_DRY_RUN
