"""AdamW (arXiv:1711.05101) on fp32 master weights, with gradients that are summed in fp32.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
    w <- w - lr * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay * w)

bf16 has 8 significant bits, so an update of 1e-6 to a weight of 0.1 is lost to rounding. The master
weights are fp32, and the bf16 weights are rounded copies that are written in place.
"""

# pyright: reportPrivateImportUsage=false
# (torch documents its multi-tensor operations but does not export their names)

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from expo_fast.distributed.world import ALONE, World, local_part
from expo_fast.modeling.grad_sums import GradSums
from expo_fast.modeling.l2_norms import L2Norm, batches, pieces
from expo_fast.op_backends.native_optimizer import AdamWParameter, adamw

Tensors = dict[str, Tensor]

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch.optim.AdamW's names for m and v


@dataclass(frozen=True)
class StepReport:
    """The result of one `Optimizer.step`."""

    grad_norm: float  # L2, before clipping; inf or NaN if the step was skipped
    update_norm: float  # L2 norm of the change of the weights, 0 if the step was skipped


class Optimizer:
    """AdamW over the parameters that require a gradient. Weight decay skips 1-D parameters.

    Every `loss.backward()` adds its gradients to `grad_sums` and leaves `.grad` None (see
    `GradSums`). `step` reads the sums, updates the weights and clears the sums:

        for loss in micro_batches:
            loss.backward()  # adds to optimizer.grad_sums
        optimizer.step(lr, max_grad_norm)

    world: its ranks, if FSDP shards the parameters over them. The shards are fp32 and are the
    masters. The optimizer updates the part of this rank, and a `Layout` makes the weights of it.
    rounded_to: the dtype of those weights. None: the parameters are not sharded.

    A model can have only one Optimizer. Raise ValueError if no parameter is trainable, or if a
    trainable parameter is neither fp32 nor bf16.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        world: World = ALONE,
        rounded_to: torch.dtype | None = None,
    ):
        self._world = world
        self._rounded_to = rounded_to
        self._parameters = {name: p for name, p in named_parameters if p.requires_grad}
        _check_trainable(self._parameters)
        self._masters: Tensors = {}
        for name, parameter in self._parameters.items():
            self._masters[name] = _master(parameter)
        self._betas = betas
        self._eps = eps
        self._weight_decay = weight_decay
        self._adamw = self._torch_adamw()
        self._steps: dict[str, int] = {}  # t of each parameter, on the host to avoid a host sync
        for name in self._masters:
            self._reset_moments(name)
        self.skipped = 0  # number of steps skipped because of a non-finite gradient
        self.grad_sums = GradSums(self._parameters, world)

    def _torch_adamw(self) -> torch.optim.AdamW:
        masters = list(self._masters.values())
        matrices = [master for master in masters if master.ndim > 1]
        vectors = [master for master in masters if master.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": self._weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        device_types = {master.device.type for master in masters}
        return torch.optim.AdamW(
            groups,
            betas=self._betas,
            eps=self._eps,
            fused=device_types <= {"cpu", "cuda"},
        )

    def _reset_moments(self, name: str) -> None:
        """Set the moments and the step of a parameter to 0.

        They are allocated before the first step. AdamW would allocate them in it, in the memory of
        freed activations, and the activations of the second step would need new memory.
        """
        master = self._masters[name]
        fused = self._adamw.defaults["fused"]
        step_device = master.device if fused else "cpu"  # where AdamW keeps its step
        state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device=step_device)}
        for key in MOMENTS:
            state[key] = torch.zeros_like(master, memory_format=torch.preserve_format)
        self._adamw.state[master] = state

    @torch.no_grad()
    def step(self, lr: float, max_grad_norm: float) -> StepReport:
        """Clip the summed gradients, update the weights and clear the sums.

        max_grad_norm: the L2 norm to clip to; inf never clips.

        With a non-finite norm the step is skipped and counted in `skipped`: weights and moments do
        not change. They do not change either, not even by decay, if the norm is 0 or there is no
        gradient.
        """
        assert max_grad_norm > 0, max_grad_norm
        # Merged before the norm, so that each term is read once. csrc reads both in one pass.
        grads = None if self.grad_sums.native else self.grad_sums.merge()
        norm = self.grad_sums.norm()
        finite = math.isfinite(norm)
        update_norm = 0.0
        if finite and norm > 0:
            clip = min(1.0, max_grad_norm / norm)
            if grads is None:
                update_norm = self._native_update(lr, clip)
            else:
                update_norm = self._torch_update(grads, lr, clip)
        self.skipped += not finite
        self.grad_sums.clear()
        return StepReport(grad_norm=norm, update_norm=update_norm)

    def _native_update(self, lr: float, clip: float) -> float:
        """Apply AdamW to gradients scaled by `clip`. Return the norm of the update.

        This takes one pass over the memory of gradients, moments and weights.
        """
        updated: list[AdamWParameter] = []
        for name, terms in self.grad_sums.terms().items():
            master = self._masters[name]
            state = self._adamw.state[master]
            self._steps[name] = self._steps.get(name, 0) + 1
            parameter = AdamWParameter(
                weight=master,
                exp_avg=state["exp_avg"],
                exp_avg_sq=state["exp_avg_sq"],
                terms=terms,
                copy=self._parameters[name] if self._writes_copy(name) else None,
                t=self._steps[name],
                decay=self._decay(master),
            )
            updated.append(parameter)
        squared_change = adamw(updated, lr=lr, betas=self._betas, eps=self._eps, clip=clip)
        (square,) = self._world.sums(squared_change)
        return math.sqrt(square)

    def _decay(self, master: Tensor) -> float:
        return self._weight_decay if master.ndim > 1 else 0.0

    def _torch_update(self, grads: Tensors, lr: float, clip: float) -> float:
        """Apply AdamW to gradients scaled by `clip`. Return the norm of the update."""
        if clip != 1.0:
            torch._foreach_mul_(list(grads.values()), clip)
        for name, grad in grads.items():
            self._masters[name].grad = grad
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        parameters: list[Tensor] = []
        masters: list[Tensor] = []
        for name in grads:
            master = self._masters[name]
            parameter = self._parameters[name]
            master.grad = None
            self._steps[name] = self._steps.get(name, 0) + 1
            if self._writes_copy(name):
                parameters.append(parameter)
                masters.append(master)
        if parameters:
            # in place, because the generator and CUDA graphs read these tensors
            torch._foreach_copy_(parameters, masters)
        norm = L2Norm()
        for batch in batches(self._pieces(grads)):
            norm.add(self._updates(batch, lr))
        return norm.value(self._world)

    def _pieces(self, grads: Tensors) -> list["_Piece"]:
        """Return flat pieces of the parameters that have a gradient."""
        found: list[_Piece] = []
        for name, master in self._masters.items():
            if name not in grads:
                continue
            state = self._adamw.state[master]
            decay = self._decay(master)
            first_moments = pieces(state["exp_avg"])
            second_moments = pieces(state["exp_avg_sq"])
            weights = pieces(master)
            for m, v, w in zip(first_moments, second_moments, weights, strict=True):
                found.append(_Piece(m, v, w, t=self._steps[name], decay=decay))
        return found

    def _updates(self, batch: list["_Piece"], lr: float) -> list[Tensor]:
        """Return the last updates of some pieces, up to their sign.

        They are computed from the new moments, so no copy of the old weights is needed. Let a be
        the Adam term. Then w' = (1 - lr decay) w - lr a, and w - w' = (a + decay w') lr / (1 - lr
        decay).
        """
        beta1, beta2 = self._betas
        denominators = torch._foreach_sqrt([p.v for p in batch])
        torch._foreach_mul_(denominators, [(1 - beta2**p.t) ** -0.5 for p in batch])
        torch._foreach_add_(denominators, self._eps)
        updates = torch._foreach_div([p.m for p in batch], denominators)
        torch._foreach_mul_(updates, [1 / (1 - beta1**p.t) for p in batch])
        decayed = [i for i, p in enumerate(batch) if p.decay]
        if decayed:
            weights = [batch[i].w for i in decayed]
            torch._foreach_add_([updates[i] for i in decayed], weights, alpha=self._weight_decay)
        torch._foreach_mul_(updates, [lr / (1 - lr * p.decay) for p in batch])
        return list(updates)

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the fp32 master weights of bf16 parameters, with their names in a state."""
        for name, master in self._masters.items():
            if self._has_copy(name):
                yield f"{name}.master", master

    def state_dict(self) -> tuple[Tensors, dict[str, Any]]:
        """Return the tensors and JSON values that an exact resume needs, except the weights.

        The tensors are not copies, so save or copy them before the next step. Their keys are
        `NAME.exp_avg`, `NAME.exp_avg_sq` and, for a bf16 parameter, `NAME.master`.
        """
        assert self.grad_sums.empty, "call state_dict() after step(), when no gradient is pending"
        values = {"steps": dict(self._steps), "skipped": self.skipped}
        return self.state_to_fill(values), values

    def state_to_fill(self, values: dict[str, Any]) -> Tensors:
        """Return the tensors of `state_dict` after the steps of `values`, for a loader to fill."""
        tensors: Tensors = {}
        for name, master in self._masters.items():
            if self._has_copy(name):
                tensors[f"{name}.master"] = self._as_parameter(name, master)
            if name in values["steps"]:
                state = self._adamw.state[master]
                for key in MOMENTS:
                    tensors[f"{name}.{key}"] = self._as_parameter(name, state[key])
        return tensors

    @torch.no_grad()
    def load_state_dict(self, tensors: Tensors, values: dict[str, Any]) -> None:
        """Restore the result of `state_dict` exactly, and bf16 weights from their masters.

        fp32 weights are their own masters and are loaded with the model. Raise ValueError if the
        state has other names, shapes or dtypes of parameters. The optimizer is then unchanged.
        """
        self._check_state(tensors, values["steps"])
        self.grad_sums.clear()
        self._steps = dict(values["steps"])
        self.skipped = values["skipped"]
        for name, master in self._masters.items():
            parameter = self._parameters[name]
            if self._has_copy(name):
                master.copy_(local_part(tensors[f"{name}.master"]))
            if self._writes_copy(name):
                parameter.copy_(master)
            state = self._adamw.state[master]
            state["step"].fill_(self._steps.get(name, 0))
            for key in MOMENTS:
                if name in self._steps:
                    state[key].copy_(local_part(tensors[f"{name}.{key}"]))
                else:
                    state[key].zero_()

    def _check_state(self, tensors: Tensors, steps: dict[str, int]) -> None:
        expected = self._expected_state(steps)
        for key in expected | tensors:
            tensor = tensors.get(key)
            master = expected.get(key)
            if tensor is None or master is None:
                where = "the model" if tensor is not None else "the state"
                raise ValueError(
                    f"optimizer state: {key} is not in {where}: use the state of this model"
                )
            if tensor.shape != master.shape or tensor.dtype != torch.float32:
                got = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise ValueError(
                    f"optimizer state: {key} is {got}, not float32 {tuple(master.shape)}: "
                    "use the state of this model"
                )

    def _expected_state(self, steps: dict[str, int]) -> dict[str, Tensor | None]:
        """Return the keys of a state with these steps, and their masters, None if unknown."""
        expected: dict[str, Tensor | None] = {}
        for name in steps:
            for key in MOMENTS:
                expected[f"{name}.{key}"] = self._parameters.get(name)
        for name, parameter in self._parameters.items():
            if self._has_copy(name):
                expected[f"{name}.master"] = parameter
        return expected

    def _has_copy(self, name: str) -> bool:
        """Return whether the model's weight is a rounded copy of the master."""
        if self._rounded_to is not None:
            return self._rounded_to != torch.float32
        return self._writes_copy(name)

    def _writes_copy(self, name: str) -> bool:
        """Return whether the parameter itself is a rounded copy, which is written here."""
        return self._parameters[name].dtype != torch.float32

    def _as_parameter(self, name: str, part: Tensor) -> Tensor:
        """Return this rank's part of a state as a tensor that is sharded as the parameter is."""
        parameter: Any = self._parameters[name]
        if self._rounded_to is None:
            return part
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            part,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )


class _Piece(NamedTuple):
    """A flat part of a parameter, with its moments."""

    m: Tensor
    v: Tensor
    w: Tensor  # the master
    t: int  # number of updates so far
    decay: float


def _master(parameter: nn.Parameter) -> Tensor:
    """Return the fp32 weight that AdamW updates: an fp32 parameter itself, else a copy."""
    if parameter.dtype == torch.float32:
        return local_part(parameter)
    return parameter.detach().float()


def _check_trainable(parameters: dict[str, nn.Parameter]) -> None:
    if not parameters:
        raise ValueError("no parameter requires a gradient: there is nothing to train")
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"parameter {name} is {parameter.dtype}: use float32 or bfloat16")
