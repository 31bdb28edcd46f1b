"""Train LoRA adapters, and load them again.

    python examples/lora.py

Every method trains adapters with --lora-rank. A checkpoint is an adapter of PEFT, which
AutoPeftModelForCausalLM.from_pretrained loads too if its base can be downloaded from the hub.
"""

import tempfile

from expo_fast.config import Train
from expo_fast.generate import Generator, Request
from expo_fast.train import TrainResult, run
from expo_fast.weights import load_model


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = Train(
            method="sft",
            lora_rank=8,
            lora_alpha=16.0,
            shots=0,
            learning_rate=1e-3,
            prompts_per_step=4,
            steps=6,
            eval_every=0,
            output_dir=folder,
        )
        show(run(config))


def show(result: TrainResult) -> None:
    losses = [round(row["loss"], 3) for row in result.metrics]
    print(f"losses of the steps: {losses}")
    parameters = list(result.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    print(f"trained {trained:,} of {sum(p.numel() for p in parameters):,} parameters")

    assert result.model_path is not None
    for file in sorted(result.model_path.glob("adapter_*")):
        print(f"{file.name}: {file.stat().st_size / 1e6:.3f} MB")
    model, tokenizer = load_model(result.model_path)  # the base with the adapter merged
    question = "Tom has 12 pens and buys 7 more. How many pens does he have?"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        tokenize=False,
        add_generation_prompt=True,
    )
    request = Request(tokenizer(prompt).input_ids, max_new_tokens=40, temperature=0)
    (completion,) = Generator(model).sample([request])
    print(tokenizer.decode(completion.token_ids))


if __name__ == "__main__":
    main()
