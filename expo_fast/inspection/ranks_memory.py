"""Estimate the memory of one rank of a distributed run, by the number of ranks.

With P parameters, N of which are trained, in W bytes each (2 in bf16), K ranks and T terms of the
loss with gradient sums of their own (2 for expo-grpo and expert-grpo, else 1), a rank has at least

    --shard optimizer   W P           + (4 + 8 + 4 T) N / K   all weights; masters, moments, sums
    --shard model       W P at K = 1 falling to the root unit and two layers while it trains,
                        W P           while it samples        + (4 + 8 + 4 T) N / K

To this come the buffer of one reduction, (4 + 4 / K) bytes for each parameter of the largest unit,
and what does not depend on K: activations of a pack, the key-value cache and libraries.
"""

from collections.abc import Iterator
from typing import Any

import torch

from expo_fast.config import Train
from expo_fast.inspection.machine import GB
from expo_fast.inspection.memory import FP32_BYTES, MOMENTS, MemoryEstimate, n_gradient_terms
from expo_fast.modeling.decoder import Decoder

SHOWN_RANKS = (2, 4, 8)
GATHERS_OF_A_PASS = {"optimizer": 0, "model": 2}  # of the weights: forward and backward


def rank_bytes(config: Train, model_config: Any, estimate: MemoryEstimate, n_ranks: int) -> int:
    """Return the peak of one rank.

    estimate: that of the same run in one process.
    """
    with torch.device("meta"):
        model = Decoder(model_config)
    return _peak(config, model, estimate, n_ranks)


def _peak(config: Train, model: Decoder, estimate: MemoryEstimate, n_ranks: int) -> int:
    terms = n_gradient_terms(config)
    n_trained = estimate.gradients // (FP32_BYTES * terms)
    itemsize = getattr(torch, config.dtype).itemsize
    layers = sum(p.numel() for p in model.model.layers.parameters())
    layer = layers // len(model.model.layers)
    root = sum(p.numel() for p in model.parameters()) - layers
    sharded = (1 + MOMENTS + terms) * FP32_BYTES * n_trained // n_ranks
    unit = n_trained // len(model.model.layers) if config.lora_rank else max(root, layer)
    buffer = (FP32_BYTES + FP32_BYTES / n_ranks) * unit
    fixed = sharded + estimate.runtime
    training_weights = estimate.weights
    if config.shard == "model":
        training_weights -= (layers - 2 * layer) * itemsize
    training = training_weights + buffer + estimate.activations + estimate.head
    sampling = estimate.weights + estimate.kv_cache
    return round(fixed + max(training, sampling))


def ranks_lines(config: Train, model_config: Any, estimate: MemoryEstimate) -> Iterator[str]:
    """Yield a line with the peak of a rank for some numbers of ranks."""
    peaks = []
    with torch.device("meta"):
        model = Decoder(model_config)
    for n_ranks in SHOWN_RANKS:
        peak = _peak(config, model, estimate, n_ranks)
        peaks.append(f"{peak / GB:.2f} GB with {n_ranks}")
    yield f"peak of a rank of torchrun (--shard {config.shard}): {', '.join(peaks)}"


def sent_bytes(config: Train, model: Decoder, n_ranks: int) -> int:
    """Return the bytes that a rank sends for one forward and backward pass and one update.

    Of a tensor that is reduced or gathered, a rank sends all parts but its own.
    """
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    itemsize = getattr(torch, config.dtype).itemsize
    gathers = 1 + GATHERS_OF_A_PASS[config.shard]
    return sum(trained) * (FP32_BYTES + gathers * itemsize) * (n_ranks - 1) // n_ranks
