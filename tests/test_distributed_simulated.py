"""The simulated steps of benchmarks/scaling.py, whose lengths are those of a recorded run."""

import json
from pathlib import Path

import pytest

from benchmarks import scaling, simulated_ranks
from benchmarks.simulated_ranks import Costs, Question, Recorded
from expo_fast.cli.flags import dump_toml
from expo_fast.config import Train
from expo_fast.modeling.packing import Sample
from jobs import write_rows
from ranks import write_job_files

COSTS = Costs(position=0.5, generated=0.25, explained=0.25, trained=1.0, update=4.0)


def question(name: str, length: int) -> Question:
    """Return a question with a prompt of two tokens and one attempt that has a gradient."""
    prompt_ids = (1, ord(name))
    sample = Sample(prompt_ids, (5,) * length)
    return Question(name, prompt_ids, [length], policy=[sample])


def config() -> Train:
    return Train(method="grpo", max_completion_length=16, pack_tokens=100)


def test_ranks_with_equal_work_do_not_wait():
    questions = [question("a", 8), question("b", 8)]
    step = simulated_ranks.simulate(questions, {}, config(), COSTS, 2)
    assert step.idle == [0, 0]
    assert step.in_passes == [0, 0]
    assert not step.is_known
    # Sampling 8 positions, and 2 + 8 tokens; a pass of 2 + 8 - 1 tokens; half of the updates.
    assert step.seconds == pytest.approx(0.5 * 8 + 0.25 * 10 + 9 + 2)


def test_a_rank_waits_for_the_one_with_the_long_texts():
    questions = [question("a", 8), question("b", 2)]
    step = simulated_ranks.simulate(questions, {}, config(), COSTS, 2)
    assert step.idle[0] == 0
    assert step.idle[1] == pytest.approx((0.5 * 6 + 0.25 * 6) / step.seconds)
    assert step.in_passes == pytest.approx([0, 6 / step.seconds])


def test_known_lengths_deal_better():
    lengths = {"a": 8, "b": 2, "c": 8, "d": 2}
    questions = [question(name, n) for name, n in lengths.items()]
    new = simulated_ranks.simulate(questions, {}, config(), COSTS, 2)
    known = simulated_ranks.simulate(questions, lengths, config(), COSTS, 2)
    assert max(new.idle) > 0
    assert known.idle == [0, 0]
    assert known.is_known


def test_a_sequence_that_ends_makes_way_for_the_next_one():
    assert simulated_ranks.n_positions([5, 1, 2], max_rows=2) == 5
    assert simulated_ranks.n_positions([5, 4, 3], max_rows=2) == 7
    assert simulated_ranks.n_positions([]) == 0


def test_the_costs_explain_the_seconds_of_the_run():
    steps = [[question("a", 8), question("b", 4)], [question("a", 6)]]
    one = [simulated_ranks.simulate(step, {}, config(), COSTS, 1) for step in steps]
    trained = [7 + 4 + 2, 7]
    rows = []
    for step, n in zip(one, trained, strict=True):
        generate = step.seconds - n - COSTS.update
        rows.append(
            {
                "time/generate": generate,
                "time/forward_backward": float(n),
                "time/optimizer": COSTS.update,
            }
        )
    run = Recorded(config(), steps, rows)
    rate = 1 / (COSTS.position + COSTS.generated)
    found = simulated_ranks.costs_of(run, rate)
    assert found.position == pytest.approx(COSTS.position)
    assert found.generated == pytest.approx(COSTS.generated)
    assert found.trained == pytest.approx(COSTS.trained)
    assert found.update == COSTS.update


def test_tables_of_a_run(tmp_path: Path):
    """A row for each number of ranks, and beside it what ranks measured."""
    flags = write_job_files(tmp_path).split()
    run = Train(
        model=flags[1],
        train_data=flags[3],
        eval_data=flags[5],
        method="grpo",
        shots=0,
        prompts_per_step=2,
        num_generations=2,
        max_completion_length=16,
    )
    (tmp_path / "config.toml").write_text(dump_toml(run))
    (tmp_path / "completions").mkdir()
    measured = {"rank/0/busy": 8.0, "rank/0/idle": 0.2, "rank/1/busy": 10.0, "rank/1/idle": 0.0}
    phases = {"time/generate": 1.0, "time/forward_backward": 2.0, "time/optimizer": 0.5}
    metrics = []
    for step in (1, 2):
        metrics.append({"step": step} | phases | measured)
        texts = []
        for line in (1, 2):
            for text, advantage in (("The answer", 1.0), ("no", -1.0)):
                texts.append(
                    {
                        "id": f"train.jsonl:{line}",
                        "kind": "own",
                        "completion": text,
                        "finish_reason": "length",
                        "advantage": advantage,
                    }
                )
        path = tmp_path / f"completions/step-{step}.jsonl"
        write_rows(path, texts)
    text = "".join(json.dumps(row) + "\n" for row in metrics)
    (tmp_path / "metrics.jsonl").write_text(text)

    found = simulated_ranks.read(tmp_path)
    first = found.steps[0][0]
    assert len(found.steps) == 2
    assert first.lengths[1] == 2
    assert len(first.policy) == 2
    costs = simulated_ranks.costs_of(found, rate=100.0)
    printed = list(simulated_ranks.lines(found, costs, ranks=(2, 8), measured=found))
    assert sum(line.startswith("| 2 | ") for line in printed) == 5  # 2 measured steps, 2 and 1
    assert sum(line.startswith("| 8 | ") for line in printed) == 2
    assert any("| 10.0 |" in line and "20.0%, 0.0%" in line for line in printed)


def test_a_run_of_one_step_has_a_time():
    row = {"time/generate": 2.0, "time/optimizer": 1.0}
    assert scaling.summary(1, [row], peak=10**9).seconds == 3.0
    assert scaling.summary(1, [row, row | {"time/generate": 4.0}], peak=10**9).seconds == 5.0
