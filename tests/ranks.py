"""Start the ranks of a distributed test, and compare what its runs have learnt."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from expo_fast.storage import checkpoint
from expo_fast.weights import save_model
from jobs import metrics_of, write_rows
from tiny import tiny_model, tiny_tokenizer

WORKER = Path(__file__).with_name("distributed_worker.py")
ROOT = WORKER.parents[1]
SMALL = (
    "--shots 0 --eval-every 0 --eval-limit 5 --eval-samples 2 --steps 3 --warmup-steps 1 "
    "--prompts-per-step 4 --num-generations 4 --schedule constant "
    "--max-completion-length 16 --learning-rate 1e-3 --dtype float32 --report-to none "
    "--checkpoint-every 1 --keep-checkpoints 9 --pack-tokens 200 "
)


def write_job_files(root: Path) -> str:
    """Write a model, data and a reward function. Return the flags that name them."""
    save_model(tiny_model(num_hidden_layers=2), tiny_tokenizer(), root / "model")
    save_model(tiny_model(num_hidden_layers=5), tiny_tokenizer(), root / "deep")
    rows = []
    for n in range(12):
        row = {"question": f"{n} + 1?", "answer": str(n + 1), "solution": f"{n} + 1 = {n + 1}."}
        row |= {"chosen": f"It is {n + 1}" + "!" * n, "rejected": f"{n}"}
        rows.append(row)
    write_rows(root / "train.jsonl", rows)
    held_out = [{"question": f"{n} + 2?", "answer": str(n + 2), "solution": "."} for n in range(5)]
    write_rows(root / "eval.jsonl", held_out)
    (root / "rewards.py").write_text(
        "def odd(prompts, completions, completion_ids, **columns):\n"
        "    return [float(sum(ids) % 2) for ids in completion_ids]\n"
        "def fails(prompts, completions, completion_ids, trainer_state, **columns):\n"
        "    if not trainer_state.is_world_process_zero:\n"
        "        raise KeyError('gone')\n"
        "    return odd(prompts, completions, completion_ids)\n"
    )
    return job_flags(root)


def job_flags(root: Path) -> str:
    """Return the flags that name the files of `write_job_files`."""
    return f"--model {root}/model --train-data {root}/train.jsonl --eval-data {root}/eval.jsonl "


class Ranks:
    """Some ranks that import packages until they get their jobs. See `distributed_worker.py`."""

    def __init__(self, size: int, folder: Path):
        """Start the ranks. folder: of their files."""
        folder.mkdir(parents=True, exist_ok=True)
        self._printed = [folder / f"{rank}.txt" for rank in range(size)]
        paths = os.pathsep.join([str(ROOT), str(WORKER.parent)])
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), str(size), str(free_port()), str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            text=True,
        )

    def run(self, jobs: list[dict[str, Any]]) -> None:
        """Run the jobs and end the ranks."""
        self._process.communicate(json.dumps(jobs), timeout=300)
        if self._process.returncode:
            printed = [path.read_text()[-3000:] for path in self._printed if path.exists()]
            raise AssertionError("\n".join(printed))


def run_ranks(size: int, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Run jobs on some ranks."""
    Ranks(size, folder).run(jobs)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@dataclass(frozen=True)
class Difference:
    """How far two runs are apart."""

    loss: float
    """Of the first step that has a gradient."""
    gradient: float
    """Of the same step, relative to its norm."""
    update: float
    """Of the weights after the last step, relative to the norm of their change."""


def difference(one: Path, other: Path, initial: Path) -> Difference:
    """Compare two runs that began with the same weights."""
    losses = [[row["loss"] for row in metrics_of(run)] for run in (one, other)]
    first = next(i for i, row in enumerate(metrics_of(one), start=1) if row["grad_norm"])
    # After the first step of AdamW, the first moment is the clipped gradient times 1 - beta.
    gradients = [moments(run / f"checkpoints/step-{first}") for run in (one, other)]
    start = weights(initial)
    last = len(metrics_of(one))
    ends = [weights(run / f"checkpoints/step-{last}") for run in (one, other)]
    if ends[0].keys() <= start.keys():
        change = {name: ends[0][name] - start[name] for name in ends[0]}
    else:  # adapters
        change = ends[0]
    return Difference(
        loss=abs(losses[0][first - 1] - losses[1][first - 1]),
        gradient=distance(*gradients) / norm(gradients[0]),
        update=distance(*ends) / norm(change),
    )


def moments(path: Path) -> dict[str, Tensor]:
    """Return the first moments of a checkpoint."""
    tensors = checkpoint.read_tensors(path)
    return {name: x for name, x in tensors.items() if name.endswith(".exp_avg")}


def weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of a model folder or an adapter."""
    tensors: dict[str, Tensor] = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return norm({name: one[name] - other[name] for name in one})


def norm(tensors: dict[str, Tensor]) -> float:
    squares = [x.double().square().sum() for x in tensors.values()]
    return float(torch.stack(squares).sum().sqrt())


def state_bits(path: Path) -> dict[str, bytes]:
    """Return the bits of the weights and of the optimizer's state of a checkpoint."""
    tensors = checkpoint.read_tensors(path) | weights(path)
    return {name: x.contiguous().numpy().tobytes() for name, x in tensors.items()}
