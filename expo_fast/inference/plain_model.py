"""Check whether a model consists only of plain modules, which our kernels can replace.

Adapters, hooks and replaced forward methods run Python code that the kernels do not.
"""

from torch import nn
from torch.nn.modules import module as torch_module

from expo_fast.modeling.decoder import MLP, Attention, Block, Body, Decoder, Linear, RMSNorm

OUR_MODULES = (Decoder, Body, Block, Attention, MLP, RMSNorm, Linear)
TORCH_MODULES = (nn.Linear, nn.Embedding, nn.ModuleList, nn.Identity)
PLAIN_MODULES = OUR_MODULES + TORCH_MODULES
OVERRIDES = ("_forward_hooks", "_forward_pre_hooks", "forward")  # in a module's own attributes


def is_plain(model: Decoder) -> bool:
    """Return whether a forward pass computes only what the classes of the modules define."""
    for module in model.modules():
        if type(module) not in PLAIN_MODULES:
            return False
    return not has_hooks(model)


def has_hooks(model: Decoder) -> bool:
    """Return whether any module has hooks or a `forward` set on the instance."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    for module in model.modules():
        attributes = vars(module)
        if any(attributes.get(name) for name in OVERRIDES):
            return True
    return False
