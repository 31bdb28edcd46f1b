"""pytest benchmarks: the generator beside the samplers that are installed, in the same table.

A round times the peers first, then ours; their figures are in the JSON's extra_info, and printed.
"""

import pytest

from benchmarks.decode import show, subject, warm_up
from benchmarks.samplers import OURS, PEERS, Load

pytest.importorskip("pytest_benchmark")
pytest.importorskip("transformers")

MODEL = "smollm2-135m"
LOADS = [Load(), Load(prompts=1, samples=1, new_tokens=64)]
SECONDS = 400  # that a load with all peers takes on two cores


@pytest.mark.parametrize("load", LOADS, ids=str)
def test_decode(load: Load, benchmark, capsys, request, tmp_path):
    limit = request.config.getoption("max_seconds")
    if limit < SECONDS:
        pytest.skip(f"may take {SECONDS} s: more than --max-seconds {limit:g}")
    race = warm_up(subject(MODEL, load, tmp_path), [*PEERS])

    def others() -> None:
        race.lap(besides=OURS)
        race.stopwatch.start()

    benchmark.pedantic(
        lambda: race.work(OURS),
        setup=others,
        teardown=lambda: race.stop(OURS),
        rounds=request.config.getoption("benchmark_min_rounds"),
    )
    if benchmark.stats:  # not with --benchmark-disable, which leaves the check
        benchmark.extra_info.update(race.result())
        with capsys.disabled():
            show(MODEL, benchmark.extra_info)
