"""fp32 sums of the gradients of several backward passes.

In bf16, with 8 bits, a late micro-batch rounds to nothing when it is added to a large sum.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from expo_fast.modeling.norms import L2Norm, l2_norm


class GradSums:
    """The fp32 gradient sums of a set of parameters, which every `backward()` adds to.

    A hook on each parameter runs as soon as `loss.backward()` has computed its gradient. It adds
    `parameter.grad` to the sum and sets `parameter.grad` to None, which frees its memory before the
    next layer's backward. No other code may read `.grad`, and a second GradSums on the same
    parameters is an error.

    The sums are kept in two terms, so that the norms of two parts of a loss can be compared:

        policy_loss.backward()
        sums.start_new_term()
        sft_loss.backward()
        policy_norm, sft_norm = sums.term_norms()

    Each parameter has one fp32 buffer, allocated here, because the first access to new memory is
    slow. A parameter with gradients in both terms takes a second buffer, which is reused later.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self._parameters = dict(parameters)
        self._first: dict[str, Tensor] = {}  # by name; a parameter without a gradient has no entry
        self._second: dict[str, Tensor] = {}  # since `start_new_term`
        self._free: dict[str, list[Tensor]] = {}
        for name, parameter in self._parameters.items():
            buffer = torch.zeros_like(parameter, dtype=torch.float32)
            self._free[name] = [buffer]
            parameter.register_post_accumulate_grad_hook(partial(self._take, name))

    def _take(self, name: str, parameter: Tensor) -> None:
        grad = parameter.grad
        assert grad is not None, f"another Optimizer has taken the gradient of {name}"
        parameter.grad = None
        if name in self._second:
            self._second[name].add_(grad)
        else:
            self._second[name] = self._buffer(name).copy_(grad)

    def _buffer(self, name: str) -> Tensor:
        if self._free[name]:
            return self._free[name].pop()
        return torch.empty_like(self._parameters[name], dtype=torch.float32)

    def start_new_term(self) -> None:
        """Add the gradients summed so far to the first term. Later gradients form the second."""
        for name, grad in self._second.items():
            if name in self._first:
                self._first[name].add_(grad)
                self._free[name].append(grad)
            else:
                self._first[name] = grad
        self._second = {}

    def term_norms(self) -> tuple[float, float]:
        """Return the L2 norms of the sums before and after the last `start_new_term`."""
        first = l2_norm(self._first.values())
        second = l2_norm(self._second.values())
        return first, second

    def norm(self) -> float:
        """Return the L2 norm of all gradients since the last `clear`, reduced in fp64."""
        norm = L2Norm()
        for total in self._totals():
            norm.add(total)
        return norm.value()

    def _totals(self) -> Iterator[Tensor]:
        """Yield the sum of the two terms of each parameter that has a gradient.

        They come in the order of the parameters: the norm, and so the clipping, depends on it.
        """
        for name in self._parameters:
            first = self._first.get(name)
            second = self._second.get(name)
            if first is not None and second is not None:
                yield first + second
            elif first is not None:
                yield first
            elif second is not None:
                yield second

    def merged(self) -> dict[str, Tensor]:
        """Merge the two terms in place and return the sums by name, without copying them."""
        self.start_new_term()
        return self._first

    def clear(self) -> None:
        """Forget all gradients. The buffers are kept."""
        for sums in (self._first, self._second):
            for name, grad in sums.items():
                self._free[name].append(grad)
            sums.clear()

    @property
    def empty(self) -> bool:
        """Whether no gradient has been added since the last `clear`."""
        return not self._first and not self._second
