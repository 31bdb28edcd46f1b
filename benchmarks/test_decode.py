"""Time the generator and the other samplers that are installed: run `pytest benchmarks`.

A round times the peers first and then ours. The table of pytest-benchmark shows ours. The figures
of all are printed, and are in the extra_info of the JSON.
"""

import pytest

from benchmarks.decode import make_subject, show, warm_up
from benchmarks.measure import ceilings
from benchmarks.samplers import OURS, SAMPLERS, Load

pytest.importorskip("pytest_benchmark")
pytest.importorskip("transformers")

MODEL = "smollm2-135m"
LOADS = [Load(), Load(prompts=1, samples=1, new_tokens=64)]
SECONDS = 400  # the time that a load with all peers takes on two cores


@pytest.mark.parametrize("load", LOADS, ids=str)
def test_decode(load: Load, benchmark, capsys, request, tmp_path):
    limit = request.config.getoption("max_seconds")
    if limit < SECONDS:
        pytest.skip(f"may take {SECONDS} s, more than --max-seconds {limit:g}")
    subject = make_subject(MODEL, load, tmp_path)
    comparison = warm_up(subject, SAMPLERS, ceilings(subject.device))

    def time_peers() -> None:
        comparison.run_round(without=OURS)
        comparison.stopwatch.start()

    benchmark.pedantic(
        lambda: comparison.run(OURS),
        setup=time_peers,
        teardown=lambda: comparison.stop(OURS),
        rounds=request.config.getoption("benchmark_min_rounds"),
    )
    if benchmark.stats:  # None with --benchmark-disable, which only checks the results
        benchmark.extra_info.update(comparison.result())
        with capsys.disabled():
            show(MODEL, benchmark.extra_info)
