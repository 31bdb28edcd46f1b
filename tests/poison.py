"""Fill memory that is yet to be written with NaN, so that a read before the first write shows.

The memory of a fresh process is mostly zeros. A kernel that reads an element before it writes it,
or leaves one unwritten, then passes its tests.
"""

import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from expo_fast.inference.cpu_engine import NativeEngine
from expo_fast.op_backends import native_library

POISON_FLAG = "-DEXPO_FAST_POISON"  # see `poison` of csrc/common.h
STACK_FLAG = "-ftrivial-auto-var-init=pattern"  # local variables of C++; GCC 12, clang 8


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill the memory that torch and csrc allocate inside with NaN.

    Integers get the largest value of their type, which is no token, row or page. The bytes of a
    workspace are 0xFF, which are NaN in every float type. The workspace of a native engine, which
    its calls share, is filled for each call.

    On a CPU, results have the same bits as outside.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_library, "COMMON_FLAGS", poisoned_flags())
        patch.setattr(NativeEngine, "_workspace", _poisoned_workspace)
        _forget_libraries()
        try:
            with poisoned_tensors():
                yield
        finally:
            _forget_libraries()


@contextmanager
def poisoned_tensors() -> Iterator[None]:
    """Fill what torch's `empty`, its relatives and `resize_` return, and leave csrc as it is.

    torch fills memory in its deterministic mode alone. On a CPU that mode changes no bit of what
    this package computes. On a GPU it takes other algorithms, and warns where it has none.
    """
    deterministic: Any = torch.utils.deterministic
    mode = torch.get_deterministic_debug_mode()
    fills = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = fills
        torch.set_deterministic_debug_mode(mode)


@cache
def poisoned_flags() -> list[str]:
    """Return the compiler flags of the poisoned library."""
    flags = [*native_library.COMMON_FLAGS, POISON_FLAG]
    command = [*native_library.find_compiler(), STACK_FLAG, "-fsyntax-only", "-xc++", "/dev/null"]
    if subprocess.run(command, capture_output=True).returncode == 0:
        flags.append(STACK_FLAG)
    return flags


def _forget_libraries() -> None:
    """Let the next call of csrc take the library of the flags of the moment."""
    native_library.library.cache_clear()
    native_library.checked_library.cache_clear()


_lent_workspace = NativeEngine._workspace


def _poisoned_workspace(engine: NativeEngine, size: int) -> Tensor:
    return _lent_workspace(engine, size).fill_(0xFF)


def require_same_bits(compute: Callable[[], Iterable[Tensor]]) -> None:
    """Assert that results are finite, and have the same bits where fresh memory is NaN."""
    expected = list(compute())
    with poisoned():
        found = list(compute())
    assert len(found) == len(expected)
    for index, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert y.isfinite().all(), f"result {index} is not finite"
        assert x.dtype == y.dtype and x.shape == y.shape
        wrong = (x != y).nonzero().tolist()
        assert not wrong, f"result {index} depends on fresh memory at {wrong[:5]}"
