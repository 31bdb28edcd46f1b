"""Whether this process is one of several that were started for a run, and prints its errors.

It imports no other package.
"""

import os

from expo_fast.distributed.error_reach import Reach, reach_of


def is_launched() -> bool:
    """Return whether several processes were started for this run, as by `torchrun`."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def prints(error: BaseException) -> bool:
    """Return whether this process prints an error. Rank 0 prints one that all ranks raise."""
    if reach_of(error) is not Reach.RAISED_BY_ALL or not is_launched():
        return True
    return os.environ["RANK"] == "0"
