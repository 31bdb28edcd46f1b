"""AdamW (arXiv:1711.05101) on fp32 masters with gradients summed in fp32, and its learning rate.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
    w <- w - lr * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay * w)

bf16 has 8 bits: an update of 1e-6 to a weight of 0.1 rounds to nothing, and so does a late
micro-batch in a bf16 sum. Both are fp32 here; the bf16 weights are copies, written in place.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Schedule = Literal["constant", "linear", "cosine"]
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch.optim.AdamW's names for m and v


@dataclass(frozen=True)
class StepReport:
    grad_norm: float  # L2, before clipping; inf or NaN where the step was skipped
    update_norm: float  # L2 norm of the weights' change, 0 where nothing moved: Adam forgets |g|
    applied: bool


class Optimizer:
    """AdamW over the parameters that require a gradient; those of one dimension do not decay.

    Each backward() adds its gradients to fp32 sums and leaves `.grad` None. One Optimizer a model.
    Raises ValueError where nothing is trainable or a parameter is neither fp32 nor bf16.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ):
        self._parameters = {name: p for name, p in named_parameters if p.requires_grad}
        _check_trainable(self._parameters)
        self._masters: dict[str, Tensor] = {
            name: p if p.dtype == torch.float32 else p.detach().float()
            for name, p in self._parameters.items()
        }
        masters = list(self._masters.values())
        matrices = {"params": [m for m in masters if m.ndim > 1], "weight_decay": weight_decay}
        vectors = {"params": [m for m in masters if m.ndim <= 1], "weight_decay": 0.0}
        fused = all(m.device.type in ("cpu", "cuda") for m in masters)
        self._adamw = torch.optim.AdamW([matrices, vectors], betas=betas, eps=eps, fused=fused)
        self._betas, self._eps, self._weight_decay = betas, eps, weight_decay
        self._steps: dict[str, int] = {}  # t of each parameter, on the host: no device sync to read
        self.skipped = 0  # steps refused for a non-finite gradient
        self._marked: dict[str, Tensor] = {}  # fp32 sums up to mark(); no entry: no gradient came
        self._sums: dict[str, Tensor] = {}  # fp32 sums since then
        # touched here once and reused: the first touch of memory is what a fresh buffer costs
        self._spare = {name: [torch.zeros_like(m)] for name, m in self._masters.items()}
        for name, parameter in self._parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._accumulate, name))

    def _accumulate(self, name: str, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None, f"another Optimizer has taken the gradient of {name}"
        parameter.grad = None
        if name in self._sums:
            self._sums[name].add_(gradient)
        else:
            spare = self._spare[name]
            buffer = spare.pop() if spare else torch.empty_like(self._masters[name])
            self._sums[name] = buffer.copy_(gradient)

    def mark(self) -> None:
        """End one term of the loss, for `norms_since_mark`. Moves no data where no gradient came.

        A parameter with gradients on both sides of the mark takes a second buffer, kept for later.
        """
        for name, gradient in self._sums.items():
            if name in self._marked:
                self._marked[name].add_(gradient)
                self._spare[name].append(gradient)
            else:
                self._marked[name] = gradient
        self._sums = {}

    def norms_since_mark(self) -> tuple[float, float]:
        """L2 norms of the gradients summed before the last mark, and of those summed after it."""
        return _l2_norm(self._marked.values()), _l2_norm(self._sums.values())

    def grad_norm(self) -> float:
        """L2 norm of all gradients summed since the last step, reduced in fp64."""
        terms = (
            [sums[name] for sums in (self._marked, self._sums) if name in sums]
            for name in self._masters  # one order, whatever came first: clipping depends on it
        )
        return _l2_norm(term[0] if len(term) == 1 else term[0] + term[1] for term in terms if term)

    def zero_grad(self) -> None:
        for sums in (self._marked, self._sums):
            for name, gradient in sums.items():
                self._spare[name].append(gradient)
            sums.clear()

    @torch.no_grad()
    def step(self, lr: float, max_grad_norm: float) -> StepReport:
        """Clip the summed gradients to `max_grad_norm` (inf: never), update, and forget them.

        A non-finite norm is counted and changes no bit of weights or moments. A zero norm, or no
        gradient at all, moves nothing either: no decay, no step of the moments.
        """
        assert max_grad_norm > 0, max_grad_norm
        self.mark()
        norm = self.grad_norm()
        applied = math.isfinite(norm) and norm > 0
        update_norm = self._update(lr, min(1.0, max_grad_norm / norm)) if applied else 0.0
        self.skipped += not math.isfinite(norm)
        self.zero_grad()
        return StepReport(norm, update_norm, applied)

    def _update(self, lr: float, scale: float) -> float:
        for name, gradient in self._marked.items():
            self._masters[name].grad = gradient if scale == 1.0 else gradient.mul_(scale)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        for name in self._marked:
            master, parameter = self._masters[name], self._parameters[name]
            master.grad = None
            self._steps[name] = self._steps.get(name, 0) + 1
            if master is not parameter:
                parameter.copy_(master)  # in place: generator and CUDA graphs read this tensor
        moved = (name for name in self._masters if name in self._marked)
        return _l2_norm(piece for name in moved for piece in self._update_pieces(name, lr))

    def _update_pieces(self, name: str, lr: float) -> Iterator[Tensor]:
        """The update just made, up to sign, from the new moments: no copy of the old weights.

        With a the Adam term, w' = (1 - lr decay) w - lr a, so
        w - w' = (a + decay w') lr / (1 - lr decay).
        """
        master, t, (beta1, beta2) = self._masters[name], self._steps[name], self._betas
        decay = self._weight_decay if master.ndim > 1 else 0.0
        state = self._adamw.state[master]
        for m, v, w in zip(
            *map(_pieces, (state["exp_avg"], state["exp_avg_sq"], master)), strict=True
        ):
            denominator = v.sqrt().mul_((1 - beta2**t) ** -0.5).add_(self._eps)
            adam = torch.div(m, denominator, out=denominator).mul_(1 / (1 - beta1**t))
            yield adam.add_(w, alpha=decay).mul_(lr / (1 - lr * decay))

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What an exact resume needs beside the weights: tensors and JSON values.

        The tensors are live, so save or copy them before the next step. Their keys are
        `NAME.exp_avg`, `NAME.exp_avg_sq` and, for a bf16 parameter, `NAME.master`.
        """
        assert not self._marked and not self._sums, "state_dict() amid a gradient accumulation"
        tensors = {}
        for name, master in self._masters.items():
            if master is not self._parameters[name]:
                tensors[f"{name}.master"] = master
            if name in self._steps:
                tensors |= {f"{name}.{key}": self._adamw.state[master][key] for key in MOMENTS}
        return tensors, {"steps": dict(self._steps), "skipped": self.skipped}

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, to the bit, and bf16 weights from their masters.

        fp32 weights are their own masters and come with the model. Raises ValueError, and changes
        nothing, where the state is not one of these parameters.
        """
        self._check_state(tensors, values["steps"])
        self.zero_grad()
        self._adamw.state.clear()
        self._steps = dict(values["steps"])
        self.skipped = values["skipped"]
        fused = self._adamw.defaults["fused"]
        for name, master in self._masters.items():
            if master is not self._parameters[name]:
                master.copy_(tensors[f"{name}.master"])
                self._parameters[name].copy_(master)
            if name in self._steps:
                moments = (tensors[f"{name}.{key}"].to(master.device, copy=True) for key in MOMENTS)
                device = master.device if fused else "cpu"  # where AdamW keeps its step
                step = torch.tensor(self._steps[name], dtype=torch.float32, device=device)
                self._adamw.state[master] = {"step": step} | dict(
                    zip(MOMENTS, moments, strict=True)
                )

    def _check_state(self, tensors: dict[str, Tensor], steps: dict[str, int]) -> None:
        expected = {f"{name}.{key}": self._masters.get(name) for name in steps for key in MOMENTS}
        expected |= {
            f"{name}.master": master
            for name, master in self._masters.items()
            if master is not self._parameters[name]
        }
        for key in expected | tensors:
            tensor, master = tensors.get(key), expected.get(key)
            if tensor is None or master is None:
                where = "the model" if tensor is not None else "the state"
                raise ValueError(f"optimizer state: {key} is not in {where}; was it another model?")
            if tensor.shape != master.shape or tensor.dtype != torch.float32:
                got = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise ValueError(
                    f"optimizer state: {key} is {got}, not float32 {tuple(master.shape)}; "
                    "was it another model?"
                )


def learning_rate(
    step: int,  # updates already made, 0 for the first
    *,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    schedule: Schedule,
    final_fraction: float = 0.0,  # of peak, reached at total_steps and kept
) -> float:
    """The rate of update `step`, from its number alone, so that a resumed run cannot be off by one.

    Warm-up rises linearly and its first update is peak / warmup_steps, not an idle zero.
    Raises ValueError for an unknown schedule.
    """
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule={schedule!r}: use one of {', '.join(get_args(Schedule))}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    remaining = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak * (final_fraction + (1 - final_fraction) * remaining)


def _check_trainable(parameters: dict[str, nn.Parameter]) -> None:
    if not parameters:
        raise ValueError("no parameter requires a gradient: there is nothing to train")
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"parameter {name} is {parameter.dtype}: use float32 or bfloat16")


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    elements = 1 << 18 if tensor.device.type == "cpu" else 1 << 24  # temporaries of 1 or 64 MB
    return tensor.detach().flatten().split(elements)


def _l2_norm(tensors: Iterable[Tensor]) -> float:
    """In fp64, whose squares neither overflow nor vanish for any fp32 gradient.

    A CPU's fp32 norm of 28M numbers was 0.16% off; fp64 in one go copies them all (84 ms), in
    pieces it does not (11 ms; 2 cores).
    """
    squares = [
        torch.linalg.vector_norm(piece, dtype=torch.float64).square()
        for tensor in tensors
        for piece in _pieces(tensor)
    ]
    return torch.stack(squares).sum().sqrt().item() if squares else 0.0
