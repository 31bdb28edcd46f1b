"""Choose the kernels that run an op.

"torch"   PyTorch: any device and dtype
"native"  C++ on a CPU
"triton"  Triton on a GPU, or in its interpreter on a CPU
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from expo_fast.kernels import advantage, objectives
from expo_fast.kernels.head import Forward, Gradients, Head, LogProb, Needs, RowGrads, RowwiseLoss
from expo_fast.kernels.objectives import PolicyLossOfRows, PolicyTerms
from expo_fast.kernels.reference import PLAIN
from expo_fast.op_backends import cpu, native_library

BACKENDS = {  # the dtypes and devices that each backend runs
    "torch": "anything",
    "native": "fp32, bf16 and fp16 on a CPU",
    "triton": "fp32, bf16 and fp16 on a GPU with triton installed",
}


class Kernels(Protocol):
    """The interface of a backend, which is a module or an object."""

    def log_probs(self, head: Head, needs: Needs) -> Forward:
        """Return the results, and the tensors that the gradients in `needs` are computed from."""
        ...

    def gradients(
        self, head: Head, forward: Forward, row_grads: RowGrads, needs: Needs
    ) -> Gradients:
        """Return the gradients, given `log_probs(head, needs)` of the same head."""
        ...


class OnePassKernels(Kernels, Protocol):
    """A backend that can compute a chunk's gradients while the chunk's logits are in memory.

    That takes one GEMM less than `log_probs` and `gradients`, if these do not keep the logits.
    """

    def log_probs_and_gradients(
        self, head: Head, loss: RowwiseLoss, needs: Needs
    ) -> tuple[LogProb, Gradients]:
        """Return results and gradients of a loss whose rows are independent."""
        ...


def has_one_pass(kernels: Kernels) -> TypeGuard[OnePassKernels]:
    """Return whether the backend has `log_probs_and_gradients`."""
    # isinstance with a runtime-checkable protocol takes 0.1 ms
    return hasattr(kernels, "log_probs_and_gradients")


def choose(name: str | None, head: Head) -> Kernels:
    """Return the kernels called `name`. None: the fastest kernels for `head`.

    Raise ValueError for an unknown name, and for a head that the kernels do not run.
    """
    if name is None:
        name = _fastest(head)
    elif name not in BACKENDS:
        raise ValueError(f"backend={name!r}: must be None, 'torch', 'native' or 'triton'")
    elif not runs(name, head):
        hidden, weight = head.hidden, head.weight
        raise ValueError(
            f"backend={name!r} runs {BACKENDS[name]}, not {hidden.dtype} hidden states on"
            f" {hidden.device} with {weight.dtype} weights on {weight.device}"
        )
    if name == "native":
        return cpu
    if name == "triton":
        return _triton_kernels(head)
    return PLAIN


def _fastest(head: Head) -> str:
    if runs("native", head) and compiles():
        return "native"
    if head.hidden.is_cuda and runs("triton", head):
        return "triton"
    return "torch"


def runs(name: str, head: Head) -> bool:
    """Return whether the backend called `name` can run the head on this machine."""
    if name == "native":
        return _native_runs(head)
    if name == "triton":
        return _triton_runs(head)
    return True


def _native_runs(head: Head) -> bool:
    on_cpu = head.hidden.device.type == head.weight.device.type == "cpu"
    return on_cpu and {head.hidden.dtype, head.weight.dtype} <= set(native_library.DTYPE_CODES)


def _triton_runs(head: Head) -> bool:
    if head.dtype != torch.float32 or head.hidden.device != head.weight.device:
        return False
    try:
        from expo_fast.kernels.triton_common import INTERPRETED
    except ImportError:
        return False
    return head.hidden.is_cuda or bool(INTERPRETED)


def _triton_kernels(head: Head) -> Kernels:
    from expo_fast.kernels import logprob, rowwise
    from expo_fast.op_backends import triton_fused

    return triton_fused if logprob.supports(head) else rowwise.ROWWISE


def advantage_kernel(rewards: Tensor) -> Callable[[Tensor, Tensor, str, float], Tensor]:
    """Return the kernel for `group_advantage`. Without triton, it computes on the CPU."""
    if rewards.is_cuda:
        try:
            from expo_fast.kernels import groups
        except ImportError:
            return advantage.group_advantage
        return groups.group_advantage
    return advantage.group_advantage


PolicySums = Callable[[PolicyLossOfRows, PolicyTerms, Tensor], tuple[Tensor, Tensor]]


def policy_sums_kernel(value: Tensor) -> PolicySums:
    """Return the function that computes the policy loss () and its PolicyStatistics from terms.

    value: one of the terms. Its device and dtype select the function.
    """
    if value.is_cuda and value.dtype == torch.float32:
        try:
            from expo_fast.kernels import policy_sums
        except ImportError:
            return objectives.policy_sums
        return policy_sums.policy_sums
    return objectives.policy_sums


@cache
def compiles(part: str = "ops") -> bool:
    """Return whether the C++ kernels of `part` are available. If not, warn once."""
    try:
        native_library.library(native_library.isa(), part)
    except native_library.Unavailable as why:
        warnings.warn(f"using plain PyTorch, which is slower: {why}", stacklevel=5)
        return False
    return True
