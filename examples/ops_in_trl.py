"""Use the ops in TRL: a GRPOTrainer whose loss stores no logits.

    python examples/ops_in_trl.py

Sampling, rewards, advantages and logging stay TRL's. `_compute_loss` is replaced; the first batch
also runs TRL's own, to compare both losses.
"""

import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from expo_fast.ops import Clipped, linear_policy_loss
from expo_fast.weights import find_model

IGNORE = -100


def more_digits(completions, **columns):
    """Reward digits, so that the rewards of a group differ."""
    return [sum(letter.isdigit() for letter in text) / 10 for text in completions]


class FusedGRPOTrainer(GRPOTrainer):
    """GRPO with the loss of expo_fast. It supports loss_type="dapo" without a KL term."""

    compared = False

    def _compute_loss(self, model, inputs):
        completion_ids = inputs["completion_ids"]
        mask = inputs["completion_mask"]
        ids = torch.cat([inputs["prompt_ids"], completion_ids], dim=1)
        attention = torch.cat([inputs["prompt_mask"], mask], dim=1)
        plain = self.accelerator.unwrap_model(model)
        hidden = plain.model(input_ids=ids, attention_mask=attention).last_hidden_state
        n_tokens = completion_ids.shape[1]
        hidden = hidden[:, -n_tokens - 1 : -1]  # the rows that predict a completion's tokens

        # TRL divides the sum over tokens by those of all processes and accumulation steps.
        n_items = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        windows = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        old_logp = inputs.get("old_per_token_logps")
        result = linear_policy_loss(
            hidden.flatten(0, 1),
            plain.lm_head.weight,
            completion_ids.masked_fill(mask == 0, IGNORE).flatten(),
            inputs["advantages"][:, None].expand_as(mask).flatten(),
            (mask / (n_items * windows)).flatten(),
            objective=Clipped(self.epsilon_low, self.epsilon_high),
            old_logp=None if old_logp is None else old_logp.flatten(),
            temperature=self.temperature,
        )
        if not self.compared:
            self.compared = True
            with torch.no_grad():
                theirs = super()._compute_loss(model, inputs)
            print(f"loss of TRL {theirs.item():.6f}, of expo_fast {result.loss.item():.6f}")
        return result.loss


def main() -> None:
    folder = find_model("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [f"Write a number with {n} digits." for n in range(2, 6)]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        loss_type="dapo",
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=16,
        max_steps=2,
        learning_rate=1e-6,
        logging_steps=1,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
    )
    trainer = FusedGRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=more_digits,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
    )
    trainer.train()
    rewards = [round(row["reward"], 3) for row in trainer.state.log_history if "reward" in row]
    print(f"rewards of the steps: {rewards}")


if __name__ == "__main__":
    main()
