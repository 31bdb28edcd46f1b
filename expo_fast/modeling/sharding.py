"""FSDP2 for a decoder: the optimizer's state, and on request the weights, sharded over the ranks.

    optimizer   all weights stay in memory; masters, moments and summed gradients are sharded
    model       the weights are sharded too; for forward and backward passes they are gathered
                layer by layer

With `model`, there are two ways to sample:

    weights     all weights are gathered once for each update, and sampled from at full speed
    layers      they are gathered layer by layer for each pass, prompt or token; a rank never has
                more than two layers beside the embedding and the head

A pass of `layers` is a sequence of collectives, so all ranks make the same passes: see `lockstep`.

Each layer is one unit of FSDP, and the embedding, the final norm and the head are another one. The
shards are fp32 and serve as the optimizer's masters. Gradients are summed over the ranks in fp32,
not averaged: the normalisers of the loss are those of the complete batch.

With LoRA only the adapters are sharded. The frozen weights are complete on every rank.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from expo_fast.distributed.world import (
    ALONE,
    World,
    copy_complete,
    local_part,
    within_collectives,
)
from expo_fast.kernels.integers import ceil_div
from expo_fast.modeling.attention import PackedAttention
from expo_fast.modeling.decoder import Attend, Decoder, plain_decoder
from expo_fast.modeling.layout import Layout
from expo_fast.modeling.packing import Pack, Sample, forward, pack

ShardKind = Literal["optimizer", "model"]
GatherKind = Literal["weights", "layers"]
ELEMENTS_OF_A_GATHER = 2**25  # of parameters that are gathered together, to bound the copies


@dataclass(frozen=True)
class Place:
    """The ranks of a run, and where each one has its weights."""

    world: World
    gather: GatherKind = "weights"
    """What a rank gathers to sample, if the weights are sharded."""
    device: torch.device | None = None
    """Device of the sharded weights; None: that of the model. A model on the CPU is moved unit by
    unit, so that the device need not hold all of it."""


ONE_PROCESS = Place(ALONE)


@dataclass(frozen=True)
class Weight:
    """A parameter, and this rank's rows of it in fp32, as FSDP divides them."""

    complete: Tensor
    shard: Tensor

    def padded_part(self, n_ranks: int) -> int:
        """Return the most elements that a rank has. The last ranks may have fewer rows."""
        n_rows = ceil_div(len(self.complete), n_ranks)
        return n_rows * (self.complete.numel() // len(self.complete))


class Sharded(Layout):
    """The layout of a model over the ranks of a distributed run. It changes the model in place."""

    def __init__(self, model: Decoder, place: Place, kind: ShardKind):
        super().__init__(model)
        self.world = place.world
        self.kind = kind
        self._by_layer = place.gather == "layers"
        self._dtype = model.dtype
        self._shard(place.device or model.device)
        self._shards = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._is_plain = len(self._shards) == len(dict(model.named_parameters()))
        self._resident = False
        self._in_lockstep = False
        self._sampling_model = model
        if self._by_layer:
            self._unshard_root()
            self._run_in_lockstep()
        else:
            self._unshard()
            if self._is_plain:
                self._sampling_model = plain_view(model)

    @property
    def sampling_model(self) -> Decoder:
        return self._sampling_model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._shards.items()

    @property
    def rounded_to(self) -> torch.dtype | None:
        return self._dtype

    @property
    def has_all_weights(self) -> bool:
        return not self._by_layer

    @property
    def moves_weights(self) -> bool:
        return self.kind == "model"

    def _shard(self, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import (
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        model = self.model
        mesh = init_device_mesh(device.type, (self.world.size,))
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
        register_fsdp_forward_method(model, "run")
        if self.kind == "optimizer":
            # The weights keep their addresses, which the CUDA graphs of the generator contain.
            self._units()[0].set_reshard_after_backward(False)

    def _units(self) -> list:
        """Return the units of FSDP, the root first."""
        from torch.distributed.fsdp import FSDPModule

        return [module for module in self.model.modules() if isinstance(module, FSDPModule)]

    def _unshard_root(self) -> None:
        """Gather the embedding, the final norm and the head."""
        root = self._units()[0]
        root.reshard()
        root.unshard()

    def _run_in_lockstep(self) -> None:
        """Make passes without gradients those of all ranks, see `lockstep`."""
        model = self.model
        for unit, following in pairwise(self._units()):
            unit.set_modules_to_forward_prefetch([following])
        self._run = model.run
        model.run = self._run_with_others
        model.lockstep = self.lockstep
        model.gathers_by_layer = True

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        """Let each rank make as many passes without gradients in this block as it needs.

        Before each pass, a rank tells the others that it makes one. A rank that has reached the
        end of the block makes passes of one token, until all ranks have reached it. All ranks have
        to enter the block, also without a pass of their own.
        """
        self._in_lockstep = True
        try:
            yield
            while any(self.world.exchange(False)):
                self._pass_of_one_token()
        finally:
            self._in_lockstep = False

    def _run_with_others(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Return what `Decoder.run` returns. A pass without gradients is one of all ranks."""
        if torch.is_grad_enabled():  # `passes` sees to it that all ranks make the same
            return self._run(tokens, positions, attend)
        assert self._in_lockstep, "a pass without gradients outside lockstep"
        self.world.exchange(True)
        with within_collectives():
            return self._run(tokens, positions, attend)

    @torch.no_grad()
    def _pass_of_one_token(self) -> None:
        """Take part in the gathers of a pass of another rank."""
        token = torch.zeros(1, dtype=torch.int64, device=self.model.device)
        boundaries = torch.tensor([0, 1], dtype=torch.int32)
        attention = PackedAttention(boundaries, torch.tensor([-1]), token.device)
        with within_collectives():
            self._run(token, token, attention)

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
        if self._by_layer:
            self._unshard_root()
            return
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
        """Copy this rank's parts of the model's gathered weights to the shards."""
        parameters = dict(self.model.named_parameters())
        for name, shard in self._shards.items():
            if parameters[name] is not shard:
                copy_complete(parameters[name], shard)

    @torch.no_grad()
    def model_to_write(self) -> Decoder:
        if not self._by_layer:
            return self.model
        layers = self._units()[1:]
        weights = copy_on_cpu(self.model) if self.world.is_main else {}
        names = {module: name for name, module in self.model.named_modules()}
        for layer in layers:
            layer.unshard()
            if self.world.is_main:
                for name, tensor in copy_on_cpu(layer).items():
                    weights[f"{names[layer]}.{name}"] = tensor
            layer.reshard()
        if not self.world.is_main:
            return self.model
        return plain_decoder(self.model, weights, trainable=True)


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
    return plain_decoder(model, dict(model.named_parameters()), trainable=True)


def copy_on_cpu(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the gathered parameters of a module, by their names."""
    copies = {}
    for name, parameter in module.named_parameters():
        if local_part(parameter) is parameter:
            copies[name] = parameter.detach().to("cpu", copy=True)
    return copies
