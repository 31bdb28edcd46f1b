"""Whether this process is one of several that were started for a run. It imports nothing."""

import os


def is_launched() -> bool:
    """Return whether several processes were started for this run, as by `torchrun`."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def may_print() -> bool:
    """Return whether this process prints errors that all ranks have."""
    return not is_launched() or os.environ["RANK"] == "0"
