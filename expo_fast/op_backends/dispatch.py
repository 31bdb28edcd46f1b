"""Which kernels run an op: plain PyTorch, C++ on a CPU, or Triton."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from expo_fast.kernels import advantage
from expo_fast.kernels.head import Forward, Gradients, Head, LogProb, Needs, Slopes, SlopesOf
from expo_fast.kernels.reference import PLAIN
from expo_fast.op_backends import cpu, native_library


class Kernels(Protocol):
    """What a backend is: a module or an object with these."""

    def log_probs(self, head: Head, needs: Needs) -> Forward:
        """`needs` is what a backward may ask for; where none is, nothing is kept for it."""
        ...

    def gradients(
        self, head: Head, forward: Forward, slopes: Slopes, needs: Needs
    ) -> Gradients: ...

    def log_probs_and_gradients(
        self, head: Head, slopes: SlopesOf, needs: Needs
    ) -> tuple[LogProb, Gradients]: ...


def choose(name: str | None, head: Head) -> Kernels:
    """The kernels of that name, or the fastest for `head` where it is None.

    Raises ValueError for an unknown name and for a head that the named kernels do not run.
    """
    if name not in (None, *RUNS):
        raise ValueError(f"backend={name!r}: must be None, 'torch', 'native' or 'triton'")
    if name is not None and not runs(name, head):
        hidden, weight = head.hidden, head.weight
        raise ValueError(
            f"backend={name!r} runs {RUNS[name]}, not {hidden.dtype} hidden states on"
            f" {hidden.device} with {weight.dtype} weights on {weight.device}"
        )
    if name == "native" or (name is None and runs("native", head) and compiles()):
        return cpu
    if name == "triton" or (name is None and head.hidden.is_cuda and runs("triton", head)):
        return _triton_kernels(head)
    return PLAIN


def advantages(rewards: Tensor) -> Callable[[Tensor, Tensor, str, float], Tensor]:
    """The kernel for `group_advantage`. Without triton, a GPU's rewards visit the CPU."""
    if rewards.is_cuda:
        try:
            from expo_fast.kernels import groups
        except ImportError:
            return advantage.group_advantage
        return groups.group_advantage
    return advantage.group_advantage


RUNS = {
    "torch": "anything",
    "native": "fp32, bf16 and fp16 on a CPU",
    "triton": "fp32, bf16 and fp16 on a GPU for which triton is installed",
}


def runs(name: str, head: Head) -> bool:
    """Triton's also on a CPU, in its interpreter, where TRITON_INTERPRET=1 was set before it."""
    if name != "triton":
        return name == "torch" or cpu.supports(head)
    if head.dtype != torch.float32 or head.hidden.device != head.weight.device:
        return False
    try:
        from expo_fast.kernels import logprob
    except ImportError:
        return False
    return head.hidden.is_cuda or logprob.INTERPRETED


def _triton_kernels(head: Head) -> Kernels:
    from expo_fast.kernels import logprob, rowwise
    from expo_fast.op_backends import triton_fused

    return triton_fused if logprob.supports(head) else rowwise.ROWWISE


@cache
def compiles(part: str = "ops") -> bool:
    """Whether there are CPU kernels; without, says once that the slower path is taken."""
    try:
        native_library.library(native_library.isa(), part)
    except native_library.Unavailable as why:
        warnings.warn(f"using plain PyTorch, which is slower: {why}", stacklevel=5)
        return False
    return True
