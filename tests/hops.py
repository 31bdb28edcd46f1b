"""Trace a training step: which modules of expo_fast call which.

    python tests/hops.py [FLAGS OF expo_fast.train]

A hop is a change of module among the modules of expo_fast. A chain ends at the call of a backend.
Modules of kernels/ are not counted. Those of answers/ count as one: its rules compare the parts of
an answer by all rules again.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1] / "expo_fast"
KERNELS = (PACKAGE / "kernels").resolve()
BACKENDS = (
    "op_backends.cpu",
    "op_backends.native_layer",
    "op_backends.recomputing",
    "op_backends.native_optimizer",
    "op_backends.triton_fused",
    "inference.cpu_engine",
)
SMALL_STEP = (
    "--steps 1 --eval-every 0 --checkpoint-every 0 --prompts-per-step 2 --num-generations 2 "
    "--explanations-per-question 2 --max-completion-length 40"
)


@dataclass
class Hops:
    """Calls between modules."""

    modules: set[str] = field(default_factory=set)
    edges: set[tuple[str, str]] = field(default_factory=set)
    longest_chain: list[str] = field(default_factory=list)

    @property
    def mutual_pairs(self) -> list[tuple[str, str]]:
        """Pairs of modules that call each other."""
        return sorted((a, b) for a, b in self.edges if a < b and (b, a) in self.edges)


def trace(function: Callable[..., Any], *arguments: Any) -> Hops:
    """Call a function and return the calls between modules that it makes in this thread."""
    hops = Hops()
    stack: list[str] = []  # modules of the active frames of expo_fast
    names: dict[CodeType, str | None] = {}

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event not in ("call", "return"):
            return
        code = frame.f_code
        if code not in names:
            names[code] = module_of(code)
        module = names[code]
        if module is None:
            return
        if event == "return":
            if stack:
                stack.pop()
            return
        hops.modules.add(module)
        if stack and stack[-1] != module:
            hops.edges.add((stack[-1], module))
        stack.append(module)
        chain = chain_to_backend(stack)
        if len(chain) > len(hops.longest_chain):
            hops.longest_chain = chain

    sys.setprofile(profile)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return hops


def chain_to_backend(stack: list[str]) -> list[str]:
    """Return the modules of a stack of calls, up to the first call of a backend."""
    chain: list[str] = []
    for module in stack:
        if chain and chain[-1] in BACKENDS:
            break
        if not chain or chain[-1] != module:
            chain.append(module)
    return chain


def module_of(code: CodeType) -> str | None:
    """Return a code object's module, dotted from expo_fast, or None if it is outside expo_fast."""
    path = Path(code.co_filename)
    if not path.is_relative_to(PACKAGE) or path.resolve().is_relative_to(KERNELS):
        return None
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0] if parts[0] == "answers" else ".".join(parts)


def main() -> None:
    from expo_fast import train

    with tempfile.TemporaryDirectory() as folder:
        flags = sys.argv[1:] or SMALL_STEP.split()
        hops = trace(train.main, [*flags, "--output-dir", f"{folder}/run"])
    print(f"modules {len(hops.modules)}, edges {len(hops.edges)}")
    print(f"pairs that call each other: {hops.mutual_pairs or 'none'}")
    print(f"longest chain, {len(hops.longest_chain)} modules: {', '.join(hops.longest_chain)}")


if __name__ == "__main__":
    main()
