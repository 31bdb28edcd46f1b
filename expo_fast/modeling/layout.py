"""Where the weights, masters and gradients of a model are: in one process, or sharded by FSDP2.

`Layout` is that of one process: everything is in the model. `sharding.Sharded` has the same methods
for a distributed run.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from expo_fast.distributed.world import ALONE, World
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.packing import Pack, Sample, forward


class Layout:
    """The layout of a model in one process."""

    world: World = ALONE

    def __init__(self, model: Decoder):
        self.model = model

    @property
    def sampling_model(self) -> Decoder:
        """A plain model with the same weights, to sample from."""
        return self.model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that the optimizer updates, or this rank's parts of them."""
        return self.model.named_parameters()

    @property
    def rounded_to(self) -> torch.dtype | None:
        """The dtype of the weights that `gather` makes of the optimizer's fp32 weights.

        None: the optimizer itself writes the weights.
        """
        return None

    @property
    def has_all_weights(self) -> bool:
        """Whether `sampling_model` has all weights, also after the ranks have ended."""
        return True

    @property
    def moves_weights(self) -> bool:
        """Whether `gather` may give the weights other addresses."""
        return False

    def passes(
        self,
        samples: Sequence[Sample],
        max_tokens: int,
        *,
        together: int = 1,
    ) -> Iterator[tuple[Pack, Tensor]]:
        """Return what `packing.forward` yields, for backward passes."""
        return forward(self.model, samples, max_tokens, together=together)

    def gather(self) -> None:
        """Make the model's weights those of the optimizer."""

    def take(self) -> None:
        """Make the optimizer's fp32 weights those of the model, after weights were loaded."""

    def model_to_write(self) -> Decoder:
        """Return the model with all weights, for the main rank to write.

        All ranks have to call it. The other ranks may get a model without all weights.
        """
        return self.model
