"""Compile the C++ sources of csrc/ into shared libraries, load them and check their structs.

A library needs a C++ compiler and nothing else. It is compiled on first use and kept in the folder
`native` of `cache_folder()`: one file per part of csrc, instruction set, source and torch version.
The environment variable EXPO_FAST_ISA names an instruction set of `COMPILER_FLAGS` other than the
best one.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expo_fast.storage.files import cache_folder

SOURCES = Path(__file__).parents[1] / "csrc"
COMMON_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp"]
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
COMPILER_FLAGS = {  # by instruction set, the fastest first
    "amx": [*AVX512_FLAGS, "-DEXPO_FAST_AMX"],  # multiplies with torch's oneDNN
    "avx512_bf16": [*AVX512_FLAGS, "-mavx512bf16"],
    "avx512": AVX512_FLAGS,
    "avx2": ["-mavx2", "-mfma"],
    "portable": [],
}
PARTS = {  # source files of csrc, by library
    "ops": ["linear_logprob"],
    "engine": ["decoder", "sampling"],
    "layer": ["layer", "attention"],
    "optimizer": ["optimizer"],
}
PART_FLAGS = {  # of the parts that need more flags
    # the roundings of PyTorch's AdamW; a vectorised square root
    "optimizer": ["-ffp-contract=off", "-fno-math-errno"],
}
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of common.h


class Unavailable(RuntimeError):
    """The C++ kernels cannot be compiled or loaded. The message says why and what to do."""


def isa() -> str:
    """Return the instruction set to compile for: a key of COMPILER_FLAGS.

    It is $EXPO_FAST_ISA if set, else the fastest one on this CPU. Raise ValueError for an unknown
    name.
    """
    wanted = os.environ.get("EXPO_FAST_ISA")
    if wanted is None:
        return _fastest_isa()
    if wanted not in COMPILER_FLAGS:
        names = ", ".join(COMPILER_FLAGS)
        raise ValueError(f"EXPO_FAST_ISA={wanted!r}: must be one of {names}")
    return wanted


@cache
def _fastest_isa() -> str:
    for name in COMPILER_FLAGS:
        if name == "avx512_bf16" and _has_slow_bf16_products():
            continue
        if supports_isa(name):
            return name
    raise AssertionError("every CPU supports portable code")


def _has_slow_bf16_products() -> bool:
    """Return whether products of bf16 values are slower than those of their fp32 copies.

    They are on Intel's CPUs without AMX, for example where a virtual machine hides AMX: Emerald
    Rapids multiplies 85 GFLOP/s a core by VDPBF16PS, and 176 by fused multiply-adds of fp32.
    """
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "GenuineIntel" in processor


def supports_isa(name: str) -> bool:
    """Return whether this CPU supports the instruction set and, for "amx", this torch too."""
    if name == "portable":
        return True
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    if name == "amx":
        return _supports_amx()
    if name == "avx512_bf16":
        return torch.cpu._is_avx512_bf16_supported()
    if name == "avx512":
        return torch.cpu._is_avx512_supported()
    return torch.cpu._is_avx2_supported()


def _supports_amx() -> bool:
    if not torch.cpu._is_amx_tile_supported() or not torch.backends.mkldnn.enabled:
        return False
    try:
        return bool(library("amx").expo_fast_has_amx())
    except Unavailable:  # torch's headers are missing, which only "amx" needs
        return False


@cache
def library(isa_name: str, part: str = "ops") -> ctypes.CDLL:
    """Return a part of csrc for an instruction set. Compile it if it is not in the cache.

    isa_name: a key of COMPILER_FLAGS.
    part: a key of PARTS.
    Raise Unavailable if the library cannot be compiled or loaded.
    """
    flags = [*COMMON_FLAGS, *COMPILER_FLAGS[isa_name], *PART_FLAGS.get(part, [])]
    if isa_name == "amx":
        root = Path(torch.__file__).parent
        flags += [f"-I{root}/include", f"-L{root}/lib", "-ltorch_cpu", "-lc10"]
    sources = [SOURCES / f"{source}.cpp" for source in PARTS[part]]
    files = sorted([*SOURCES.glob("*.h"), *sources])
    key = hashlib.sha256(b"\0".join(path.read_bytes() for path in files))
    key.update(f"{torch.__version__} {flags}".encode())
    try:
        path = cache_folder() / "native" / f"{part}-{isa_name}-{key.hexdigest()[:16]}.so"
        return _load([*map(str, sources), *flags], path)
    except (OSError, RuntimeError) as error:  # no compiler, no home folder or no permission
        raise Unavailable(f"the C++ kernels are not available: {error}") from error


def _load(arguments: Sequence[str], path: Path) -> ctypes.CDLL:
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # truncated, or made with another C++ standard library: compile it again
            path.unlink()
    _compile(arguments, path)
    return ctypes.CDLL(str(path))


def _compile(arguments: Sequence[str], path: Path) -> None:
    compiler = find_compiler()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process compiles, and the others wait
        if path.exists():
            return
        unfinished = path.with_suffix(".part")
        command = [*compiler, *arguments, "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip()[-2000:]
            raise RuntimeError(f"{shlex.join(compiler)} cannot compile csrc: {reason}")
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        unfinished.rename(path)


def find_compiler() -> list[str]:
    """Return the command of the C++ compiler: $CXX, or the first known one that is installed.

    Raise RuntimeError if there is none.
    """
    wanted = os.environ.get("CXX")
    if wanted:
        return shlex.split(wanted)
    names = ("c++", "g++", "clang++")
    for name in names:
        if found := shutil.which(name):
            return [found]
    raise RuntimeError(f"no C++ compiler: install one of {', '.join(names)}")


# Structs that Python passes to C++


def struct_fields(kind: type, names: str) -> list[tuple[str, type]]:
    """Return fields of one C type for a ctypes.Structure. `names` are separated by spaces."""
    return [(name, kind) for name in names.split()]


def address(x: Tensor | None) -> int | None:
    """Return the address of a tensor's first element as a C pointer; None is the null pointer."""
    return None if x is None else x.data_ptr()


def check_struct_sizes(
    loaded: ctypes.CDLL, structs: Mapping[str, type[ctypes.Structure]]
) -> ctypes.CDLL:
    """Return the library after checking that structs have the same size in Python and in C++.

    structs: declarations by NAME. The library's expo_fast_sizeof_NAME() returns the size in C++.
    EXPO_FAST_SIZEOF(NAME, struct) of common.h defines it.
    Raise RuntimeError if sizes differ.
    """
    for name, declared in structs.items():
        size_in_cpp = getattr(loaded, f"expo_fast_sizeof_{name}")
        size_in_cpp.restype = ctypes.c_int64
        expected = size_in_cpp()
        if ctypes.sizeof(declared) != expected:
            raise RuntimeError(
                f"struct {name} has {ctypes.sizeof(declared)} bytes in Python"
                f" ({declared.__module__}.{declared.__qualname__}) and {expected} in csrc: declare"
                " the same fields in both"
            )
    return loaded


class Part:
    """A part of csrc that is called with structs, for the instruction set `isa()`.

    name: a key of PARTS.
    structs: as in `check_struct_sizes`.
    """

    def __init__(self, name: str, structs: Mapping[str, type[ctypes.Structure]]):
        self.name = name
        self.structs = structs

    def library(self) -> ctypes.CDLL:
        """Return the library. Raise Unavailable if it cannot be compiled or loaded."""
        return checked_library(self, isa())

    def is_available(self) -> bool:
        """Return whether the library can be compiled and loaded. `dispatch.compiles` warns."""
        return _is_available(self, isa())

    def call(self, name: str, *arguments: Any) -> None:
        """Call expo_fast_NAME. Raise RuntimeError with its reason if it fails."""
        kernels = self.library()
        if getattr(kernels, f"expo_fast_{name}")(*arguments):
            kernels.expo_fast_error.restype = ctypes.c_char_p
            reason = kernels.expo_fast_error().decode()
            raise RuntimeError(f"the CPU kernel {name} failed: {reason}")


@cache
def checked_library(part: Part, isa_name: str) -> ctypes.CDLL:
    """Return the library of a part for an instruction set, after a check of its structs."""
    return check_struct_sizes(library(isa_name, part.name), part.structs)


@cache
def _is_available(part: Part, isa_name: str) -> bool:
    try:
        checked_library(part, isa_name)
    except Unavailable:
        return False
    return True
