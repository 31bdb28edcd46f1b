"""pass@k, majority votes and intervals, and the output of an evaluation."""

import json
import shutil
from importlib.metadata import PackageNotFoundError
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from expo_fast import answers, evaluate, reward, train
from expo_fast.algorithms.run_record import options_of
from expo_fast.algorithms.training_data import select_problems
from expo_fast.cli.flags import from_toml, parse
from expo_fast.config import Evaluate, Train
from expo_fast.data import answer_grading, grader_pool
from expo_fast.data.problems import Problem
from expo_fast.evaluate import Evaluation
from expo_fast.generate import Completion
from expo_fast.reporting.accuracy import Graded, bootstrap_interval, majority_is_right, pass_at_k
from expo_fast.reporting.lm_eval import standard_error, task_name
from expo_fast.reward import grader_hash
from expo_fast.storage import checkpoint
from expo_fast.weights import save_model
from jobs import rows_in, write_rows
from tiny import tiny_model, tiny_tokenizer


def graded(texts: list[str], right: set[str], level: int | None = None) -> list[Graded]:
    """Return the samples of one problem; those whose text is in `right` have the verdict 1."""
    return [
        Graded("p", i, level, text, float(text in right), "stop", 10)
        for i, text in enumerate(texts)
    ]


def evaluation(groups: list[list[Graded]], k: tuple[int, ...] = ()) -> Evaluation:
    flat = [x for group in groups for x in group]
    return Evaluation(flat, len(groups[0]), k, "template", "grader", 1.0)


def boxes(*answers: str) -> list[str]:
    return [f"So \\boxed{{{a}}}." for a in answers]


@pytest.mark.parametrize("n", [1, 4, 6])
def test_pass_at_k_is_the_fraction_of_k_subsets_with_a_right_sample(n: int):
    for c in range(n + 1):
        for k in range(1, n + 1):
            draws = list(combinations([True] * c + [False] * (n - c), k))
            truth = sum(any(draw) for draw in draws) / len(draws)
            assert pass_at_k(n, c, k) == pytest.approx(truth)


@pytest.mark.parametrize(
    ("texts", "right", "wins"),
    [
        (boxes("3", "4", "4"), "4", True),
        (boxes("3", "4", "4"), "3", False),
        (boxes("3", "4", "4", "3"), "3", True),  # a tie: 3 was boxed first
        (boxes("3", "4", "4", "3"), "4", False),
        (["no box", *boxes("4", "3", "3", "4")], "4", True),
        (
            boxes("1/2", "7", "0.5", "7", r"\frac{1}{2}"),
            "0.5",
            True,
        ),  # 3 votes, one of them graded right
        (boxes("1,000", "9", "9", "1000", r"\$1000."), "1000", True),
        (boxes("50", "9", "9", "-50"), "9", True),
        (boxes("Yes", "no", "no", "yes", "YES"), "yes", True),
        # one vote each: math-verify does not compare votes
        (boxes("|x|+1", "9", "1+|x|"), "|x|+1", True),
        (boxes("9", "|x|+1", "1+|x|"), "|x|+1", False),
        (["4", "4", *boxes("9")], "9", True),  # no box, no vote
        (boxes("", "$ $", "9"), "9", True),  # an empty box is no vote
        (["4", "4", "4"], "4", False),
        (["\\boxed{4} or \\boxed{3}", *boxes("4", "3")], "3", True),  # its last box is its vote
        (boxes("4", "4", "4"), "5", False),
    ],
)
def test_the_most_common_answer_wins_and_ties_go_to_the_first(texts, right, wins):
    found = set(boxes(right))
    assert majority_is_right(graded(texts, found)) is wins


def test_an_answer_without_verdict_does_not_win():
    (x,) = graded(boxes("4"), set())
    undecided = Graded(x.id, x.sample, x.level, x.completion, None, x.finish_reason, x.tokens)
    assert not majority_is_right([undecided])
    assert evaluation([[undecided]]).summary()["undecided"] == 1


def test_the_summary_and_its_levels_equal_values_computed_by_hand():
    right, wrong = boxes("1", "2")
    groups = [
        graded([right] * 4, {right}, level=1),
        graded([wrong] * 4, {right}, level=1),
        graded([wrong, right, wrong, right], {right}, level=2),  # a tie that the wrong one wins
        graded([right, wrong, wrong, "the given answer"], {right}),
    ]
    row = evaluation(groups, k=(2, 4)).summary()
    assert row["problems"] == 4
    assert row["samples"] == 4
    assert row["pass@1"] == pytest.approx((1 + 0 + 0.5 + 0.25) / 4)
    assert row["pass@2"] == pytest.approx((1 + 0 + 5 / 6 + 0.5) / 4)
    assert row["pass@4"] == pytest.approx(0.75)
    assert row["majority"] == 0.25
    assert row["all_fail"] == 0.25
    assert row["leak_rate"] == 1 / 16
    assert row["boxed_ratio"] == 15 / 16
    assert (row["template"], row["grader"]) == ("template", "grader")
    for name in ("pass@1", "pass@2", "pass@4", "majority"):
        low, high = row[f"{name}/interval"]
        assert 0 <= low < row[name] < high <= 1
    easy, hard = row["levels"]
    assert (easy["level"], easy["problems"], easy["majority"]) == (1, 2, 0.5)
    assert (easy["pass@1"], easy["pass@2"], easy["all_fail"]) == (0.5, 0.5, 0.5)
    assert easy["majority/interval"] == [0, 1]
    assert (hard["level"], hard["problems"], hard["majority"]) == (2, 1, 0)
    assert (hard["pass@1"], hard["pass@4"]) == (0.5, 1)
    assert hard["pass@2"] == pytest.approx(5 / 6)
    assert hard["pass@2/interval"] == pytest.approx([5 / 6] * 2)  # one problem: no spread
    assert json.loads(json.dumps(row)) == row


def test_pass_at_1_and_at_the_number_of_samples_are_always_reported():
    row = evaluation([graded(boxes("1", "2", "1"), set(boxes("1")))]).summary()
    assert [key for key in row if key.startswith("pass@") and "/" not in key] == [
        "pass@1",
        "pass@3",
    ]


def test_the_bootstrap_interval_is_near_the_normal_one():
    low, high = bootstrap_interval([0.0] * 150 + [1.0] * 50)
    half = 1.96 * (0.25 * 0.75 / 200) ** 0.5
    assert low == pytest.approx(0.25 - half, abs=0.015)
    assert high == pytest.approx(0.25 + half, abs=0.015)


def test_the_interval_of_equal_values_is_a_point():
    assert bootstrap_interval([0.0] * 20) == (0.0, 0.0)


@pytest.mark.parametrize("k", [5, 0, -1])
def test_a_k_above_the_number_of_samples_is_refused_with_both_values(k: int):
    with pytest.raises(ValueError, match=rf"k=\(1, {k}\): .*samples=4"):
        parse(Evaluate, ["--samples", "4", "--k", "1", str(k)])
    assert Evaluate(samples=5, k=(1, 5)).k == (1, 5)


@pytest.mark.parametrize("module", [answer_grading, reward, grader_pool])
def test_the_graders_hash_changes_with_its_source(module, tmp_path, monkeypatch):
    before = grader_hash()
    assert grader_hash() == before
    source = Path(module.__file__).read_text()
    for text, same in ((source, True), (source.replace("1000", "1001"), False)):
        copy = tmp_path / "copy.py"
        copy.write_text(text)
        monkeypatch.setattr(module, "__file__", str(copy))
        assert (grader_hash() == before) is same


def test_the_graders_hash_changes_with_a_rule(tmp_path, monkeypatch):
    before = grader_hash()
    shutil.copytree(Path(answers.__file__).parent, tmp_path / "answers")
    monkeypatch.setattr(answers, "__file__", str(tmp_path / "answers" / "__init__.py"))
    assert grader_hash() == before
    with open(tmp_path / "answers" / "units.py", "a") as file:
        file.write("# edited\n")
    assert grader_hash() != before


def test_the_graders_hash_changes_with_math_verify_and_without_it(monkeypatch):
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    hashes = [grader_hash()]
    for version in (lambda name: "0.0.1", absent):
        monkeypatch.setattr(reward, "version", version)
        hashes.append(grader_hash())
    assert len(set(hashes)) == 3


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Return flags for a tiny model and three problems, each sampled twice."""
    save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    rows = [{"id": f"q{n}", "question": f"{n}?", "answer": "1", "level": n} for n in (1, 2, 3)]
    write_rows(tmp_path / "data.jsonl", rows)
    flags = f"--model {tmp_path}/model --data {tmp_path}/data.jsonl --shots 0 --samples 2"
    return [*flags.split(), "--max-completion-length", "4", "--dtype", "float32"]


def test_each_completion_is_written_with_its_verdict(given, tmp_path, monkeypatch, capsys):
    verdicts = [1.0, 0.0, None, 0.0, 1.0, 1.0]
    seen: list[str] = []

    def score(answers: list[str], texts: list[str]) -> list[float | None]:
        seen.extend(texts)
        return verdicts

    monkeypatch.setattr(evaluate, "score_answers", score)
    output = tmp_path / "graded.jsonl"
    output.write_text("of an earlier run")
    evaluate.main([*given, "--output", str(output)])
    rows = rows_in(output)
    assert [row["verdict"] for row in rows] == verdicts
    assert [row["completion"] for row in rows] == seen
    assert [(row["id"], row["sample"], row["level"]) for row in rows] == [
        (f"q{n}", i, n) for n in (1, 2, 3) for i in (0, 1)
    ]
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["pass@1"] == 0.5
    assert summary["tokens"] == sum(row["tokens"] for row in rows)
    assert [row["pass@2"] for row in summary["levels"]] == [1, 0, 1]


def test_a_failed_evaluation_leaves_the_earlier_output(given, tmp_path, monkeypatch):
    def score(answers: list[str], texts: list[str]) -> list[float | None]:
        raise RuntimeError("no verifier")

    monkeypatch.setattr(evaluate, "score_answers", score)
    output = tmp_path / "graded.jsonl"
    output.write_text("of an earlier run")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="no verifier"):
        evaluate.main([*given, "--output", str(output)])
    assert output.read_text() == "of an earlier run"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (".", "exists and is not a file"),
        ("", "exists and is not a file"),
        ("model", "exists and is not a file"),
        ("/dev/null", "exists and is not a file"),
        ("nowhere/graded.jsonl", "there is no folder nowhere"),
    ],
)
def test_an_output_that_cannot_be_a_file_is_refused_before_sampling(
    given, tmp_path, monkeypatch, output, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_model", None)  # must not be called
    with pytest.raises(ValueError, match=message):
        evaluate.main([*given, "--output", output])


def test_an_evaluation_records_its_template_and_grader(given, capsys):
    evaluate.main(given)
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["grader"] == grader_hash()
    assert len(row["template"]) == 16
    evaluate.main([*given, "--system-prompt", "Be brief."])
    other = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert other["grader"] == row["grader"]
    assert other["template"] != row["template"]


# maj@k


def test_maj_at_k_is_the_mean_over_disjoint_groups():
    right, wrong = boxes("1", "2")
    groups = [
        graded([right, right, wrong, wrong, right], {right}),  # votes of 2: right, wrong
        graded([wrong, right, right, wrong, right], {right}),  # ties: wrong, right
    ]
    row = evaluation(groups, k=(2, 3, 1)).summary()
    assert row["maj@2"] == 0.5
    assert row["maj@3"] == 1.0  # the last two samples make no group of 3
    assert row["majority"] == 1.0
    assert "maj@1" not in row and "maj@5" not in row
    assert row["maj@2/interval"] == [0.5, 0.5]
    assert "maj@2" not in evaluation(groups).summary()


# The form of lm-evaluation-harness


def test_the_results_of_lm_eval_have_its_keys(given, tmp_path, monkeypatch):
    verdicts: list[float | None] = [1.0, 0.0, None, 0.0, 1.0, 1.0]
    monkeypatch.setattr(evaluate, "score_answers", lambda answers, texts: verdicts)
    file = tmp_path / "results.json"
    evaluate.main([*given, "--lm-eval-output", str(file), "--limit", "3"])
    made = json.loads(file.read_text())
    (task,) = made["results"]
    assert task == "data"
    scores = made["results"][task]
    assert scores["alias"] == task
    assert scores["exact_match,none"] == pytest.approx(0.5)  # of 0.5, 0 and 1
    assert scores["exact_match_stderr,none"] == pytest.approx(0.5 / 3**0.5)
    assert scores["pass@2,none"] == pytest.approx(2 / 3)
    assert set(scores) >= {"maj@2,none", "maj@2_stderr,none", "pass@2_stderr,none"}
    assert made["n-samples"] == {task: {"original": 3, "effective": 3}}
    assert made["n-shot"] == {task: 0}
    assert made["higher_is_better"][task]["exact_match"] is True
    assert made["configs"][task]["num_fewshot"] == 0
    assert made["config"]["gen_kwargs"]["max_gen_toks"] == 4
    assert made["config"]["limit"] == 3
    keys = {"group_subtasks", "versions", "date", "model_name", "total_evaluation_time_seconds"}
    assert keys <= made.keys()


def test_an_output_of_lm_eval_that_cannot_be_a_file_is_refused(given):
    with pytest.raises(
        ValueError, match="--lm-eval-output 'nowhere/x': there is no folder nowhere"
    ):
        evaluate.main([*given, "--lm-eval-output", "nowhere/x"])


def test_the_standard_error_of_one_problem_is_not_known():
    assert standard_error([1.0]) == "N/A"
    assert standard_error([0.0, 1.0]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("data", "name"),
    [("gsm8k", "gsm8k"), ("a/b.test.jsonl.gz", "b"), ("hub:a/b:test", "hub__a__b__test")],
)
def test_the_name_of_a_task_can_be_the_name_of_a_file(data, name):
    assert task_name(data) == name


# A model is evaluated as it was trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with options of prompts that are not the defaults."""
    root = tmp_path_factory.mktemp("trained")
    save_model(tiny_model(), tiny_tokenizer(), root / "model")
    rows = [
        {"q": f"{n}?", "answer": str(n), "solution": f"{n}.", "level": n % 2} for n in range(40)
    ]
    write_rows(root / "data.jsonl", rows)
    flags = f"--model {root}/model --train-data {root}/data.jsonl --columns prompt=q --shots 1 "
    flags += f"--output-dir {root}/run --method sft --steps 2 --prompts-per-step 2 --levels 1 "
    flags += "--system-prompt Hi. --instruction Go! --max-completion-length 5 --dtype float32 "
    flags += "--eval-samples 2 --eval-fraction 0.3 --eval-limit 3 --checkpoint-every 1 "
    train.main([*flags.split(), "--eval-every", "2"])
    return root


def evaluated(capsys: pytest.CaptureFixture[str], *flags: object) -> tuple[dict[str, Any], str]:
    """Return the summary of an evaluation, and what it printed to stderr."""
    capsys.readouterr()
    evaluate.main([*map(str, flags), "--dtype", "float32", "--samples", "2"])
    printed = capsys.readouterr()
    return json.loads(printed.out.splitlines()[-1]), printed.err


def test_a_run_is_evaluated_as_it_was_trained(trained: Path, capsys: pytest.CaptureFixture[str]):
    last = json.loads((trained / "run/evaluations.jsonl").read_text().splitlines()[-1])
    same = ("problems", "pass@1", "mean_length", "clipped_ratio", "template", "tokens", "levels")
    for model in (trained / "run", trained / "run/checkpoints/step-2"):
        summary, err = evaluated(capsys, "--model", model)
        assert {name: summary[name] for name in same} == {name: last[name] for name in same}
        assert summary["model"] == str(trained / "run/checkpoints/step-2")
        assert summary["data"] == f"held out of {trained}/data.jsonl"
        (line,) = err.splitlines()
        assert line.startswith(f"as in training of {trained / 'run'}: shots=1, ")
        assert "system_prompt='Hi.', instruction='Go!', " in line
    assert "levels=(1,)" in line


@pytest.mark.parametrize("text", ["= 1", None])
def test_a_damaged_record_is_replaced_by_its_copy(trained, capsys, tmp_path, text):
    """A resume of the run does the same."""
    expected, _ = evaluated(capsys, "--model", trained / "run")
    shutil.copytree(trained / "run", tmp_path / "run")
    record = tmp_path / "run/config.toml"
    if text is None:
        record.unlink()
    else:
        record.write_text(text)
    for model in (tmp_path / "run", tmp_path / "run/checkpoints/step-2"):
        summary, err = evaluated(capsys, "--model", model)
        for name in ("problems", "pass@1", "template", "tokens"):
            assert summary[name] == expected[name]
        warning, same = err.splitlines()
        assert warning.startswith(f"warning: {record} is ")
        assert warning.endswith(": the options are those of the newest checkpoint")
        assert "system_prompt='Hi.', instruction='Go!', " in same


def test_a_flag_overrides_the_record_and_the_difference_is_said(trained, capsys):
    kept, _ = evaluated(capsys, "--model", trained / "run")
    flags = ("--instruction", "Stop!", "--max-completion-length", 3, "--levels")
    other, err = evaluated(capsys, "--model", trained / "run", *flags)
    assert other["template"] != kept["template"]
    assert other["mean_length"] <= 3
    same, line = err.splitlines()
    assert "shots=1" in same
    assert "instruction=" not in same
    assert line == (
        f"evaluated otherwise than trained in {trained / 'run'}: instruction='Stop!' (in training "
        "'Go!'), levels=() (in training (1,)), max_completion_length=3 (in training 5)"
    )


def test_other_problems_are_asked_as_those_of_training(trained, capsys, tmp_path):
    rows = [{"question": "What?", "answer": "1", "level": 1}]
    (tmp_path / "other.jsonl").write_text(json.dumps(rows[0]) + "\n")
    kept, _ = evaluated(capsys, "--model", trained / "run")
    summary, _ = evaluated(capsys, "--model", trained / "run", "--data", tmp_path / "other.jsonl")
    assert (summary["problems"], summary["template"]) == (1, kept["template"])
    given = ("--columns", "prompt=q", "--limit", 2, "--max-completion-length", 2)
    given += ("--model", trained / "model", "--data", trained / "data.jsonl")
    summary, err = evaluated(capsys, *given)
    assert "as in training" not in err
    assert summary["template"] != kept["template"]


def test_another_dtype_than_in_training_is_said(trained, capsys):
    """The default is bfloat16, in which a run of float32 has other results."""
    capsys.readouterr()
    evaluate.main(["--model", str(trained / "run"), "--samples", "1"])
    _, line = capsys.readouterr().err.splitlines()
    where = trained / "run"
    assert line == (
        f"evaluated otherwise than trained in {where}: dtype='bfloat16' (in training 'float32')"
    )


def test_an_evaluation_counts_the_reasons_of_its_verdicts():
    texts = iter([r"\boxed{1}", r"\boxed{2}", r"\boxed{|x|+1}", "no box"])
    generator = SimpleNamespace(
        sample=lambda requests: [Completion([5], torch.zeros(1), "stop") for _ in requests]
    )
    prompter = SimpleNamespace(
        solve=lambda problem: (4,),
        text=lambda ids: next(texts),
        stop_strings=(),
        template_hash="",
    )
    problems = [Problem("a", "?", "1"), Problem("b", "?", "1+|x|")]
    options = {"samples": 2, "temperature": 1.0, "max_new_tokens": 1, "seed": 0}
    given: tuple[Any, Any, Any] = (generator, prompter, problems)
    result = evaluate.evaluate(*given, reward.score_answers, **options)
    summary = result.summary()
    reasons = ["exact", "wrong", "symbolic", "no_answer"]
    assert [each.reason for each in result.graded] == reasons
    assert summary["verdicts"] == dict.fromkeys(reasons, 1)
    texts = iter(["a", "b", "c", "d"])
    result = evaluate.evaluate(*given, lambda answers, texts: [1.0] * len(texts), **options)
    assert result.summary()["verdicts"] == {}


def test_a_level_is_evaluated_on_problems_that_were_held_out(tmp_path, capsys):
    """Before, as many problems of the level were held out as the run held out of all levels."""
    save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    rows = [{"question": f"{n}?", "answer": str(n), "level": n % 4} for n in range(200)]
    source = tmp_path / "data.jsonl"
    source.write_text("".join(json.dumps(row | {"cot": "So."}) + "\n" for row in rows))
    flags = f"--model {tmp_path}/model --train-data {source} --columns solution=cot --method sft "
    flags += f"--output-dir {tmp_path}/run --steps 1 --prompts-per-step 2 --dtype float32 "
    flags += "--eval-limit 12 --max-completion-length 2 --eval-samples 1"
    train.main(flags.split())
    config = from_toml(Train, tmp_path / "run/config.toml")
    held_out = [problem.id for problem in select_problems(config).held_out if problem.level == 3]
    assert 0 < len(held_out) < 12
    output = tmp_path / "graded.jsonl"
    evaluated(capsys, "--model", tmp_path / "run", "--levels", 3, "--output", output)
    ids = {json.loads(line)["id"] for line in output.read_text().splitlines()}
    assert ids == set(held_out)


def test_other_data_may_lack_a_column_that_the_run_names(tmp_path, capsys, trained):
    """A run that names the column of its solutions is evaluated on data without solutions."""
    shutil.copytree(trained / "run", tmp_path / "run")
    record = tmp_path / "run/config.toml"
    named = record.read_text().replace('["prompt=q"]', '["prompt=q", "solution=cot"]')
    record.write_text(named.replace("shots = 1", "shots = 0"))
    for path in (tmp_path / "run/checkpoints").iterdir():  # their copies of the record
        state = path / "trainer_state/state.json"
        values = json.loads(state.read_text())
        values["options"] = options_of(from_toml(Train, record))
        state.write_text(json.dumps(values))
        (path / checkpoint.MANIFEST).unlink()
        checkpoint._write_manifest(path, values["step"])
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"question": "What?", "answer": "1", "level": 1}) + "\n")
    summary, _ = evaluated(capsys, "--model", tmp_path / "run", "--data", other)
    assert summary["problems"] == 1
    flags = ("--model", str(tmp_path / "run"), "--data", str(other), "--columns", "solution=cott")
    with pytest.raises(ValueError, match="no column 'cott' for 'solution'"):
        evaluate.main(list(flags))


def test_other_prompts_than_in_training_are_said(trained, capsys, tmp_path):
    """The chat template of a checkpoint was edited after the training."""
    shutil.copytree(trained / "run", tmp_path / "run")
    model = tmp_path / "run/checkpoints/step-2"
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("message.role", "message.role | upper"))
    _, err = evaluated(capsys, "--model", model)
    assert err.splitlines()[1].startswith("the prompts differ from those of training in")


def test_a_run_without_a_checkpoint_or_held_out_problems_is_refused(trained, capsys, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-2")
    record = tmp_path / "run/config.toml"
    record.write_text(record.read_text().replace("eval_every = 2", "eval_every = 0"))
    with pytest.raises(ValueError, match="has no held-out problems: name some with --data"):
        evaluate.main(["--model", str(tmp_path / "run")])
    shutil.rmtree(tmp_path / "run/checkpoints/step-1")
    with pytest.raises(ValueError, match="the run has no complete checkpoint"):
        evaluate.main(["--model", str(tmp_path / "run")])
