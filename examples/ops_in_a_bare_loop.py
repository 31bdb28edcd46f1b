"""Use the ops in a loop of your own, with a model of transformers.

    python examples/ops_in_a_bare_loop.py

The loop raises the likelihood of one answer and lowers that of another by a policy loss. No logits
are stored: the model returns hidden states, and the op computes the loss and its gradients.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from expo_fast.ops import Clipped, group_advantage, linear_logprob, linear_policy_loss
from expo_fast.weights import find_model

PROMPT = "The colour of the sky is"
ANSWERS = (" blue.", " green.")
REWARDS = (1.0, 0.0)
IGNORE = -100


def main() -> None:
    torch.manual_seed(0)
    folder = find_model("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    prompt = tokenizer(PROMPT).input_ids
    completions = [tokenizer(answer, add_special_tokens=False).input_ids for answer in ANSWERS]
    advantage = group_advantage(torch.tensor(REWARDS), torch.zeros(len(ANSWERS), dtype=torch.long))

    # One sequence for each answer, padded at the end. A row predicts the next token, so the last
    # row of a sequence has no target, and neither has a row inside the prompt.
    longest = len(prompt) + max(map(len, completions))
    ids = torch.zeros(len(ANSWERS), longest, dtype=torch.long)
    targets = torch.full_like(ids, IGNORE)
    for row, completion in enumerate(completions):
        tokens = torch.tensor(prompt + completion)
        ids[row, : len(tokens)] = tokens
        targets[row, len(prompt) - 1 : len(tokens) - 1] = tokens[len(prompt) :]
    active = targets != IGNORE
    row_weight = active / active.sum()  # a mean over all tokens, as DAPO

    old_logp = None  # in the first step, the policy is the one that sampled
    for step in range(5):
        hidden = model.model(ids).last_hidden_state  # (B, T, D)
        logp = linear_logprob(hidden.detach(), model.lm_head.weight.detach(), targets).logp
        result = linear_policy_loss(
            hidden.flatten(0, 1),
            model.lm_head.weight,
            targets.flatten(),
            advantage[:, None].expand_as(ids).flatten(),
            row_weight.flatten(),
            objective=Clipped(low=0.2, high=0.2),
            old_logp=old_logp,
        )
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        old_logp = logp.flatten() if old_logp is None else old_logp
        sums = logp.sum(dim=1).tolist()
        texts = [f"{answer!r} {total:.2f}" for answer, total in zip(ANSWERS, sums, strict=True)]
        print(f"step {step + 1}: log-probs {', '.join(texts)} nats")


if __name__ == "__main__":
    main()
