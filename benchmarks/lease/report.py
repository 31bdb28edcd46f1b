"""What one item found: saved after every addition, so that a kill loses nothing."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import brief, reason
from expo_fast.reporting.run_log import replace_file

DUMP_BYTES = 1 << 20  # of inputs and outputs, where a comparison fails


class Mismatch(Exception):
    """A result is further from the truth than allowed."""

    def __init__(self, message: str, tensors: Mapping[str, Tensor]):
        super().__init__(message)
        self.tensors = tensors


@dataclass
class Report:
    """An item's findings, and how it should run.

    dry: kernels are compiled and not run, so no result means anything.
    """

    name: str
    folder: Path
    dry: bool = False
    deadline: float = math.inf  # of time.monotonic()
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def left(self) -> float:
        """Seconds until the item is stopped."""
        return self.deadline - time.monotonic()

    def add(self, **values: Any) -> None:
        """Add findings and save all of them."""
        self.found |= values
        replace_file(self.file, json.dumps({"item": self.name} | self.found).encode())

    def show(self, **figures: Any) -> None:
        """Add figures that are printed in the item's line and in the table.

        A dry run has none.
        """
        if self.dry:
            return
        self.add(brief=self.found.get("brief", {}) | figures)

    def attempt(self, what: str, work: Callable[[], Any]) -> Any:
        """Return what it returns; None where it fails, whose traceback is kept under "failed".

        Raises what a lost context raises at its next call: nothing more can run in this process.
        """
        try:
            return work()
        except Exception as error:  # the rest of the item may still tell something
            self.add(failed=self.found.get("failed", {}) | {what: reason(error)})
            print(f"{what}: {reason(error)}", flush=True)
            if not self.dry:
                torch.cuda.synchronize()

    def require_all(self) -> None:
        """Raise Mismatch where an attempt failed."""
        failed = self.found.get("failed", {})
        if failed:
            whys = "; ".join(f"{what}: {brief(why)}" for what, why in failed.items())
            raise Mismatch(whys, {})

    def extend(self, key: str, value: Any) -> None:
        """Append to a list of findings."""
        self.add(**{key: [*self.found.get(key, []), value]})

    def compare(
        self, what: str, got: Tensor, truth: Tensor, allowed: float, *, worst: bool = False
    ) -> None:
        """Keep the error of `got`; raise Mismatch where it is larger than allowed, or NaN.

        The error is relative, of Frobenius norms, or the largest absolute one if `worst`.
        """
        if got.shape != truth.shape:
            raise Mismatch(f"{what}: shape {tuple(got.shape)}, not {tuple(truth.shape)}", {})
        gap = got.double() - truth.double()
        error = gap.abs().max() if worst else gap.norm() / truth.double().norm()
        value = float(error)
        shown = value if math.isfinite(value) else str(value)
        self.add(errors=self.found.get("errors", {}) | {what: shown})
        if not self.dry and not value <= allowed:
            tensors = {"got": got, "truth": truth}
            raise Mismatch(f"{what}: error {value:.2e}, allowed {allowed:.0e}", tensors)

    def require_equal(self, what: str, got: Tensor, expected: Tensor) -> None:
        """Raise Mismatch unless both are equal to the bit."""
        same = torch.equal(got, expected)
        self.add(equal=self.found.get("equal", {}) | {what: same})
        if not self.dry and not same:
            raise Mismatch(f"{what}: not equal to the bit", {"got": got, "expected": expected})

    def dump(self, tensors: Mapping[str, Tensor]) -> None:
        """Save the beginnings of the tensors."""
        if not tensors:
            return
        share = DUMP_BYTES // len(tensors)
        cut = {}
        for name, x in tensors.items():
            flat = x.detach().flatten()[: share // x.element_size()]
            cut[name] = {"shape": tuple(x.shape), "beginning": flat.cpu().clone()}
        torch.save(cut, self.folder / f"{self.name}.pt")
