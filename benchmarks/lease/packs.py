"""Check variable-length attention against fp64, forward and backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lease import switches
from benchmarks.lease.report import Report
from expo_fast.modeling import attention
from expo_fast.modeling.attention import Layer

ERROR = 1e-2  # relative to a norm, in bf16
HEADS, KV_HEADS, DIM = 14, 2, 64
QUERIES = (65, 1, 300, 128)  # queries of each sequence
KEYS = (65, 40, 812, 128)  # keys of each sequence; the last ones are those of its queries


def sequences(report: Report) -> tuple[Tensor, ...]:
    """Return q, k, v, the borders of queries, and the borders of keys."""
    g = torch.Generator(report.device).manual_seed(0)

    def normal(n: int, heads: int) -> Tensor:
        x = torch.randn(n, heads, DIM, generator=g, device=report.device)
        return x.bfloat16().requires_grad_()

    borders = (
        torch.tensor([0, *lengths], device=report.device).cumsum(0).int()
        for lengths in (QUERIES, KEYS)
    )
    q = normal(sum(QUERIES), HEADS)
    k = normal(sum(KEYS), KV_HEADS)
    v = normal(sum(KEYS), KV_HEADS)
    return q, k, v, *borders


def varlen(report: Report) -> None:
    """Check the attention that the trainer and the prefill call, with and without a window."""
    for window in (None, 50):
        layer = Layer(0, DIM**-0.5, window)
        q, k, v, cu_queries, cu_keys = sequences(report)
        lengths = (cu_queries, cu_keys, max(QUERIES), max(KEYS))
        function = switches.each_sequence if report.dry else attention.varlen_attention
        inputs = (q, k, v)
        out = function(layer, *inputs, *lengths)
        upstream = torch.randn_like(out)
        grads = torch.autograd.grad(out, inputs, upstream)
        inputs_fp64 = [x.detach().double().requires_grad_() for x in inputs]
        truth = by_definition(layer, *inputs_fp64)
        true_grads = torch.autograd.grad(truth, inputs_fp64, upstream.double())
        report.compare(f"window {window}", out.detach(), truth.detach(), ERROR)
        for name, got, expected in zip("qkv", grads, true_grads, strict=True):
            report.compare(f"d{name}, window {window}", got, expected, ERROR)


def by_definition(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute the attention of each sequence by its formula, in the dtype of the inputs."""
    sequences = zip(q.split(QUERIES), k.split(KEYS), v.split(KEYS), strict=True)
    out = []
    for queries, keys, values in sequences:
        group = HEADS // KV_HEADS
        keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * layer.scale
        first = len(keys) - len(queries)  # the position of the first query
        positions = first + torch.arange(len(queries), device=q.device)
        distance = positions[:, None] - torch.arange(len(keys), device=q.device)
        seen = (distance >= 0) & (distance < (layer.window or len(keys)))
        weights = F.softmax(scores.masked_fill(~seen, -torch.inf), -1)
        out.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(out)
