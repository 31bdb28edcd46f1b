"""FSDP2 for a decoder: the optimizer's state, and on request the weights, sharded over the ranks.

    optimizer   all weights stay in memory; masters, moments and summed gradients are sharded
    model       the weights are sharded too; they are gathered once for each update to sample from,
                and layer by layer for forward and backward passes

Each layer is one unit of FSDP, and the embedding, the final norm and the head are another one. The
shards are fp32 and serve as the optimizer's masters. Gradients are summed over the ranks in fp32,
not averaged: the normalisers of the loss are those of the complete batch.

With LoRA only the adapters are sharded. The frozen weights are complete on every rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from expo_fast.distributed.world import World, local_part
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.layout import Layout
from expo_fast.modeling.packing import Pack, Sample, forward, pack

ShardKind = Literal["optimizer", "model"]
ELEMENTS_OF_A_GATHER = 2**25  # of parameters that are gathered together, to bound the copies


@dataclass(frozen=True)
class Weight:
    """A parameter, and this rank's rows of it in fp32, as FSDP divides them."""

    complete: Tensor
    shard: Tensor

    def padded_part(self, n_ranks: int) -> int:
        """Return the most elements that a rank has. The last ranks may have fewer rows."""
        n_rows = -(-len(self.complete) // n_ranks)
        return n_rows * (self.complete.numel() // len(self.complete))


class Sharded(Layout):
    """The layout of a model over the ranks of a distributed run. It changes the model in place."""

    def __init__(self, model: Decoder, world: World, kind: ShardKind):
        super().__init__(model)
        self.world = world
        self.kind = kind
        self._dtype = model.dtype
        self._shard()
        self._shards = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._is_plain = len(self._shards) == len(dict(model.named_parameters()))
        self._resident = False
        self._unshard()
        self._plain = plain_view(model) if self._is_plain else model

    @property
    def sampling_model(self) -> Decoder:
        return self._plain

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._shards.items()

    @property
    def rounded_to(self) -> torch.dtype | None:
        return self._dtype

    @property
    def moves_weights(self) -> bool:
        return self.kind == "model"

    def _shard(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import (
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        model = self.model
        mesh = init_device_mesh(model.device.type, (self.world.size,))
        policy = MixedPrecisionPolicy(
            param_dtype=self._dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        frozen = {p for p in model.parameters() if not p.requires_grad}
        for unit in [*model.model.layers, model]:
            as_fp32(unit)
            sharded = fully_shard(
                unit,
                mesh=mesh,
                mp_policy=policy,
                # The head is used after the root's forward pass.
                reshard_after_forward=self.kind == "model" and unit is not model,
                ignored_params=frozen,
            )
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
        register_fsdp_forward_method(model, "hidden")
        if self.kind == "optimizer":
            # The weights keep their addresses, which the CUDA graphs of the generator contain.
            self._units()[0].set_reshard_after_backward(False)

    def _units(self) -> list:
        """Return the units of FSDP, the root first."""
        from torch.distributed.fsdp import FSDPModule

        return [module for module in self.model.modules() if isinstance(module, FSDPModule)]

    def _unshard(self) -> None:
        """Gather all weights, and keep them after forward passes."""
        root, *layers = self._units()
        for layer in layers:
            layer.set_reshard_after_forward(False)
        for unit in (root, *layers):
            unit.unshard()
        self._resident = True

    def _reshard(self) -> None:
        """Free the gathered weights. Each layer is gathered for its own passes from now on."""
        root, *layers = self._units()
        for layer in layers:
            layer.set_reshard_after_forward(True)
        for unit in (root, *layers):
            unit.reshard()
        self._resident = False

    def passes(
        self,
        samples: Sequence[Sample],
        max_tokens: int,
        *,
        together: int = 1,
    ) -> Iterator[tuple[Pack, Tensor]]:
        """Yield what `packing.forward` yields, for backward passes.

        samples: those of this rank.

        A backward pass communicates, so all ranks make an equal number of them. A rank with fewer
        packs than another makes passes without a sample at the end.
        """
        if self.kind == "model" and self._resident:
            self._reshard()
        n_own = sum(1 for _ in pack(samples, max_tokens, together=together))
        n_passes = max(self.world.exchange(n_own))
        yield from forward(self.model, samples, max_tokens, together=together)
        for _ in range(n_passes - n_own):
            self._empty_pass()

    def _empty_pass(self) -> None:
        """Run a forward and a backward pass whose gradients are all 0."""
        model = self.model
        token = torch.zeros(1, dtype=torch.int64, device=model.device)
        boundaries = torch.tensor([0, 1], dtype=torch.int32)
        hidden = model.hidden(token, token, boundaries, torch.tensor([-1]))
        outputs = [hidden]
        if model.head_weight.requires_grad:
            outputs.append(model.head_weight)
        torch.autograd.backward(outputs, [torch.zeros_like(x) for x in outputs])

    @torch.no_grad()
    def gather(self) -> None:
        """Make the model's weights those of the shards, rounded to their dtype."""
        if self.kind == "model":
            if self._resident:
                self._reshard()  # only FSDP gathers all parameters of a unit at once
            self._unshard()
            return
        parameters = dict(self.model.named_parameters())
        batch: list[Weight] = []
        n_elements = 0
        for name, shard in self._shards.items():
            batch.append(Weight(parameters[name], local_part(shard)))
            n_elements += parameters[name].numel()
            if n_elements >= ELEMENTS_OF_A_GATHER:
                self._gather_rounded(batch)
                batch = []
                n_elements = 0
        if batch:
            self._gather_rounded(batch)

    def _gather_rounded(self, batch: Sequence[Weight]) -> None:
        """Write the shards of all ranks to some parameters, by one collective."""
        size = self.world.size
        sizes = [weight.padded_part(size) for weight in batch]
        own = batch[0].complete.new_zeros(sum(sizes))
        for weight, part in zip(batch, own.split(sizes), strict=True):
            part[: weight.shard.numel()].copy_(weight.shard.flatten())
        gathered = own.new_empty(size, len(own))
        torch.distributed.all_gather(list(gathered), own)
        for weight, parts in zip(batch, gathered.split(sizes, dim=1), strict=True):
            complete = weight.complete
            complete.copy_(parts.flatten()[: complete.numel()].view_as(complete))

    @torch.no_grad()
    def take(self) -> None:
        """Copy this rank's parts of the model's weights to the shards."""
        parameters = dict(self.model.named_parameters())
        for name, shard in self._shards.items():
            local_part(shard).copy_(self._part(parameters[name]))

    def _part(self, tensor: Tensor) -> Tensor:
        """Return the rows of a tensor that this rank has, as FSDP divides them."""
        parts = tensor.chunk(self.world.size)
        rank = self.world.rank
        return parts[rank] if rank < len(parts) else tensor[:0]


def as_fp32(module: nn.Module) -> None:
    """Convert the trainable parameters that are not sharded yet to fp32, in place."""
    for parameter in module.parameters():
        if parameter.requires_grad and local_part(parameter) is parameter:
            parameter.data = parameter.data.float()


def plain_view(model: Decoder) -> Decoder:
    """Return a plain model that shares the parameters of a model with hooks of FSDP.

    The parameters of `model` must be gathered. FSDP keeps the same parameters, and only their
    memory is freed and filled again.
    """
    with torch.device("meta"):
        plain = Decoder(model.stored_config)
    plain.load_state_dict(dict(model.named_parameters()), assign=True)
    plain.inv_freq = model.inv_freq
    plain.generation_config = model.generation_config
    return plain
