"""Describe what this machine can run: versions, processors, compilers, backends and caches."""

import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

import expo_fast
from expo_fast.op_backends import dispatch, native_library
from expo_fast.storage.files import cache_folder

PACKAGES = (
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "math-verify",
    "flash-attn",
    "liger-kernel",
    "datasets",
    "pyarrow",
    "vl-convert-python",
    "tensorboard",
    "wandb",
    "trackio",
)
VARIABLES = (
    "EXPO_FAST_CACHE",
    "EXPO_FAST_ISA",
    "EXPO_FAST_VARIANT",
    "XDG_CACHE_HOME",
    "CXX",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "TRITON_INTERPRET",
)
GB = 1e9


def describe_machine() -> Iterator[tuple[str, str]]:
    """Yield the name and the description of each part."""
    system = f"{platform.system()} {platform.machine()}"
    yield (
        "versions",
        f"expo_fast {expo_fast.__version__}, Python {platform.python_version()}, {system}",
    )
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads"
    yield "triton", version_of("triton") or "not installed"
    yield "CPU", f"{cpu_name()}, {os.cpu_count()} cores, {available_memory('cpu') / GB:.1f} GB"
    yield "C++ kernels", describe_cpu_kernels()
    yield from describe_gpus()
    yield "backends", describe_backends()
    versions = {name: version_of(name) for name in PACKAGES}
    installed = [f"{name} {version}" for name, version in versions.items() if version]
    missing = [name for name, version in versions.items() if not version]
    yield "packages", ", ".join(installed) or "none"
    yield "not installed", ", ".join(missing) or "none of the optional packages"
    yield "cache", describe_cache()
    values = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    yield "variables", ", ".join(values) or f"none of {', '.join(VARIABLES)} is set"


def version_of(package: str) -> str | None:
    """Return the installed version of a package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_cpu_kernels() -> str:
    """Return the instruction set that is used, the others, and the compiler."""
    supported = [
        name for name in native_library.COMPILER_FLAGS if native_library.supports_isa(name)
    ]
    try:
        compiler = native_library.find_compiler()
    except RuntimeError as error:
        return f"off, PyTorch is used: {error}"
    used = native_library.isa()
    others = ", ".join(name for name in supported if name != used)
    return f"{used} (also {others}), compiled by {version_of_compiler(compiler)}"


def version_of_compiler(command: list[str]) -> str:
    """Return the first line that the compiler prints about its version."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=10)
    except OSError as error:
        return f"{command[0]} ({error.strerror})"
    except subprocess.TimeoutExpired:
        return f"{command[0]} (no answer to --version within 10 s)"
    lines = done.stdout.splitlines()
    return lines[0] if lines else command[0]


def describe_gpus() -> Iterator[tuple[str, str]]:
    """Yield one row for each GPU, or one that says why there is none."""
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        yield "GPU", f"none (torch is built {built})"
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"{device.major}.{device.minor}"
        memory = device.total_memory / GB
        yield f"GPU {index}", f"{device.name}, {memory:.0f} GB, compute capability {capability}"


def describe_backends() -> str:
    """Return the backend of the ops on each kind of device."""
    on_cpu = "native (C++)" if dispatch.compiles() else "torch"
    words = [f"{on_cpu} on the CPU"]
    if torch.cuda.is_available():
        words.append("triton on the GPU" if version_of("triton") else "torch on the GPU")
    return ", ".join(words)


def describe_cache() -> str:
    """Return the cache folder and its size."""
    folder = cache_folder()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{folder}, {size / GB:.2f} GB (EXPO_FAST_CACHE); it may be deleted"


def available_memory(device: str) -> int:
    """Return the bytes of memory of a device, within the limit of this process's control group."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *memory_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def memory_limits(membership: Path, groups: Path) -> Iterator[int]:
    """Yield the limits of this process's control groups and of those that contain them, in bytes.

    membership: a file with one line ID:CONTROLLERS:PATH for each hierarchy, cgroups(7).
    groups: the folder where the hierarchies are mounted, of version 1 or 2.
    """
    if not membership.exists():  # not Linux
        return
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = groups / controllers
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        inside = root / path.lstrip("/")
        for group in (inside, *inside.parents):
            text = ""
            with suppress(OSError):  # a container may not show its own place
                text = (group / name).read_text().strip()
            if text.isdecimal():  # otherwise "max"
                yield int(text)
            if group == root:
                break
