"""Use the ops in transformers' Trainer, for SFT without logits.

    python examples/ops_in_hf_trainer.py

`compute_loss` is replaced. The first batch also runs the model's own loss, to compare both.
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from expo_fast.ops import linear_logprob
from expo_fast.weights import find_model

IGNORE = -100
TEXTS = (
    "Water freezes at zero degrees Celsius.",
    "A week has seven days.",
    "Bees make honey.",
    "The sun rises in the east.",
    "Ice is lighter than water.",
    "Spiders have eight legs.",
    "Paper is made from wood.",
    "Salt dissolves in water.",
)


class FusedTrainer(Trainer):
    """A Trainer whose cross-entropy is computed from hidden states."""

    compared = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        plain = self.accelerator.unwrap_model(model)
        outputs = plain.model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
        )
        nothing = torch.full_like(labels[:, :1], IGNORE)
        targets = torch.cat([labels[:, 1:], nothing], dim=1)  # a row predicts the next token
        logp = linear_logprob(outputs.last_hidden_state, plain.lm_head.weight, targets).logp
        divisor = num_items_in_batch
        if divisor is None:
            divisor = (targets != IGNORE).sum()
        loss = -logp.sum() / divisor
        if not self.compared:
            self.compared = True
            with torch.no_grad():
                theirs = plain(**inputs, num_items_in_batch=num_items_in_batch).loss
            print(f"loss of transformers {theirs.item():.6f}, of expo_fast {loss.item():.6f}")
        return (loss, outputs) if return_outputs else loss


def main() -> None:
    folder = find_model("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    encoded = tokenizer(list(TEXTS), padding=True)
    rows = []
    for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True):
        labels = [token if shown else IGNORE for token, shown in zip(ids, mask, strict=True)]
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=4,
        max_steps=6,
        learning_rate=3e-5,
        logging_steps=2,  # an epoch
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
    )
    trainer = FusedTrainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [round(row["loss"], 3) for row in trainer.state.log_history if "loss" in row]
    print(f"losses of the epochs: {losses}")


if __name__ == "__main__":
    main()
