"""fp32 sums of the gradients of several backward passes.

In bf16, which has 8 significant bits, the gradient of a late micro-batch may be lost to rounding
when it is added to a large sum.
"""

# pyright: reportPrivateImportUsage=false
# (torch documents its multi-tensor operations but does not export their names)

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from expo_fast.distributed.world import ALONE, World, local_part
from expo_fast.modeling.l2_norms import L2Norm, batches, l2_norm
from expo_fast.op_backends import native_optimizer
from expo_fast.op_backends.native_optimizer import GradTerms, Squares

# Number of gradient elements to collect before they are added. On a GPU one launch adds many.
CPU_PENDING = 0
GPU_PENDING = 1 << 25


class GradSums:
    """The fp32 gradient sums of a set of parameters. Every `backward()` adds to them.

    A hook on each parameter runs as soon as `loss.backward()` has computed its gradient. It adds
    `parameter.grad` to the sum and sets `parameter.grad` to None, which frees its memory before the
    next layer's backward. On a GPU, up to GPU_PENDING elements are collected before they are added.
    No other code may read `.grad`, and a second GradSums on the same parameters is an error.

    The sums are kept in two terms, so that the norms of two parts of a loss can be compared:

        policy_loss.backward()
        sums.start_new_term()
        sft_loss.backward()
        policy_norm, sft_norm = sums.term_norms()

    Each parameter has one fp32 buffer. It is allocated here, because the first access to new memory
    is slow. A parameter with gradients in both terms gets a second buffer, which is reused later.

    world: its ranks. Of a parameter that FSDP shards, the sums are those of this rank's part: FSDP
    adds the gradients of all ranks first, and then runs the hook. Norms are those of all parts.

    native: whether csrc computes all norms in one pass, and can update the parameters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], world: World = ALONE):
        self._world = world
        self._parameters = dict(parameters)
        self._first: dict[str, Tensor] = {}  # by name; a parameter without a gradient has no entry
        self._second: dict[str, Tensor] = {}  # since `start_new_term`
        self._free: dict[str, list[Tensor]] = {}
        self._pending: dict[str, Tensor] = {}  # gradients that are not yet in the second term
        self._pending_elements = 0
        self._squares: Squares | None = None  # of the two terms; None: not known
        self.native = native_optimizer.runs([local_part(p) for p in self._parameters.values()])
        for name, parameter in self._parameters.items():
            buffer = torch.zeros_like(local_part(parameter), dtype=torch.float32)
            self._free[name] = [buffer]
            parameter.register_post_accumulate_grad_hook(partial(self._take, name))

    def _take(self, name: str, parameter: Tensor) -> None:
        grad = parameter.grad
        assert grad is not None, f"another Optimizer has taken the gradient of {name}"
        parameter.grad = None
        if name in self._pending:
            self._add_pending()
        grad = local_part(grad)
        self._pending[name] = grad
        self._pending_elements += grad.numel()
        most = CPU_PENDING if grad.device.type == "cpu" else GPU_PENDING
        if self._pending_elements >= most:
            self._add_pending()

    @torch.no_grad()
    def _add_pending(self) -> None:
        """Add the pending gradients to the second term."""
        if self._pending:
            self._squares = None
        added: list[tuple[Tensor, Tensor]] = []
        copied: list[tuple[Tensor, Tensor]] = []
        for name, grad in self._pending.items():
            if name in self._second:
                added.append((self._second[name], grad))
            else:
                self._second[name] = self._buffer(name)
                copied.append((self._second[name], grad))
        self._pending.clear()
        self._pending_elements = 0
        if added:
            torch._foreach_add_(*_columns(added))
        if copied:
            torch._foreach_copy_(*_columns(copied))

    def _buffer(self, name: str) -> Tensor:
        if self._free[name]:
            return self._free[name].pop()
        return torch.empty_like(local_part(self._parameters[name]), dtype=torch.float32)

    def start_new_term(self) -> None:
        """Add the gradients summed so far to the first term. Later gradients form the second."""
        self.merge()

    def merge(self) -> dict[str, Tensor]:
        """Add the two terms in place and return the sums by name. The sums are not copies."""
        self._add_pending()
        self._squares = None
        both: list[tuple[Tensor, Tensor]] = []
        for name, grad in self._second.items():
            if name in self._first:
                both.append((self._first[name], grad))
                self._free[name].append(grad)
            else:
                self._first[name] = grad
        if both:
            torch._foreach_add_(*_columns(both))
        self._second = {}
        return self._first

    def term_norms(self) -> tuple[float, float]:
        """Return the L2 norms of the sums before and after the last `start_new_term`."""
        self._add_pending()
        if self.native:
            squares = self._known_squares()
            return self._root(squares.first), self._root(squares.second)
        first = l2_norm(self._first.values(), self._world)
        second = l2_norm(self._second.values(), self._world)
        return first, second

    def norm(self) -> float:
        """Return the L2 norm of all gradients since the last `clear`, reduced in fp64."""
        self._add_pending()
        if self.native:
            return self._root(self._known_squares().both)
        norm = L2Norm()
        for batch in batches(self._rows()):
            norm.add([term if other is None else term + other for term, other in batch])
        return norm.value(self._world)

    def _root(self, own: float) -> float:
        """Return the norm, given this rank's sum of squares."""
        (square,) = self._world.sums(own)
        return math.sqrt(square)

    def _known_squares(self) -> Squares:
        """Return the sums of squares of this rank's parts. They are computed once."""
        if self._squares is None:
            self._squares = native_optimizer.squares(list(self.terms().values()))
        return self._squares

    def terms(self) -> dict[str, GradTerms]:
        """Return the terms of each parameter that has a gradient. They are not copies.

        They are in the order of the parameters, because the rounding of the norm depends on it.
        """
        self._add_pending()
        terms: dict[str, GradTerms] = {}
        for name in self._parameters:
            if name in self._first or name in self._second:
                first = self._first.get(name)
                second = self._second.get(name)
                terms[name] = GradTerms(first, second)
        return terms

    def _rows(self) -> list[tuple[Tensor, Tensor | None]]:
        """Return the one or two terms of each parameter that has a gradient, in order."""
        rows: list[tuple[Tensor, Tensor | None]] = []
        for first, second in self.terms().values():
            if first is not None:
                rows.append((first, second))
            elif second is not None:
                rows.append((second, None))
        return rows

    def clear(self) -> None:
        """Remove all gradients. The buffers are kept for reuse."""
        self._squares = None
        self._pending.clear()
        self._pending_elements = 0
        for sums in (self._first, self._second):
            for name, grad in sums.items():
                self._free[name].append(grad)
            sums.clear()

    @property
    def empty(self) -> bool:
        """Whether no gradient has been added since the last `clear`."""
        return not self._pending and not self._first and not self._second


def _columns(rows: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the first tensors of the rows, and the second tensors."""
    return [first for first, _ in rows], [second for _, second in rows]
