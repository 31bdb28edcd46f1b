"""Copies of projections that read the same input, joined so that one product computes them.

At 256 rows a projection to a few hundred columns leaves most of a GPU idle: on an H100 the three
products for queries, keys and values of a 0.5B model took 13 us, of which memory needs 1. The
copies belong to the engine. The model's own parameters stay as they are, for checkpoints, PEFT and
FSDP.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expo_fast.modeling.decoder import Block, Decoder


class JoinedLinear:
    """Linear layers of one input, as one product whose outputs are side by side."""

    def __init__(self, parts: Sequence[nn.Linear]):
        self.parts = parts
        self.sizes = [part.out_features for part in parts]
        first = parts[0].weight
        self.weight = first.new_empty(sum(self.sizes), first.shape[1])
        has_bias = parts[0].bias is not None
        self.bias = first.new_empty(sum(self.sizes)) if has_bias else None

    def refresh(self) -> None:
        """Copy the parts' weights of the moment."""
        torch.cat([part.weight for part in self.parts], out=self.weight)
        if self.bias is not None:
            torch.cat([part.bias for part in self.parts], out=self.bias)

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """Map x (N, D) to each part's output, (N, size), which are columns of one tensor."""
        return F.linear(x, self.weight, self.bias).split(self.sizes, dim=1)


class JoinedLayer:
    """The joined projections of one layer."""

    def __init__(self, block: Block):
        attention = block.self_attn
        mlp = block.mlp
        self.qkv = JoinedLinear([attention.q_proj, attention.k_proj, attention.v_proj])
        self.gate_up = JoinedLinear([mlp.gate_proj, mlp.up_proj])


class JoinedWeights:
    """The joined projections of a plain model.

    They take 2 bytes for each parameter of the queries, keys, values, gates and ups: 0.5 GB for a
    0.5B model. They keep their addresses, on which CUDA graphs rely.
    """

    def __init__(self, model: Decoder):
        self.layers: list[JoinedLayer] = []
        for block in model.model.layers:
            assert isinstance(block, Block)
            self.layers.append(JoinedLayer(block))

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the model's weights of the moment."""
        for layer in self.layers:
            layer.qkv.refresh()
            layer.gate_up.refresh()
