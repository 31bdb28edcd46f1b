"""Warnings that name the line of the user's code that called the package."""

import sys
import warnings
from types import FrameType

# torch's decorators, such as `torch.no_grad()`, call our functions.
SKIPPED_PACKAGES = ("expo_fast", "torch")


def warn_caller(message: str) -> None:
    """Issue a UserWarning at the innermost line outside the package.

    `warnings.warn` can skip the files of a package itself from Python 3.12 on.
    """
    frame: FrameType | None = sys._getframe(1)
    level = 2  # of `warnings.warn`, for the caller of this function
    while frame is not None and _package_of(frame) in SKIPPED_PACKAGES:
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level)


def _package_of(frame: FrameType) -> str:
    """Return the top-level package of the module whose code a frame runs."""
    module: str = frame.f_globals.get("__name__", "")
    return module.partition(".")[0]
