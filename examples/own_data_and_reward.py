"""Train on your own data with your own reward.

    python examples/own_data_and_reward.py

The data ask for a sentence with a given word. The reward adds two functions: one for the word and a
small one for short sentences.
"""

import json
import tempfile
from pathlib import Path

from expo_fast.config import Train
from expo_fast.train import run

WORDS = ("apple", "river", "stone", "cloud", "garden", "window", "pencil", "bridge")


def has_word(completions, answer, **columns):
    """Return 1 for a text with the word. `answer` is a column of the data."""
    pairs = zip(completions, answer, strict=True)
    return [float(word in text.lower()) for text, word in pairs]


def brief(completion_ids, log_metric, **columns):
    """Return a penalty of 1 for 100 tokens, and log the longest completion."""
    lengths = [len(ids) for ids in completion_ids]
    log_metric("longest", max(lengths))
    return [-length / 100 for length in lengths]


def write_rows(path: Path) -> None:
    """Write one question for each word, as a JSON object a line."""
    rows = []
    for word in WORDS:
        question = f"Write one short sentence with the word '{word}'."
        rows.append({"question": question, "answer": word})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        train_in(Path(folder))


def train_in(folder: Path) -> None:
    write_rows(folder / "words.jsonl")
    config = Train(
        method="grpo",
        train_data=str(folder / "words.jsonl"),
        reward=("__main__:has_word", "__main__:brief"),
        reward_weights=(1.0, 0.5),
        instruction="",  # the default asks for a boxed answer
        shots=0,
        max_completion_length=32,
        prompts_per_step=4,
        num_generations=4,
        steps=2,
        eval_every=0,  # a real run needs held-out questions: eval_data="dev.jsonl"
        checkpoint_every=0,  # and checkpoints
        output_dir=str(folder / "run"),
    )
    result = run(config)
    for row in result.metrics:
        means = {name: round(row[f"rewards/{name}/mean"], 3) for name in ("has_word", "brief")}
        print(f"step {row['step']}: {means}, longest completion {row['longest']:.0f} tokens")
    best = max(result.completions(2), key=lambda row: row["reward"])
    print(f"best completion of step 2, reward {best['reward']:.2f}: {best['completion']!r}")


if __name__ == "__main__":
    main()
