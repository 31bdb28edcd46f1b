"""Choose the size of packs from a budget of memory."""

from dataclasses import replace
from typing import Any

import torch

from expo_fast.config import Train
from expo_fast.inspection.machine import GB
from expo_fast.inspection.memory import activation_bytes
from expo_fast.modeling.packing import Sample, pack
from expo_fast.weights import load_structure

COUNTED_TOKENS = 1024  # of the pack whose activations are counted; they grow in proportion


def with_pack_tokens(config: Train) -> Train:
    """Return the configuration with the tokens of a pack that --pack-memory allows.

    They follow from options, the model's shape and the operations that run. A resume takes the
    number of the run's record. The directory of the run is the same as before. A configuration
    with `pack_tokens` is returned as it is. Raise the errors of `load_structure`.
    """
    if config.pack_tokens:
        return config
    model, _ = load_structure(config.model)
    tokens = tokens_within(config, model.stored_config)
    return replace(config, pack_tokens=tokens, output_dir=str(config.run_dir))


def tokens_within(config: Train, model_config: Any) -> int:
    """Return the most tokens of a pack whose activations need at most `config.pack_memory` GB.

    model_config: a transformers config or a `StoredConfig`.
    """
    sample = Sample(prompt_ids=(0,), completion_ids=(0,) * COUNTED_TOKENS)
    (given,) = pack([sample], COUNTED_TOKENS)
    dtype = getattr(torch, config.dtype)
    kept = activation_bytes(config, model_config, dtype, given)
    return max(1, int(config.pack_memory * GB * len(given.tokens) / kept))
