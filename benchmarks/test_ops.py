"""pytest benchmarks: every op at every shape that fits, ours in pytest-benchmark's own table.

A round times the peers first, then ours; their figures are in the JSON's extra_info, and printed.
"""

import pytest

from benchmarks.cases import OURS, Group, groups
from benchmarks.measure import foreseen_seconds, gemm_rate, warm_up
from benchmarks.summary import default_device, show

pytest.importorskip("pytest_benchmark")


@pytest.fixture(scope="session")
def rate() -> float:
    return gemm_rate(default_device())


@pytest.mark.parametrize("group", groups(), ids=str)
def test_op(group: Group, rate: float, benchmark, capsys, request):
    device, limit = default_device(), request.config.getoption("max_seconds")
    rounds = request.config.getoption("benchmark_min_rounds")
    foreseen = foreseen_seconds(group, device, rounds, rate)
    if foreseen > limit:
        pytest.skip(f"would take some {foreseen:.0f} s: more than --max-seconds {limit:g}")
    race = warm_up(group, device)

    def others() -> None:
        race.lap(besides=OURS)
        race.start()

    benchmark.pedantic(
        race.finished(OURS), setup=others, teardown=lambda: race.stop(OURS), rounds=rounds
    )
    if benchmark.stats:  # not with --benchmark-disable, which leaves the check
        benchmark.extra_info.update(race.result())
        with capsys.disabled():
            show(benchmark.extra_info)
