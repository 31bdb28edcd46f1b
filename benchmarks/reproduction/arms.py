"""The arms and the sizes of the comparison. An arm is `expo_fast.train` with flags of its own."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from expo_fast.methods import METHODS

SEEDS = (0, 1, 2)
COEFFICIENTS = (0.0, 0.01, 0.04, 0.1, 0.5)  # as in the paper's Table 5; 0 is GRPO


@dataclass(frozen=True)
class Arm:
    """A row of the table.

    All arms have the same model, questions, number of steps and number of sampled completions.
    """

    name: str
    flags: dict[str, object]
    seeds: tuple[int, ...] = SEEDS
    mirrors: str | None = None  # the arm with the same flags, whose runs this arm uses

    @property
    def slug(self) -> str:
        """Return the name in a form for file names."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")


ARMS = [
    Arm("GRPO", {"method": "grpo"}),
    Arm("ExP-GRPO", {"method": "expo-grpo"}),
    Arm("GRPO + SFT on expert solutions", {"method": "expert-grpo"}),
    Arm("ExP-GRPO, shuffled", {"method": "expo-grpo", "shuffle-explanations": True}),
    Arm("SFT on explanations (STaR)", {"method": "star"}, SEEDS[:1]),
    Arm("ExP-DPO, offline", {"method": "expo-dpo"}),
    Arm("ExP-DPO, online", {"method": "expo-dpo", "pairs-every": 4}),
    Arm("DPO on expert solutions", {"method": "expert-dpo"}),
]
MIRRORS = {0.0: "GRPO", 0.04: "ExP-GRPO"}
ABLATION = [
    Arm(
        f"coefficient {c:g}",
        {"method": "expo-grpo", "exp-sft-coef": c},
        SEEDS[:1],
        MIRRORS.get(c),
    )
    for c in COEFFICIENTS
]


@dataclass(frozen=True)
class Size:
    """How much all arms train and measure."""

    model: str
    train_sources: tuple[str, ...]
    eval_sources: tuple[str, ...]
    shots_source: str
    train_candidates: tuple[int, ...]  # how many questions of each source the base model tries
    eval_candidates: tuple[int, ...]
    # Samples of each candidate. Every further number is for the candidates that failed all samples
    # before. A question is chosen if all samples fail.
    tries: tuple[int, ...]
    flags: dict[str, object]
    explaining: dict[str, object] = field(default_factory=dict)  # flags of arms that explain


SIZES = {
    "tiny": Size(  # a run takes about eight minutes on one CPU core
        "smollm2-135m",
        ("builtin:arithmetic-1:train",),
        ("builtin:arithmetic-1:eval", "builtin:arithmetic-2:eval"),
        shots_source="builtin:arithmetic-1:train",
        train_candidates=(128,),
        eval_candidates=(40, 16),  # level 2, on which no arm trains, measures transfer
        tries=(8,),
        flags={
            "steps": 24,
            "prompts-per-step": 8,
            "generation-budget": 16,
            "shots": 0,  # without worked examples this model never boxes an answer
            "max-completion-length": 128,
            "temperature": 0.7,
            "eval-every": 12,
            "checkpoint-every": 0,
            "eval-samples": 4,
            "diagnose": 2,
        },
        # Many explanations, of which one is kept: of 4 explanations of a question, often none was
        # fit. One of two seeds then trained on the SFT term alone, and unlearned, because Adam
        # scales its small gradient up.
        explaining={
            "explanations-per-question": 12,
            "keep-explanations": 1,
            "append-answer": True,
        },
    ),
    "full": Size(  # for a GPU
        "HuggingFaceTB/SmolLM2-360M-Instruct",
        ("hub:openai/gsm8k/main:train",),
        ("hub:openai/gsm8k/main:test",),
        shots_source="hub:openai/gsm8k/main:train",
        train_candidates=(4000,),
        eval_candidates=(600,),
        tries=(8, 56),
        flags={
            "steps": 200,
            "prompts-per-step": 32,
            "generation-budget": 16,
            "shots": 2,
            "max-completion-length": 256,
            "temperature": 0.7,
            "eval-every": 20,
            "checkpoint-every": 20,
            "eval-samples": 16,
        },
    ),
}


def target(folder: Path, arm: Arm, seed: int) -> Path:
    """Return the folder of a run."""
    return folder / f"{arm.slug}-{seed}"


def train_flags(arm: Arm, size: Size, seed: int, folder: Path) -> list[str]:
    """Return the flags of `expo_fast.train` for a run."""
    method = METHODS[str(arm.flags["method"])]
    explaining = size.explaining if method.explains else {}
    flags = size.flags | explaining | arm.flags
    flags |= {
        "seed": seed,
        "train-data": folder / "train.jsonl",
        "eval-data": folder / "eval.jsonl",
        "output-dir": target(folder, arm, seed),
        "shots-data": size.shots_source,
        "model": size.model,
        "eval-limit": 10000,
        "keep-checkpoints": 1,
    }
    return [*as_flags(flags)]


def as_flags(values: Mapping[str, object]) -> Iterator[str]:
    """Yield the flags. A value of True is a flag without a value."""
    for name, value in values.items():
        yield f"--{name}"
        if value is not True:
            yield str(value)
