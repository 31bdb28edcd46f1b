"""The CPU kernels of csrc/: compiled on first use, then called with torch's own memory.

They need a C++ compiler and nothing else. One library per source, torch version and instruction set
is kept in the folder `native` of `cache_folder()`. EXPO_FAST_ISA names a set of FLAGS other
than the best.
"""

import ctypes
import fcntl
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from expo_fast.kernels.head import (
    NOTHING,
    Forward,
    Gradients,
    Head,
    LogProb,
    Needs,
    Slopes,
    SlopesOf,
    from_sums,
    of_live_rows,
    slopes_about_lse,
)
from expo_fast.storage.files import cache_folder

SOURCES = Path(__file__).parents[1] / "csrc"
COMMON = ["-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp"]
WIDE = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
FLAGS = {  # best first
    "amx": [*WIDE, "-DEXPO_FAST_AMX"],  # through oneDNN, which torch brings
    "avx512_bf16": [*WIDE, "-mavx512bf16"],
    "avx512": WIDE,
    "avx2": ["-mavx2", "-mfma"],
    "portable": [],
}
PARTS = {"ops": ["linear_logprob"], "engine": ["decoder", "sampling"]}  # of csrc
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SPAN = 1024  # csrc's kSpan, tokens: the weight gradient of more is summed in fp32 memory


class Unavailable(RuntimeError):
    """The kernels cannot be had here; says why, and what to do."""


def supports(head: Head) -> bool:
    on_cpu = head.hidden.device.type == head.weight.device.type == "cpu"
    return on_cpu and {head.hidden.dtype, head.weight.dtype} <= set(DTYPES)


def log_probs(head: Head, needs: Needs = NOTHING) -> Forward:
    """Forward only: one GEMM. In fp64, for `gradients` to start from. Raises Unavailable."""
    head, n = _ready(head), len(head.targets)
    anchor, base = _room((2, n), torch.float32)
    other, moment = _room((2, n), torch.float64)
    _run("anchor", head, anchor, out=[anchor])
    _run("forward", head, anchor, out=[other, moment, base])
    t = head.temperature
    shift = (base.double() - anchor) / t
    return Forward(from_sums(base.double() / t, other, moment / t, shift)[0])


def log_probs_and_gradients(
    head: Head, slopes: SlopesOf, needs: Needs
) -> tuple[LogProb, Gradients]:
    """Four GEMMs, for nothing of size (N, V) is kept; but only one for a row without slope."""
    forward = log_probs(head)
    logp = forward.results.logp.to(head.dtype)
    grads = gradients(head, forward, slopes(slice(0, len(logp)), logp), needs)
    return forward.results, grads


def gradients(head: Head, forward: Forward, slopes: Slopes, needs: Needs) -> Gradients:
    """From a forward's results: one GEMM recomputes the logits, and one a gradient follows."""
    return of_live_rows(_gradients, head, forward.results, slopes, needs)


def _gradients(head: Head, results: LogProb, slopes: Slopes, needs: Needs) -> Gradients:
    head = _ready(head)
    t = head.temperature
    # csrc's logits are before temperature
    base, c0, c1, at_target = slopes_about_lse(results, slopes, t, per_nat=t)
    grads = _empty_gradients(head, needs)
    out = _Gradients(*map(_address, (c0, c1, at_target, *grads)))
    out.d_hidden_dtype, out.d_weight_dtype = (
        0 if g is None else DTYPES[g.dtype] for g in (grads.hidden, grads.weight)
    )
    _run("backward", head, base, out=[out])
    return grads


def _empty_gradients(head: Head, needs: Needs) -> Gradients:
    n = len(head.targets)

    def like(x: Tensor, wide: bool) -> Tensor:
        keeps = x.dtype == torch.bfloat16 and not wide
        room = _room(x.shape, torch.bfloat16 if keeps else torch.float32)
        return room if n else room.zero_()

    return Gradients(
        like(head.hidden, wide=False) if needs.hidden else None,
        like(head.weight, wide=n > SPAN) if needs.weight else None,
        like(head.weight[:, 0], wide=True) if needs.bias else None,
    )


def _room(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for csrc to write, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


class _Head(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("hidden", "weight", "bias", "targets")),
        *((name, ctypes.c_void_p) for name in ("base", "exponent")),
        *((name, ctypes.c_int64) for name in ("n", "v", "d", "weight_stride")),
        *((name, ctypes.c_int32) for name in ("hidden_dtype", "weight_dtype", "threads")),
    ]


class _Gradients(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("c0", "c1", "at_target")),
        *((name, ctypes.c_void_p) for name in ("d_hidden", "d_weight", "d_bias")),
        *((name, ctypes.c_int32) for name in ("d_hidden_dtype", "d_weight_dtype")),
    ]


def _ready(head: Head) -> Head:
    """As csrc reads it: contiguous rows, and fp32 for all but hidden and weight."""
    weight, t = head.weight, head.temperature
    t = t.float() if isinstance(t, Tensor) else _room(head.targets.shape, torch.float32).fill_(t)
    return Head(
        head.hidden.contiguous(),
        weight if weight.stride(1) == 1 else weight.contiguous(),
        None if head.bias is None else head.bias.float().contiguous(),
        head.targets.contiguous(),
        t.contiguous(),
    )


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _run(name: str, head: Head, base: Tensor, out: Sequence[Tensor | _Gradients]) -> None:
    assert isinstance(head.temperature, Tensor)
    exponent = math.log2(math.e) / head.temperature
    tensors = (head.hidden, head.weight, head.bias, head.targets, base.contiguous(), exponent)
    given = _Head(
        *map(_address, tensors),
        *(*head.hidden.shape[:1], *head.weight.shape, head.weight.stride(0)),
        *(DTYPES[head.hidden.dtype], DTYPES[head.weight.dtype], torch.get_num_threads()),
    )
    results = (
        ctypes.byref(x) if isinstance(x, _Gradients) else ctypes.c_void_p(x.data_ptr()) for x in out
    )
    kernels = library(isa())
    if getattr(kernels, f"expo_fast_{name}")(ctypes.byref(given), *results):
        kernels.expo_fast_error.restype = ctypes.c_char_p
        raise RuntimeError(f"the CPU kernel {name} failed: {kernels.expo_fast_error().decode()}")


def isa() -> str:
    """The instruction set that the kernels are compiled for: a key of FLAGS."""
    wanted = os.environ.get("EXPO_FAST_ISA")
    if wanted is None:
        return next(name for name in FLAGS if _has(name))
    if wanted not in FLAGS:
        raise ValueError(f"EXPO_FAST_ISA={wanted!r}: must be one of {', '.join(FLAGS)}")
    return wanted


def _has(name: str) -> bool:
    c = torch.cpu
    if platform.machine() not in ("x86_64", "AMD64") or name == "portable":
        return name == "portable"
    if name == "amx":
        enabled = c._is_amx_tile_supported() and torch.backends.mkldnn.enabled
        try:
            return bool(enabled and library(name).expo_fast_has_amx())
        except Unavailable:  # torch came without its headers; the rest needs none
            return False
    return {
        "avx512_bf16": c._is_avx512_bf16_supported,
        "avx512": c._is_avx512_supported,
        "avx2": c._is_avx2_supported,
    }[name]()


@cache
def library(name: str, part: str = "ops") -> ctypes.CDLL:
    """A part for an instruction set, compiled where it is not there yet. Raises Unavailable."""
    command = [*COMMON, *FLAGS[name]]
    if name == "amx":
        root = Path(torch.__file__).parent
        command += [f"-I{root}/include", f"-L{root}/lib", "-ltorch_cpu", "-lc10"]
    sources = [SOURCES / f"{source}.cpp" for source in PARTS[part]]
    files = sorted([*SOURCES.glob("*.h"), *sources])
    key = hashlib.sha256(b"\0".join(path.read_bytes() for path in files))
    key.update(f"{torch.__version__} {command}".encode())
    try:
        path = cache_folder() / "native" / f"{part}-{name}-{key.hexdigest()[:16]}.so"
        return _load([*map(str, sources), *command], path)
    except (OSError, RuntimeError) as error:  # no home, no right to write, no right to run
        raise Unavailable(f"the CPU kernels cannot be had: {error}") from error


def _load(arguments: Sequence[str], path: Path) -> ctypes.CDLL:
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # cut short, or of another C++ library: make it again
            path.unlink()
    _compile(arguments, path)
    return ctypes.CDLL(str(path))


def _compile(arguments: Sequence[str], path: Path) -> None:
    wanted = os.environ.get("CXX")
    compiler = shlex.split(wanted) if wanted else _first("c++", "g++", "clang++")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several ranks, one compiles
        if path.exists():
            return
        aside = path.with_suffix(".part")
        command = [*compiler, *arguments, "-o", str(aside)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip()[-2000:]
            raise RuntimeError(f"{shlex.join(compiler)} cannot compile csrc: {reason}")
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        aside.rename(path)


def _first(*names: str) -> list[str]:
    for name in names:
        if found := shutil.which(name):
            return [found]
    raise RuntimeError(f"no C++ compiler: install one of {', '.join(names)}")
