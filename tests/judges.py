"""Shared judges: what the code under test must equal, computed from the definitions.

Nothing here calls an op, a kernel, a loss or a packing of expo_fast. Log-probs come from complete
logits, one sequence at a time, and losses from the papers' formulas. Only `hidden_states` runs
code of expo_fast: the decoder that a test passes in, which test_model.py compares with
transformers.

V is the size of the vocabulary, D the width of the model, N a number of rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expo_fast.modeling.decoder import Decoder

# Errors. Each is NaN where one of the tensors holds a NaN, and no comparison with NaN is true.
# Python's max() may lose a NaN: compare the errors of several tensors one by one.


def max_error(got: Tensor, truth: Tensor) -> float:
    """Return the largest absolute difference, in fp64; 0 for empty tensors."""
    difference = _difference(got, truth)
    return difference.abs().max().item() if difference.numel() else 0.0


def max_relative_error(got: Tensor, truth: Tensor) -> float:
    """Return the largest absolute difference, relative to the largest entry of `truth`."""
    return (_difference(got, truth).abs().max() / truth.double().abs().max()).item()


def error_norm(got: Tensor, truth: Tensor) -> float:
    """Return the Euclidean norm of the difference, in fp64."""
    return _difference(got, truth).norm().item()


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Return the Euclidean norm of the difference, relative to that of `truth`; NaN for 0 / 0."""
    return (_difference(got, truth).norm() / truth.double().norm()).item()


def _difference(got: Tensor, truth: Tensor) -> Tensor:
    assert got.shape == truth.shape
    return got.detach().double() - truth.detach().double()


# Gradients


def values_and_gradients(
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Return the outputs of function(*inputs), then the gradients of the inputs.

    Inputs are detached, and cast to `dtype` if it is given. `upstream` holds the gradient of each
    output, and is cast to its dtype.
    """
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    given = [g.to(out.dtype) for g, out in zip(upstream, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, given)
    return [*(out.detach() for out in outputs), *gradients]


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of a loss for each parameter of a model, by name."""
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


def assert_gradients_near(
    got: dict[str, Tensor],
    truth: dict[str, Tensor],
    tolerance: float,
    error: Callable[[Tensor, Tensor], float] = relative_error,
) -> None:
    """Assert that both have the same names, and that each gradient's error is below a bound."""
    assert got.keys() == truth.keys()
    for name, expected in truth.items():
        found = error(got[name], expected)
        assert found < tolerance, (name, found)


# A linear head


def logps_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probs (N,) of targets (N,) under logits (N, V), in the logits' dtype."""
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def linear_results(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the target's log-prob, the entropy and the log-sum-exp of each row, (N,) each.

    Of the logits (hidden @ weight.T + bias) / temperature, for hidden states (N, D), a weight
    (V, D), targets (N,), a bias (V,) and one temperature or (N,) of them. All is computed in the
    dtype of the inputs, as a rule fp64. Rows whose target is -100 are 0.
    """
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None]
    logits = logits / temperature
    logps = logits.log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    results = logps_of(logits, targets.clamp(min=0)), entropy, logits.logsumexp(-1)
    logp, entropy, lse = (torch.where(targets == -100, 0, x) for x in results)
    return logp, entropy, lse


def results_of_head(
    function: Callable[..., Sequence[Tensor]], head: Any, upstream: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Return logp, entropy, lse, and the gradients of hidden, weight and bias, in `dtype`.

    `function` has the arguments of `linear_results`, `head` the fields of kernels.head.Head, and
    `upstream` (3, N) holds the gradients of the results.
    """
    temperature = head.temperature.to(dtype)

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
        return function(hidden, weight, head.targets, bias, temperature)

    return values_and_gradients(run, (head.hidden, head.weight, head.bias), tuple(upstream), dtype)


# A sequence by itself


def hidden_states(model: Decoder, token_ids: Sequence[int] | Tensor) -> Tensor:
    """Return the hidden states (N, D) of one sequence, from a forward without packing or cache."""
    device = model.head_weight.device
    tokens = torch.as_tensor(token_ids, device=device)
    borders = torch.tensor([0, len(tokens)], dtype=torch.int32, device=device)
    return model.hidden(tokens, torch.arange(len(tokens), device=device), borders)


def complete_logits(model: Decoder, token_ids: Sequence[int] | Tensor) -> Tensor:
    """Return the logits (N, V) of one sequence. They are fp64 of an fp64 model, else fp32."""
    hidden = hidden_states(model, token_ids)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.to(wide) @ model.head_weight.to(wide).T


def completion_logps(
    model: Decoder,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    temperature: float = 1.0,
) -> Tensor:
    """Return the log-probs (N,) of a completion's tokens after its prompt, with their graph."""
    logits = complete_logits(model, [*prompt_ids, *completion_ids])
    rows = logits[len(prompt_ids) - 1 : -1] / temperature
    return logps_of(rows, torch.tensor(completion_ids, device=rows.device))


# Policy losses of tokens. Arguments are elementwise: a ratio, an advantage and a log-prob a token.


def clipped_loss(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Return PPO's clipped loss (arXiv:1707.06347, eq. 7)."""
    clipped = ratio.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def dual_clipped_loss(
    ratio: Tensor, advantage: Tensor, low: float, high: float, cap: float
) -> Tensor:
    """Return the dual-clip loss (arXiv:1912.09729), bounded for negative advantages."""
    loss = clipped_loss(ratio, advantage, low, high)
    return torch.where(advantage < 0, torch.minimum(loss, -cap * advantage), loss)


def cispo_loss(ratio: Tensor, advantage: Tensor, logp: Tensor, cap: float) -> Tensor:
    """Return CISPO's loss (arXiv:2506.13585, eq. 4): the ratio is capped, and has no gradient."""
    return -ratio.detach().clamp(max=cap) * advantage * logp


def sapo_loss(ratio: Tensor, advantage: Tensor) -> Tensor:
    """Return SAPO's loss (arXiv:2511.20347), with tau 1 for positive advantages and 1.05 else."""
    tau = 1.05 - 0.05 * (advantage > 0).to(ratio.dtype)
    return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage


def kl_estimate(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Return the k3 estimate of KL(policy || reference), exp(x) - x - 1 of x = ref - policy."""
    x = ref_logp - logp
    return x.exp() - x - 1


# Preference losses of pairs. A margin is the chosen sequence's log-ratio less the rejected one's.


def dpo_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return DPO's loss (arXiv:2305.18290, eq. 7), or conservative DPO's with label smoothing."""
    right = -F.logsigmoid(beta * margin)
    flipped = -F.logsigmoid(-beta * margin)
    return (1 - label_smoothing) * right + label_smoothing * flipped


def ipo_loss(margin: Tensor, beta: float) -> Tensor:
    """Return IPO's loss (arXiv:2310.12036, eq. 17)."""
    return (margin - 1 / (2 * beta)) ** 2


def hinge_loss(margin: Tensor, beta: float) -> Tensor:
    """Return the hinge loss of SLiC (arXiv:2305.10425) on log-ratios."""
    return F.relu(1 - beta * margin)


def rdpo_loss(margin: Tensor, longer: Tensor, beta: float, alpha: float) -> Tensor:
    """Return R-DPO's loss (arXiv:2403.19159); `longer` is the chosen length less the rejected."""
    return -F.logsigmoid(beta * margin + alpha * longer)


def simpo_loss(margin: Tensor, beta: float, gamma: float) -> Tensor:
    """Return SimPO's loss (arXiv:2405.14734, eq. 6) of a margin of mean log-probs."""
    return -F.logsigmoid(beta * margin - gamma)
