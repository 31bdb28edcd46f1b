"""Find modules whose call runs more than the forward method of their class."""

from collections.abc import Iterable

from torch import nn
from torch.nn.modules import module as torch_module

# in a module's own attributes
FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "forward")
ALL_HOOKS = (*FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")


def has_hooks(modules: Iterable[nn.Module], names: tuple[str, ...] = FORWARD_HOOKS) -> bool:
    """Return whether any module has hooks or a `forward` set on the instance.

    names: the attributes that are looked for.
    """
    if any(getattr(torch_module, "_global" + name) for name in names if name.endswith("_hooks")):
        return True
    for module in modules:
        attributes = vars(module)
        if any(attributes.get(name) for name in names):
            return True
    return False
