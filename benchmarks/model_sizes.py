"""Peak memory of training by model size: python -m benchmarks.model_sizes [-- flags of training]

The models have random weights, the shapes of the named models, and the tokenizer of the default
model, so that nothing is downloaded but the default model. A reward that depends on the tokens
gives both terms of the loss a gradient. Each run is a process of its own. The peak is that of the
process's resident memory (on a GPU: of the memory that torch allocated).
"""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from expo_fast.storage.hf_files import write_model
from expo_fast.weights import load_model


@dataclass(frozen=True)
class Size:
    """The shape of a model, as in its config.json."""

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


SIZES = {
    "SmolLM2-135M": Size("llama", 576, 1536, 30, 9, 3, 49152),
    "SmolLM2-360M": Size("llama", 960, 2560, 32, 15, 5, 49152),
    "Qwen2.5-0.5B": Size("qwen2", 896, 4864, 24, 14, 2, 151936),
    "Qwen2.5-1.5B": Size("qwen2", 1536, 8960, 28, 12, 2, 151936),
}
REWARD = """
def parity(completion_ids, **columns):
    return [float(sum(ids) % 2) for ids in completion_ids]
"""
PROGRAM = """
import resource, sys, torch
from expo_fast import train
train.main(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
if torch.cuda.is_available():
    peak = torch.cuda.max_memory_allocated()
print(peak)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("flags", nargs="*", help="flags of expo_fast.train, after --")
    options = parser.parse_args()
    print("| model | parameters | peak, GB |")
    print("|---|--:|--:|")
    for name in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            parameters = write_random_model(SIZES[name], Path(folder, "model"))
            peak = peak_of_training(Path(folder), options.flags)
        print(f"| {name} | {parameters / 1e6:.0f}M | {peak / 1e9:.1f} |", flush=True)


def write_random_model(size: Size, folder: Path) -> int:
    """Write a model with random weights, and return its number of parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    _, tokenizer = load_model("smollm2-135m")
    config = AutoConfig.for_model(
        size.model_type,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config)
    weights = {}
    for key, parameter in shapes.named_parameters():
        weights[key] = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(std=0.02)
    folder.mkdir()
    write_model(folder, config, weights, tokenizer)
    return sum(weight.numel() for weight in weights.values())


def peak_of_training(folder: Path, flags: list[str]) -> int:
    """Train the model of a folder in a process of its own. Return its peak memory in bytes."""
    reward = folder / "reward.py"
    reward.write_text(REWARD)
    command = [sys.executable, "-c", PROGRAM]
    command += ["--model", str(folder / "model"), "--output-dir", str(folder / "run")]
    command += ["--steps", "2", "--prompts-per-step", "8", "--num-generations", "4"]
    command += ["--max-completion-length", "16", "--diagnose", "0"]
    command += ["--pack-tokens", "1024"]  # less than the tokens of a step, so that packs are full
    command += ["--eval-every", "0", "--checkpoint-every", "0"]
    if "sft" not in flags:
        command += ["--method", "expert-grpo", "--reward", f"{reward}:parity"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
