"""Every test starts from the same random state, on the cores that this process may use."""

import os
import random
import signal

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on a CPU; must come before triton

from expo_fast import backends, library


def pytest_configure() -> None:
    # a shell's background job starts with SIGINT ignored, and so would everything started from here
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # a core shared by two threads makes small matrix products some ten times slower
    torch.set_num_threads(min(torch.get_num_threads(), len(os.sched_getaffinity(0))))


@pytest.fixture(autouse=True)
def same_seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=["torch", "native", "triton"])
def each_backend(request, monkeypatch) -> str:
    """Ops that are asked for no backend get this one, but where it does not run."""
    if request.param == "triton":
        pytest.importorskip("triton")

    def choose(name, head):
        if name is None and backends.runs(request.param, head):
            name = request.param
        return backends.choose(name, head)

    monkeypatch.setattr(library, "choose", choose)
    return request.param
