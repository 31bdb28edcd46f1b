"""Train on pairs of your own with DPO.

    python examples/dpo.py


A pair is a prompt, the text that you prefer and the one that you reject. Here polite answers are
preferred to rude ones.
"""

import json
import tempfile
from pathlib import Path

from expo_fast.config import Train
from expo_fast.generate import Request
from expo_fast.train import TrainResult, run

QUESTIONS = (
    "Where is the station?",
    "Can you help me?",
    "What time is it?",
    "How do I open this file?",
    "Is the shop open today?",
    "Which bus goes to the harbour?",
    "Where can I buy a ticket?",
    "Who can repair my phone?",
)


def write_pairs(path: Path) -> None:
    """Write one pair for each question."""
    rows = []
    for question in QUESTIONS:
        row = {
            "prompt": question,
            "chosen": "Of course, I am glad to help you with that.",
            "rejected": "No. Find it out yourself.",
        }
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = train_in(Path(folder))
        for row in result.metrics:
            print(
                f"step {row['step']}: loss {row['loss']:.3f}, "
                f"margin of the implicit rewards {row['rewards/margins']:+.3f}"
            )
        print(answer(result, "Where is the library?"))


def train_in(folder: Path) -> TrainResult:
    write_pairs(folder / "pairs.jsonl")
    config = Train(
        method="dpo",
        train_data=str(folder / "pairs.jsonl"),
        preference="dpo",
        dpo_beta=0.1,
        shots=0,
        instruction="",
        learning_rate=2e-5,
        warmup_steps=0,
        prompts_per_step=4,
        steps=3,
        eval_every=0,
        checkpoint_every=0,
        output_dir=str(folder / "run"),
    )
    return run(config)


def answer(result: TrainResult, question: str) -> str:
    """Return what the trained model answers."""
    prompt = result.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        tokenize=False,
        add_generation_prompt=True,
    )
    request = Request(result.tokenizer(prompt).input_ids, max_new_tokens=24, temperature=0)
    (completion,) = result.generator.sample([request])
    return result.tokenizer.decode(completion.token_ids)


if __name__ == "__main__":
    main()
