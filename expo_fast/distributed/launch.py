"""Whether this process is one of several that were started for a run. It imports nothing."""

import os


def is_launched() -> bool:
    """Return whether several processes were started for this run, as by `torchrun`."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def prints(error: BaseException) -> bool:
    """Return whether this process prints an error. Rank 0 prints one that all ranks raise."""
    is_common = getattr(error, "main_prints", False)
    return not is_common or not is_launched() or os.environ["RANK"] == "0"
