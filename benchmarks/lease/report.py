"""Findings of one item. They are saved after every addition, so that a kill loses nothing."""

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

DUMP_BYTES = 1 << 20  # of tensors that are saved when a comparison fails


class Mismatch(Exception):
    """A result differs from the truth by more than is allowed."""

    def __init__(self, message: str, tensors: Mapping[str, Tensor]):
        super().__init__(message)
        self.tensors = tensors


@dataclass
class Report:
    """The findings of an item, and the settings that it runs with.

    dry: whether kernels are only compiled. Results mean nothing then, and comparisons always pass.
    """

    name: str
    folder: Path
    dry: bool = False
    deadline: float = math.inf  # on the clock of time.monotonic()
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def left(self) -> float:
        """Return the seconds until the item is stopped."""
        return self.deadline - time.monotonic()

    def add(self, **values: Any) -> None:
        """Add findings and save all findings."""
        self.found |= values
        replace_file(self.file, json.dumps({"item": self.name} | self.found).encode())

    def show(self, **figures: Any) -> None:
        """Add figures that are printed in the line of the item and in the table.

        In a dry run, do nothing.
        """
        if self.dry:
            return
        self.add(brief=self.found.get("brief", {}) | figures)

    def attempt(self, what: str, work: Callable[[], Any]) -> Any:
        """Return the result of the work, or None if it fails.

        The traceback of a failure is saved under "failed". Raise an error if the CUDA context is
        lost, because nothing more can run in this process then.
        """
        try:
            return work()
        except Exception as error:  # the rest of the item is still useful
            self.add(failed=self.found.get("failed", {}) | {what: reason(error)})
            print(f"{what}: {reason(error)}", flush=True)
            if not self.dry:
                torch.cuda.synchronize()

    def require_all(self) -> None:
        """Raise Mismatch if an attempt failed."""
        failed = self.found.get("failed", {})
        if failed:
            reasons = "; ".join(f"{what}: {brief(why)}" for what, why in failed.items())
            raise Mismatch(reasons, {})

    def extend(self, key: str, value: Any) -> None:
        """Append to a list of findings."""
        self.add(**{key: [*self.found.get(key, []), value]})

    def compare(
        self, what: str, got: Tensor, truth: Tensor, allowed: float, *, worst: bool = False
    ) -> None:
        """Save the error of `got`. Raise Mismatch if it is NaN or larger than allowed.

        worst: whether the error is the largest absolute difference. Otherwise it is the Frobenius
        norm of the difference, relative to that of the truth.
        """
        if got.shape != truth.shape:
            shape = tuple(got.shape)
            raise Mismatch(f"{what}: the shape is {shape} and must be {tuple(truth.shape)}", {})
        gap = got.double() - truth.double()
        error = gap.abs().max() if worst else gap.norm() / truth.double().norm()
        value = float(error)
        shown = value if math.isfinite(value) else str(value)
        self.add(errors=self.found.get("errors", {}) | {what: shown})
        if not self.dry and not value <= allowed:
            tensors = {"got": got, "truth": truth}
            raise Mismatch(f"{what}: error {value:.2e}, allowed {allowed:.0e}", tensors)

    def require_equal(self, what: str, got: Tensor, expected: Tensor) -> None:
        """Raise Mismatch if the tensors are not equal to the bit."""
        same = torch.equal(got, expected)
        self.add(equal=self.found.get("equal", {}) | {what: same})
        if not self.dry and not same:
            raise Mismatch(f"{what}: not equal to the bit", {"got": got, "expected": expected})

    def dump(self, tensors: Mapping[str, Tensor]) -> None:
        """Save the first values of the tensors."""
        if not tensors:
            return
        share = DUMP_BYTES // len(tensors)
        beginnings = {}
        for name, x in tensors.items():
            flat = x.detach().flatten()[: share // x.element_size()]
            beginnings[name] = {"shape": tuple(x.shape), "beginning": flat.cpu().clone()}
        torch.save(beginnings, self.folder / f"{self.name}.pt")
