"""A Triton driver for machines without a GPU. Kernels are compiled for sm_90, but not run.

A launch binds and specialises its arguments, compiles the kernel and computes the grid, as it does
on a GPU. The outputs of a kernel keep the values that they had. `LAUNCHES` counts launches by
kernel.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

MULTIPROCESSORS = 132
SHARED_BYTES = 232448  # the most shared memory of a block
LAUNCHES: Counter[str] = Counter()


class Utils:
    """The functions of the driver's C module that the JIT calls."""

    loaded = 0

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        if shared > SHARED_BYTES:
            raise RuntimeError(
                f"{name} needs {shared} bytes of shared memory: a block has at most {SHARED_BYTES}"
            )
        self.loaded += 1
        registers, spills, most_threads = 0, 0, 1024
        return 1, self.loaded, registers, spills, most_threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_BYTES,
            "multiprocessor_count": MULTIPROCESSORS,
            "warpSize": 32,
            "max_num_regs": 65536,
        }

    def fill_tma_descriptor(self, *_: Any) -> object:
        return object()


class Launcher:
    """Count a launch and check its grid."""

    def __init__(self, src: Any, metadata: Any):
        self.name = metadata.name

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *_: Any) -> None:
        if not (0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16):
            raise RuntimeError(
                f"{self.name}: the grid is ({x}, {y}, {z}), but sizes must be at least 1 "
                "and less than 2**31, 2**16 and 2**16"
            )
        LAUNCHES[self.name] += 1


class Driver:
    """The methods of Triton's driver that a launch calls."""

    utils = Utils()
    launcher_cls = Launcher

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return 9, 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def install() -> None:
    """Make this process use the CUDA path for tensors on a CPU."""
    from expo_fast.inference import cpu_engine, cuda_engine
    from expo_fast.kernels import fused, logprob
    from expo_fast.kernels.head import Head
    from expo_fast.kernels.triton_common import INTERPRETED
    from expo_fast.op_backends import custom_ops
    from expo_fast.op_backends.dispatch import choose

    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set, but a dry run compiles kernels: unset it")
    active: Any = Driver()
    driver.set_active(active)
    logprob._Call.programs = lambda self: MULTIPROCESSORS
    logprob.supports = lambda head: True
    cuda_engine.has_triton = lambda device: True
    cuda_engine.supports = lambda model: True
    cpu_engine.supports = lambda model: False
    fused.runs = lambda *tensors: all(x.dtype.itemsize == 2 for x in tensors)

    def through_triton(name: str | None, head: Head) -> Any:
        if name is not None:
            return choose(name, head)
        from expo_fast.kernels.rowwise import ROWWISE
        from expo_fast.op_backends import triton_fused

        return triton_fused if logprob.supports(head) else ROWWISE

    custom_ops.choose = through_triton
    # Kernels write nothing, so that uninitialized memory could be read as an index.
    torch.empty = torch.zeros
    torch.empty_like = torch.zeros_like
    Tensor.new_empty = Tensor.new_zeros
