"""Hints for a flag that does not exist: what other trainers call it, or a name like it."""

import re
from collections.abc import Collection
from difflib import get_close_matches

# Flags of TRL, Hugging Face's Trainer, verl, Unsloth, nanochat and lm-eval, and what to use here.
# Of several sentences, the first one whose flags the command has applies.
OTHER_TRAINERS: dict[str, tuple[str, ...]] = {
    # Model
    "model-name-or-path": ("use --model",),
    "model-name": ("use --model",),
    "model-path": ("use --model",),
    "pretrained-model": ("use --model",),
    "torch-dtype": ("use --dtype",),
    "bf16": ("use --dtype bfloat16",),
    "fp16": ("use --dtype bfloat16: weights have no fp16",),
    "use-peft": ("use --lora-rank",),
    "lora-r": ("use --lora-rank",),
    # Data and prompts
    "data": ("use --train-data",),
    "dataset": ("use --train-data", "use --data"),
    "dataset-name": ("use --train-data", "use --data"),
    "dataset-path": ("use --train-data", "use --data"),
    "train-file": ("use --train-data",),
    "train-files": ("use --train-data",),
    "train-dataset": ("use --train-data",),
    "eval-dataset": ("use --eval-data", "use --data"),
    "val-files": ("use --eval-data",),
    "task": ("use --data",),
    "tasks": ("use --data",),
    "num-fewshot": ("use --shots",),
    "max-prompt-length": (
        "leave it out: no prompt is cut, and one that does not fit the model is refused",
    ),
    # Length of a run and its batches
    "max-steps": ("use --steps",),
    "num-steps": ("use --steps",),
    "num-iters": ("use --steps",),
    "num-train-epochs": ("use --epochs",),
    "num-epochs": ("use --epochs",),
    "total-epochs": ("use --epochs",),
    "batch-size": ("use --prompts-per-step",),
    "train-batch-size": ("use --prompts-per-step",),
    "per-device-train-batch-size": (
        "use --prompts-per-step for the questions of a step, and --pack-tokens for the tokens of "
        "a pass",
    ),
    "gradient-accumulation-steps": (
        "leave it out: a step always has the questions of --prompts-per-step, in passes of at "
        "most --pack-tokens",
    ),
    "mini-batch-size": ("use --updates-per-batch, the number of mini-batches",),
    "num-iterations": ("use --updates-per-batch, which splits a batch and does not repeat it",),
    # Sampling
    "num-samples": ("use --num-generations", "use --samples"),
    "num-return-sequences": ("use --num-generations", "use --samples"),
    "group-size": ("use --num-generations",),
    "n": ("use --num-generations", "use --samples"),
    "max-new-tokens": ("use --max-completion-length",),
    "max-tokens": ("use --max-completion-length",),
    "max-response-length": ("use --max-completion-length",),
    "max-length": ("use --max-completion-length",),
    "max-seq-length": ("use --max-completion-length",),
    "use-vllm": ("leave it out: the generator samples from the trainer's weights",),
    # Reward and loss
    "reward-funcs": ("use --reward",),
    "reward-fn": ("use --reward",),
    "reward-function": ("use --reward",),
    "beta": ("use --dpo-beta for the loss of pairs, or --kl-coef for the KL penalty",),
    "kl-coeff": ("use --kl-coef",),
    "kl-loss-coef": ("use --kl-coef",),
    "init-kl-coef": ("use --kl-coef",),
    "entropy-coeff": ("use --entropy-coef",),
    "epsilon": ("use --clip-low and --clip-high",),
    "epsilon-high": ("use --clip-high",),
    "cliprange": ("use --clip-low and --clip-high",),
    "clip-ratio": ("use --clip-low and --clip-high",),
    "clip-ratio-low": ("use --clip-low",),
    "clip-ratio-high": ("use --clip-high",),
    "loss-type": ("use --loss or --objective, or --preference for pairs",),
    "scale-rewards": ("use --advantage-scale",),
    "mask-truncated-completions": ("use --mask-truncated",),
    "algorithm": ("use --method",),
    # Optimizer
    "lr": ("use --learning-rate",),
    "lr-scheduler-type": ("use --schedule",),
    "warmup-ratio": ("use --warmup-steps",),
    "adam-beta1": ("use --betas with both values",),
    "adam-beta2": ("use --betas with both values",),
    "adam-epsilon": ("use --eps",),
    "grad-clip": ("use --max-grad-norm",),
    # Evaluation, checkpoints and logs
    "eval-steps": ("use --eval-every",),
    "save-steps": ("use --checkpoint-every",),
    "save-freq": ("use --checkpoint-every",),
    "save-total-limit": ("use --keep-checkpoints",),
    "resume-from-checkpoint": ("use --resume",),
    "output": ("use --output-dir",),
    "output-path": ("use --output",),
    "logging-steps": ("leave it out: each step is logged",),
}


def hint(unknown: str, known: Collection[str]) -> str | None:
    """Return what to use in place of an unknown flag, or None if nothing is like it.

    unknown, known: names without the leading dashes, with - between words.
    """
    for sentence in OTHER_TRAINERS.get(unknown, ()):
        if flags_in(sentence) <= set(known):
            return sentence
    near = get_close_matches(unknown, known)
    if not near:
        near = [name for name in known if unknown in name]
    if not near:
        return None
    return "perhaps you meant " + " or ".join(f"--{name}" for name in near)


def flags_in(sentence: str) -> set[str]:
    """Return the flags that a sentence names, without their leading dashes."""
    return set(re.findall(r"--([a-z][a-z-]*[a-z])", sentence))
