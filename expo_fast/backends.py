"""Which kernels run an op: plain PyTorch, C++ on a CPU, or Triton."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Protocol

from torch import Tensor

from expo_fast import native
from expo_fast.kernels import reference
from expo_fast.kernels.reference import Gradients, Head, LogProb, Needs, Slopes


class Kernels(Protocol):
    """What a backend is: a module with these. Results may be wider than the logits."""

    def log_probs(self, head: Head) -> LogProb: ...

    def gradients(
        self, head: Head, results: LogProb, slopes: Slopes, needs: Needs
    ) -> Gradients: ...

    def log_probs_and_gradients(
        self, head: Head, slopes: Callable[[slice, Tensor], Slopes], needs: Needs
    ) -> tuple[LogProb, Gradients]: ...


def choose(name: str | None, head: Head) -> Kernels:
    """The kernels of that name, or the fastest for `head` where it is None.

    Raises ValueError for an unknown name and for a head that the named kernels do not run.
    """
    if name == "triton":
        raise ValueError("backend='triton' is not built yet: use None, 'torch' or 'native'")
    if name not in (None, "torch", "native"):
        raise ValueError(f"backend={name!r}: must be None, 'torch', 'native' or 'triton'")
    supported = native.supports(head)
    if name == "native" and not supported:
        raise ValueError(
            f"backend='native' runs fp32, bf16 and fp16 on a CPU, not {head.hidden.dtype} hidden"
            f" states on {head.hidden.device} with {head.weight.dtype} weights"
        )
    if name == "torch" or not supported or (name is None and not _compiles()):
        return reference
    return native


@cache
def _compiles() -> bool:
    """Whether there are CPU kernels; without, says once that the slower path is taken."""
    try:
        native.library(native.isa())
    except native.Unavailable as why:
        warnings.warn(f"using plain PyTorch, which is slower: {why}", stacklevel=5)
        return False
    return True
