"""The ranks of a distributed test: they train several jobs in one process group.

    python distributed_worker.py SIZE PORT FOLDER < JOBS

JOBS is a JSON list of jobs: `flags` of expo_fast.train, which may differ by rank, and `folder`, in
which RANK.json says how the job ended on a rank, and with `counts_layers` how many layers were
gathered at a time. It has jobs in common with the tests in one process, and imports take longer
than the training. Therefore this process imports everything once, and each rank is a fork of it.
What a rank prints is in FOLDER/RANK.txt.
"""

import importlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from expo_fast import train
from expo_fast.cli import exit_status
from expo_fast.distributed.world import local_part
from expo_fast.modeling.decoder import Attention, Block

LATER = (  # modules that a run imports when it needs them
    "peft",
    "torch.distributed.checkpoint",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "transformers.models.llama.configuration_llama",
    "tyro",
)


def main(size: int, port: int, folder: Path) -> None:
    """Run the jobs on all ranks. Raise SystemExit with 1 if a rank ended by an error."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", message="FSDP2-wrapped module")
    for name in LATER:
        importlib.import_module(name)
    jobs = json.load(sys.stdin)
    children = [start_rank(rank, size, port, jobs, folder) for rank in range(size)]
    statuses = [os.waitpid(child, 0)[1] for child in children]
    raise SystemExit(int(any(statuses)))


def start_rank(rank: int, size: int, port: int, jobs: list[dict[str, Any]], folder: Path) -> int:
    """Run the jobs in a new process, as torchrun starts it. Return its id."""
    child = os.fork()
    if child:
        return child
    with open(folder / f"{rank}.txt", "wb") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in variables.items()}
    status = 1
    try:
        run_jobs(rank, jobs)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_jobs(rank: int, jobs: list[dict[str, Any]]) -> None:
    """Train the jobs and write how each one ended."""
    dist.init_process_group("gloo")
    for job in jobs:
        train.score_answers = verdicts(job)
        flags = job["flags"]
        own = flags[rank] if isinstance(flags, list) else flags
        with counted_layers() if job.get("counts_layers") else nullcontext([0]) as counts:
            ended = run(own.split())
        ended["gathered_layers"] = max(counts, default=0)
        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{rank}.json").write_text(json.dumps(ended))
    dist.destroy_process_group()


@contextmanager
def counted_layers() -> Iterator[list[int]]:
    """Yield a list to which each attention layer that runs adds the number of gathered layers.

    The C++ engine is not used meanwhile, because it runs no hooks.
    """
    counts: list[int] = []
    seen: set[Block] = set()

    def count(module: nn.Module, args: Any) -> None:
        if isinstance(module, Block):
            seen.add(module)
        elif isinstance(module, Attention):
            weights = [block.mlp.up_proj.weight for block in seen]
            counts.append(sum(local_part(weight) is weight for weight in weights))

    hook = register_module_forward_pre_hook(count)
    try:
        yield counts
    finally:
        hook.remove()


def verdicts(job: dict[str, Any]) -> Any:
    """Return a verifier that accepts all texts, because no text of a random model is right."""
    return lambda answers, texts: [1.0] * len(texts)


def run(flags: list[str]) -> dict[str, Any]:
    """Train and return the exit status and the error."""
    try:
        train.main(flags)
    except SystemExit as end:
        return {"status": end.code, "error": ""}
    except (ValueError, OSError) as error:
        return {"status": exit_status.USER_ERROR, "error": str(error)}
    except Exception as error:
        notes = getattr(error, "__notes__", [])
        traceback.print_exc()
        return {"status": 1, "error": str(error), "notes": notes}
    return {"status": 0, "error": ""}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
