"""Check whether a model consists only of plain modules, which our kernels can replace.

Adapters, hooks and replaced forward methods run Python code that the kernels do not.
"""

from collections.abc import Sequence

from torch import nn

from expo_fast.modeling.decoder import MLP, Attention, Block, Body, Decoder
from expo_fast.modeling.hooks import has_hooks
from expo_fast.modeling.modules import Embedding, Head, Linear, RMSNorm

OUR_MODULES = (Decoder, Body, Block, Attention, MLP, RMSNorm, Linear, Embedding, Head)
TORCH_MODULES = (nn.Linear, nn.Embedding, nn.ModuleList, nn.Identity)
PLAIN_MODULES = OUR_MODULES + TORCH_MODULES


def is_plain(modules: Sequence[nn.Module]) -> bool:
    """Return whether a forward pass computes only what the classes of a model's modules define."""
    return all(type(module) in PLAIN_MODULES for module in modules) and not has_hooks(modules)
