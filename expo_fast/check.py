"""Check this machine: python -m expo_fast.check [flags of expo_fast.train].

It prints what the machine can run, and tests each op in seconds. With flags of a training run, it
also estimates the run's memory by part, without loading the model's weights. The exit status is 2
if an op is wrong.
"""

if __name__ == "__main__":  # before the imports below, because one of their packages may be missing
    from expo_fast.cli.exit_status import run_command

    raise SystemExit(run_command("check"))

from collections.abc import Sequence
from typing import TYPE_CHECKING

from expo_fast.inspection.machine import describe_machine
from expo_fast.inspection.op_checks import OpResult, check_ops

if TYPE_CHECKING:
    from expo_fast.config import Train


def main(argv: Sequence[str]) -> None:
    """Run the command line. Raise ValueError or OSError for an error that a user can correct."""
    if any(word in ("-h", "--help") for word in argv):
        print(__doc__.strip() if __doc__ else "")
        return
    config = read_flags(argv) if argv else None
    for name, text in describe_machine():
        print(f"{name:<14} {text}")
    print()
    results = []
    print(f"{'op':<23} {'backend':<8} {'dtype':<9} {'error':>8} {'PyTorch':>8}")
    for result in check_ops():
        results.append(result)
        print(line_of(result), flush=True)
    wrong = [result for result in results if not result.ok]
    if config is not None:
        print()
        print_memory(config)
    if wrong:
        names = ", ".join(f"{each.op} on {each.backend} in {each.dtype}" for each in wrong)
        raise ValueError(
            f"wrong results: {names}; use backend='torch', and report this machine's table"
        )


def line_of(result: OpResult) -> str:
    dtype = str(result.dtype).removeprefix("torch.")
    verdict = "ok" if result.ok else "WRONG"
    return (
        f"{result.op:<23} {result.backend:<8} {dtype:<9} {result.error:8.1e} "
        f"{result.plain_error:8.1e} {verdict}"
    )


def read_flags(argv: Sequence[str]) -> "Train":
    """Return the configuration of a run with these flags. Raise ValueError if it cannot run."""
    from expo_fast.algorithms.resume import with_recorded_options
    from expo_fast.cli.flags import parse
    from expo_fast.config import Train
    from expo_fast.weights import find_device

    config = with_recorded_options(parse(Train, argv))
    find_device(config.device)
    return config


def print_memory(config: "Train") -> None:
    """Print the memory of a run."""
    from expo_fast.inspection.memory import estimate_run, memory_lines
    from expo_fast.inspection.pack_size import with_pack_tokens

    config = with_pack_tokens(config)
    estimate = estimate_run(config)
    for line in memory_lines(config, estimate):
        print(line)
