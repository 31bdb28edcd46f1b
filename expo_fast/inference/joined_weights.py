"""Copies of projections with the same input, concatenated so that one GEMM computes them.

With 256 rows, a projection to a few hundred columns leaves most of a GPU idle. On an H100 the three
GEMMs for queries, keys and values of a 0.5B model took 13 us, although reading their memory takes
only 1 us. The copies belong to the engine. The model's own parameters do not change, so that
checkpoints, PEFT and FSDP work.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expo_fast.modeling.architectures import BEFORE
from expo_fast.modeling.decoder import Block, Decoder
from expo_fast.modeling.shape import Shape


def supports(shape: Shape) -> bool:
    """Return whether `fused_forward` computes a model of this shape.

    Its kernels compute Llama's layer, with or without biases, norms of each head, windows and NoPE.
    """
    scales = (shape.embedding_scale, shape.residual_scale, shape.logit_scale)
    return (
        shape.norms == BEFORE
        and shape.norm_offset == 0
        and shape.activation == "silu"
        and shape.qk_norm != "all heads"
        and shape.rotary_dim == shape.head_dim
        and len(shape.rope_sets) == 1
        and scales == (1, 1, 1)
    )


class JoinedLinear:
    """Linear layers with the same input, computed by one GEMM with concatenated outputs."""

    def __init__(self, parts: Sequence[nn.Linear]):
        self.parts = parts
        self.sizes = [part.out_features for part in parts]
        first = parts[0].weight
        self.weight = first.new_empty(sum(self.sizes), first.shape[1])
        has_bias = parts[0].bias is not None
        self.bias = first.new_empty(sum(self.sizes)) if has_bias else None

    def refresh(self) -> None:
        """Copy the current weights of the parts."""
        torch.cat([part.weight for part in self.parts], out=self.weight)
        if self.bias is not None:
            torch.cat([part.bias for part in self.parts], out=self.bias)

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """Map x (N, D) to the output of each part, (N, size). Outputs are views of one tensor."""
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

    They take 2 bytes for each parameter of the q, k, v, gate and up projections: 0.5 GB for a 0.5B
    model. Their addresses never change, because CUDA graphs depend on them.
    """

    def __init__(self, model: Decoder):
        self.layers: list[JoinedLayer] = []
        for block in model.model.layers:
            assert isinstance(block, Block)
            self.layers.append(JoinedLayer(block))

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the current weights of the model."""
        for layer in self.layers:
            layer.qkv.refresh()
            layer.gate_up.refresh()
