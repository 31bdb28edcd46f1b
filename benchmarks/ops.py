"""Times the fused ops on this CPU against their peers, interleaved in one process.

    python -m benchmarks.ops --model qwen2.5-0.5b --rows 1024

A peer that is not installed is left out; an op whose log-probs are wrong is not timed. Prints a
table, medians of --repeats, and one JSON object last. The limit of an op is its GEMMs (1 forward;
4 with backward, for one recomputes the logits) at the rate of torch.mm in the same run.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from expo_fast.kernels import reference
from expo_fast.ops import linear_logprob, linear_policy_loss

SHAPES = {  # (V, D) of the head
    "smollm2-135m": (49152, 576),
    "qwen2.5-0.5b": (151936, 896),
    "qwen2.5-1.5b": (151936, 1536),
    "qwen2.5-3b": (151936, 2048),
    "llama-3.2-1b": (128256, 2048),
    "llama-3.2-3b": (128256, 3072),
}
Logprob = Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden, weight, targets) -> (N,)


@dataclass(frozen=True)
class Case:
    hidden: Tensor  # (N, D) bf16
    weight: Tensor  # (V, D) bf16
    targets: Tensor  # (N,)
    upstream: Tensor  # (N,) dloss/dlogp

    @classmethod
    def make(cls, model: str, rows: int) -> "Case":
        (v, d), g = SHAPES[model], torch.Generator().manual_seed(0)
        hidden = torch.randn(rows, d, generator=g).bfloat16()
        weight = (torch.randn(v, d, generator=g) * 2 / d**0.5).bfloat16()
        targets = torch.randint(v, (rows,), generator=g)
        hidden += 5 * weight[targets]  # so that targets are likely, as sampled tokens are
        upstream = torch.randn(rows, generator=g)
        return cls(hidden.requires_grad_(), weight.requires_grad_(), targets, upstream)


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, targets).logp  # entropy and lse come with it


def log_probs() -> Iterator[tuple[str, Logprob]]:
    yield "expo_fast", ours
    yield "eager", eager
    if hasattr(F, "linear_cross_entropy"):
        peer = partial(F.linear_cross_entropy, reduction="none", options=None)
        yield "torch F.linear_cross_entropy", lambda h, w, y: -peer(h, w, y).float()
    with suppress(ImportError):
        from cut_cross_entropy import (  # pyright: ignore[reportMissingImports]
            linear_cross_entropy,
        )

        compiled = partial(linear_cross_entropy, reduction="none", impl="torch_compile")
        yield "cut_cross_entropy torch_compile", lambda h, w, y: -compiled(h, w, y).float()


def forward(case: Case, f: Logprob) -> None:
    with torch.no_grad():
        f(case.hidden, case.weight, case.targets)


def forward_backward(case: Case, f: Logprob) -> None:
    case.hidden.grad = case.weight.grad = None
    (f(case.hidden, case.weight, case.targets).float() * case.upstream).sum().backward()


def policy(case: Case, row_weight: Tensor) -> None:
    case.hidden.grad = case.weight.grad = None
    linear_policy_loss(
        case.hidden, case.weight, case.targets, case.upstream, row_weight
    ).loss.backward()


def multiply(case: Case, out: Tensor) -> None:
    with torch.no_grad():
        torch.mm(case.hidden, case.weight.T, out=out)


def error(case: Case, f: Logprob, rows: int = 64) -> float:
    """Largest, in nats, over some rows against fp64."""
    hidden, targets = case.hidden[:rows].detach(), case.targets[:rows]
    truth = reference.linear_logprob(hidden.double(), case.weight.detach().double(), targets).logp
    with torch.no_grad():
        return (f(hidden, case.weight, targets).double() - truth).abs().max().item()


def peak_bytes(work: Callable[[], None]) -> int:
    """How far resident memory rises above where it was."""

    def read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = read("VmRSS")
    work()
    return read("VmHWM") - before


def interleaved(works: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for i in range(repeats + 1):  # the first compiles and touches memory
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(model: str, rows: int, repeats: int) -> dict:
    case = Case.make(model, rows)
    v, d = SHAPES[model]
    forward_backward(case, ours)
    case.hidden.grad = case.weight.grad = None
    # first of all: later, memory that others have freed would hide what is used
    extra = peak_bytes(partial(forward_backward, case, ours)) - 2 * d * (rows + v)
    errors = {name: error(case, f) for name, f in log_probs()}
    right = {name: f for name, f in log_probs() if errors[name] <= 2 * errors["eager"]}
    some = (torch.arange(rows) % 5 < 3).float()
    out = torch.empty(rows, v, dtype=torch.bfloat16)
    works = {"torch.mm": partial(multiply, case, out)}
    works |= {f"{name} | forward": partial(forward, case, f) for name, f in right.items()}
    works |= {f"{name} | both": partial(forward_backward, case, f) for name, f in right.items()}
    works["expo_fast policy | both"] = partial(policy, case, torch.ones(rows))
    works["expo_fast policy, 40% zero rows | both"] = partial(policy, case, some)
    seconds = interleaved(works, repeats)
    return {
        "model": model,
        "rows": rows,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "error": errors,
        "extra_bytes_over_bf16_logits": extra / (2 * rows * v),
    }


def show(result: dict) -> None:
    seconds = {name: statistics.median(x) for name, x in result["seconds"].items()}
    gemm = seconds.pop("torch.mm")
    print(f"\n{result['model']}, {result['rows']} rows, {result['threads']} threads, bf16")
    print(
        f"torch.mm {gemm:.3f} s; extra memory of forward and backward beside the gradients: ",
        end="",
    )
    print(f"{result['extra_bytes_over_bf16_logits']:.1%} of the bf16 logits")
    print(f"{'':44s}{'median s':>9s}{'spread':>14s}{'of limit':>9s}{'error':>9s}")
    for name, median in seconds.items():
        gemms = 1 if name.endswith("forward") else 4
        low, high = min(result["seconds"][name]), max(result["seconds"][name])
        off = result["error"].get(name.split(" | ")[0])
        print(
            f"{name:44s}{median:9.3f}{low:7.3f}-{high:.3f}{gemms * gemm / median:9.0%}"
            + (f"{off:9.1e}" if off is not None else "")
        )
    for part in ("forward", "both"):
        peers = {n: s for n, s in seconds.items() if n.endswith(part) and "expo_fast" not in n}
        best = min(peers, key=lambda n: peers[n])
        print(f"{part}: {peers[best] / seconds[f'expo_fast | {part}']:.2f} times as fast as {best}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    a = parser.parse_args()
    result = measure(a.model, a.rows, a.repeats)
    show(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
