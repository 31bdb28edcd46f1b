"""Check whether a model consists only of plain modules, which our kernels can replace.

Adapters, hooks and replaced forward methods run Python code that the kernels do not.
"""

from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.modules import module as torch_module

from expo_fast.modeling.decoder import (
    MLP,
    Attention,
    Block,
    Body,
    Decoder,
    Embedding,
    Head,
    Linear,
    RMSNorm,
)

OUR_MODULES = (Decoder, Body, Block, Attention, MLP, RMSNorm, Linear, Embedding, Head)
TORCH_MODULES = (nn.Linear, nn.Embedding, nn.ModuleList, nn.Identity)
PLAIN_MODULES = OUR_MODULES + TORCH_MODULES
OVERRIDES = ("_forward_hooks", "_forward_pre_hooks", "forward")  # in a module's own attributes


def is_plain(modules: Sequence[nn.Module]) -> bool:
    """Return whether a forward pass computes only what the classes of a model's modules define."""
    return all(type(module) in PLAIN_MODULES for module in modules) and not has_hooks(modules)


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Return whether any module has hooks or a `forward` set on the instance."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    for module in modules:
        attributes = vars(module)
        if any(attributes.get(name) for name in OVERRIDES):
            return True
    return False
