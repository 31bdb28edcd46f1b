"""Fixtures of all tests: the same random state at the start, and ops on each backend."""

import importlib.util
import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on a CPU; must come before triton

from expo_fast.kernels.head import Forward, Gradients, Head, LogProb, RowGrads, RowwiseLoss
from expo_fast.op_backends import custom_ops, dispatch

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))


def pytest_configure() -> None:
    # a shell's background job starts with SIGINT ignored, and so would each process started here
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    # A core shared by two threads makes small matrix products some ten times slower.
    cores = len(os.sched_getaffinity(0))
    threads = max(1, min(torch.get_num_threads(), cores) // WORKERS)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that a test starts
    if importlib.util.find_spec("triton") and "TRITON_INTERPRET" in os.environ:
        patch_triton_once_per_launch()
        skip_unused_overflow_checks()


def skip_unused_overflow_checks() -> None:
    """Make Triton's interpreter faster, with the same results.

    For each sum and product of integers, the interpreter computes whether it overflows, which is
    half of its work. Then it discards the answer, because its option `debug` is off.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)


def patch_triton_once_per_launch() -> None:
    """Make Triton's interpreter faster, with the same results.

    For each launch, and again for each call of a function inside a kernel, the interpreter replaces
    the functions of `triton.language`. This takes half of the time of a test, and only the first
    replacement of a launch changes anything.
    """
    from triton.runtime import interpreter

    patch: Callable[[Callable], Any] = interpreter._patch_lang
    restore = interpreter._LangPatchScope.restore
    languages = interpreter.tl, interpreter.tl.core
    patched: set[tuple[bool, ...]] = set()

    def patch_once(function: Callable) -> Any:
        variables = function.__globals__.values()
        seen = tuple(any(x is language for x in variables) for language in languages)
        if seen in patched:
            return interpreter._LangPatchScope()
        patched.add(seen)
        return patch(function)

    def restore_and_forget(self: Any) -> None:
        patched.clear()
        restore(self)

    interpreter._patch_lang = patch_once
    interpreter._LangPatchScope.restore = restore_and_forget


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start slow tests first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def same_seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


BACKENDS = ["torch", "native", "triton", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=BACKENDS)
def each_backend(request, monkeypatch) -> str:
    """Give ops that name no backend this one, except where it does not run."""
    if request.param == "triton":
        pytest.importorskip("triton")

    def choose(name, head):
        if name is None and request.param == "cuda":
            return Elsewhere("cuda")
        if name is None and dispatch.runs(request.param, head):
            name = request.param
        return dispatch.choose(name, head)

    monkeypatch.setattr(custom_ops, "choose", choose)
    return request.param


class Elsewhere(dispatch.OnePassKernels):
    """The fastest kernels of a device, for heads on a CPU."""

    def __init__(self, device: str):
        self.device = device

    def log_probs(self, head, needs):
        there = self.move(head)
        return self.back(dispatch.choose(None, there).log_probs(there, needs))

    def gradients(self, head, forward, row_grads, needs):
        there = self.move(head)
        kernels = dispatch.choose(None, there)
        grads = kernels.gradients(there, self.move(forward), self.move(row_grads), needs)
        return self.back(grads)

    def log_probs_and_gradients(self, head, loss, needs):
        there = self.move(head)
        kernels = dispatch.choose(None, there)
        assert dispatch.has_one_pass(kernels)
        results, grads = kernels.log_probs_and_gradients(there, LossElsewhere(loss, self), needs)
        return self.back(results), self.back(grads)

    def move(self, x: Any, to: str | None = None) -> Any:
        if isinstance(x, torch.Tensor):
            return x.to(to or self.device)
        if isinstance(x, Head):
            return Head(*(self.move(y, to) for y in vars(x).values()))
        if isinstance(x, Forward | Gradients | LogProb | RowGrads):
            return type(x)(*(self.move(y, to) for y in x))
        return x

    def back(self, x: Any) -> Any:
        return self.move(x, "cpu")


class LossElsewhere:
    """A loss of rows on a CPU, for kernels of another device."""

    def __init__(self, loss: RowwiseLoss, there: Elsewhere):
        self.loss = loss
        self.there = there

    def row_grads(self, rows: slice, logp: torch.Tensor) -> RowGrads:
        return self.there.move(self.loss.row_grads(rows, logp.cpu()))


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept a random model's explanations, because none of them is right."""
    from expo_fast import train

    monkeypatch.setattr(train, "score_answers", lambda answers, texts: [1.0] * len(texts))
