"""Log-probs of given completions, without gradients."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expo_fast.config import Train
from expo_fast.data.chat_template import TokenIds
from expo_fast.distributed.world import Deal, World
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.lora import switched_off
from expo_fast.modeling.packing import Sample, forward
from expo_fast.ops import linear_logprob


@dataclass(frozen=True)
class ForwardOptions:
    """Options of all forward passes, with and without gradients."""

    temperature: float = 1.0
    """Log-probs are those of the logits divided by it."""
    max_tokens: int = 4096
    """Most tokens in one pass. It does not change the result."""

    @classmethod
    def of(cls, config: Train) -> "ForwardOptions":
        return cls(temperature=config.temperature, max_tokens=config.pack_tokens)


@dataclass(frozen=True)
class KnownLogprobs:
    """Log-probs of completions under the weights of one step, so that each is computed once."""

    values: dict[tuple[TokenIds, TokenIds], Tensor] = field(default_factory=dict)
    """By the token ids of prompt and completion: (len(completion_ids),) fp32, in nats."""

    def add(self, samples: Sequence[Sample], logprobs: Sequence[Tensor]) -> None:
        """Add the log-probs of the samples' completions."""
        for sample, values in zip(samples, logprobs, strict=True):
            # A copy: exchanged between ranks, a view would be sent with all of its memory.
            self.values[sample.prompt_ids, sample.completion_ids] = values.clone()

    def of(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Return the log-probs of samples that are all known."""
        return [self.values[sample.prompt_ids, sample.completion_ids] for sample in samples]

    def missing(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the samples that are not known, each text once, in their order."""
        missing: dict[tuple[TokenIds, TokenIds], Sample] = {}
        for sample in samples:
            text = (sample.prompt_ids, sample.completion_ids)
            if text not in self.values:
                missing.setdefault(text, sample)
        return list(missing.values())


@torch.no_grad()
def completion_logprobs(
    model: Decoder, samples: Sequence[Sample], options: ForwardOptions
) -> list[Tensor]:
    """Return the log-probs of each sample's completion tokens under the model.

    Each sample gets an fp32 tensor of shape (len(completion_ids),), in nats, on the CPU.
    """
    logprobs: list[Tensor] = [torch.empty(0)] * len(samples)
    results = []
    with model.lockstep():
        for pack, hidden in forward(model, samples, options.max_tokens):
            result = linear_logprob(
                hidden,
                model.head_weight,
                pack.targets,
                temperature=options.temperature,
                complete=pack.has_targets_below(len(model.head_weight)),
            )
            results.append((pack, result.logp))
    # Copy to the CPU once per pack, not per sample, after the work of all packs is queued.
    for pack, logp in results:
        for i, values in pack.split(logp.cpu()):
            logprobs[i] = values
    return logprobs


def logprobs_of_all_ranks(
    world: World, model: Decoder, samples: Sequence[Sample], options: ForwardOptions
) -> list[Tensor]:
    """Return `completion_logprobs`, of which each rank computes a part."""
    deal = deal_samples(world, samples)
    with world.agreed():
        own = completion_logprobs(model, deal.own(samples), options)
    return deal.collect(own)


def deal_samples(world: World, samples: Sequence[Sample]) -> Deal:
    """Return which rank computes the log-probs of which sample."""
    costs = [len(each.prompt_ids) + len(each.completion_ids) for each in samples]
    return world.deal(costs)


def reference_logprobs(
    model: Decoder,
    reference: Decoder | None,
    samples: Sequence[Sample],
    options: ForwardOptions,
) -> list[Tensor]:
    """Return `completion_logprobs` under the initial policy.

    reference: its frozen copy. None: the model with its LoRA adapter switched off.
    """
    if reference is not None:
        return completion_logprobs(reference, samples, options)
    with switched_off(model):
        return completion_logprobs(model, samples, options)


def sequence_logprobs(logprobs: Sequence[Tensor]) -> Tensor:
    """Return the sum of each sequence's token log-probs: (S,) fp32, in nats."""
    return torch.stack([values.sum() for values in logprobs])
