"""Each step is logged once, and a log that fails does not end the run."""

import importlib.util
import io
import json
import math
import resource
import shutil
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from expo_fast import train
from expo_fast.cli import exit_status
from expo_fast.reporting.console import VIEWS
from expo_fast.reporting.jsonl import read_rows
from expo_fast.reporting.run_log import RunLog
from expo_fast.reporting.timing import Phases
from expo_fast.storage.files import replace_file
from jobs import rows_in


class Terminal(io.StringIO):
    def isatty(self):
        return True


def quiet_log(run_dir, **options):
    options = {"total_steps": 10, "console": "quiet", "report_to": ()} | options
    return RunLog(run_dir, **options)


def steps_of(path):
    """Return the steps of the rows that can be read."""
    return [row["step"] for row in read_rows(path)]


def lines(stream):
    return stream.getvalue().splitlines()


def test_rows_are_plain_json_and_non_finite_numbers_are_null(tmp_path):
    with quiet_log(tmp_path) as log:
        log.write_step({"step": 1, "kl": math.nan, "a": [math.inf, {"b": -math.inf}], "none": None})
        log.write_step({"step": 2, "reward": torch.tensor(0.5), "n": torch.tensor(3), "x": 1e-300})
        log.write_evaluation({"step": 2, "pass@1": 0.25, "levels": {2: math.nan}})
        log.write_completions(2, [{"prompt": "q", "completion": "\u2028\ud800\n", "reward": None}])
    assert rows_in(tmp_path / "metrics.jsonl") == [
        {"step": 1, "kl": None, "a": [None, {"b": None}], "none": None},
        {"step": 2, "reward": 0.5, "n": 3, "x": 1e-300},
    ]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    (evaluation,) = rows_in(tmp_path / "evaluations.jsonl")
    assert evaluation == {"step": 2, "pass@1": 0.25, "levels": {"2": None}}
    (line,) = (tmp_path / "completions/step-2.jsonl").read_bytes().splitlines()
    assert json.loads(line)["completion"] == "\u2028\ud800\n"


def test_truncation_removes_later_steps_and_incomplete_lines(tmp_path):
    with quiet_log(tmp_path) as log:
        for step in range(1, 7):
            log.write_step({"step": step, "reward": step / 10})
            log.write_completions(step, [{"completion": "c"}])
        for step in (0, 3, 6):
            log.write_evaluation({"step": step, "pass@1": 0.5})
    metrics = tmp_path / "metrics.jsonl"
    content = metrics.read_bytes()
    metrics.write_bytes(
        content[: content.index(b'{"step": 2')] + b'{"step": 9, "re\n' + content[-150:]
    )
    with open(tmp_path / "evaluations.jsonl", "ab") as file:
        file.write(b'{"step": 7, "pass')
    assert steps_of(metrics) == [1, 2, 3, 4, 5, 6]
    assert steps_of(tmp_path / "evaluations.jsonl") == [0, 3, 6]
    log = quiet_log(tmp_path)
    metrics.write_bytes(content + b'{"step": 4, "rew')
    log.truncate_to(4)
    assert steps_of(metrics) == [1, 2, 3, 4]
    assert steps_of(tmp_path / "evaluations.jsonl") == [0, 3]
    assert metrics.read_bytes() == content[: content.index(b'{"step": 5')]
    names = {path.name for path in (tmp_path / "completions").iterdir()}
    assert names == {f"step-{step}.jsonl" for step in range(1, 5)}
    log.write_step({"step": 5, "reward": 0.5})
    log.write_evaluation({"step": 5, "pass@1": 1.0})
    assert [row["step"] for row in rows_in(metrics)] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows_in(tmp_path / "evaluations.jsonl")] == [0, 3, 5]


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    for content in (b"old", b"new"):
        replace_file(path, content)
        assert path.read_bytes() == content
    monkeypatch.setattr("os.fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        replace_file(path, b"half")
    assert path.read_bytes() == b"new"


def test_truncation_adds_a_missing_newline_to_a_complete_last_row(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}')
    log = quiet_log(tmp_path)
    log.truncate_to(2)
    log.write_step({"step": 3})
    assert [row["step"] for row in rows_in(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_truncation_of_an_empty_folder_does_nothing(tmp_path):
    quiet_log(tmp_path).truncate_to(2)
    assert [*tmp_path.iterdir()] == []
    assert steps_of(tmp_path / "metrics.jsonl") == []


def test_a_deleted_directory_gives_one_warning_and_the_rows_are_written_later(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    log = quiet_log(run_dir)
    log.write_step({"step": 1})
    shutil.rmtree(run_dir)
    with pytest.warns(UserWarning, match=r"metrics\.jsonl of .*run could not be written") as seen:
        for step in (2, 3, 4):
            log.write_step({"step": step})
    assert len(seen) == 1
    run_dir.mkdir()
    log.write_step({"step": 5})
    assert rows_in(run_dir / "metrics.jsonl") == [{"step": step} for step in (2, 3, 4, 5)]


def test_a_full_disk_leaves_no_incomplete_row_and_loses_none(tmp_path):
    log = quiet_log(tmp_path)
    row = {"step": 1, "text": "x" * 70}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (1000, limits[1])
    )  # a row fits in part, later rows do not fit
    try:
        with pytest.warns(UserWarning, match=r"metrics\.jsonl of .* could not be written") as seen:
            for step in range(1, 30):
                log.write_step(row | {"step": step})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(seen) == 1
    log.write_step(row | {"step": 30})
    steps = [row["step"] for row in rows_in(tmp_path / "metrics.jsonl")]
    assert steps == [*range(1, 31)]


def test_each_row_is_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", synced.append)
    with quiet_log(tmp_path) as log:
        for step in (1, 2):
            log.write_step({"step": step})
        log.write_evaluation({"step": 2})
    assert len(synced) == 3


def test_a_closed_console_gives_one_warning_and_no_error(tmp_path):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    log = quiet_log(tmp_path, console="plain", stream=Closed())
    with pytest.warns(UserWarning, match=r"console of .* could not be written .*Broken pipe"):
        for step in (1, 2):
            log.write_step({"step": step})
    assert len(rows_in(tmp_path / "metrics.jsonl")) == 2


def test_the_plain_console_prints_one_line_a_step(tmp_path):
    stream = io.StringIO()
    with quiet_log(tmp_path, console="auto", stream=stream) as log:
        log.write_step(
            {"step": 1, "reward": 0.25, "kl": None, "time/generate": 2.0, "num_tokens": 5}
        )
        log.write_step({"step": 2, "reward": 0.125, "exp/rate": 0.75, "time/generate": 1.5})
        log.write_evaluation({"step": 2, "pass@1": 0.5, "levels": {"2": 0.5}})
        log.write_completions(2, [{"completion": "unseen"}])
    first, second, third = lines(stream)
    assert first.startswith("step 1/10  reward 0.25  2.0 s  left 0:00:0")
    assert second.startswith("step 2/10  reward 0.125  exp 0.75  1.5 s  left 0:00:0")
    assert third == "evaluation: step 2  pass@1 0.5"


HOSTILE = "[red]markup[/red] [/nope] \x1b[2J\x1b]0;title\x07 \x9b31m \u202eevil\nline\r\x00"


def test_the_live_panel_shows_metrics_and_escapes_text_of_the_model(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with quiet_log(tmp_path, console="auto", stream=stream) as log:
        log.write_step({"step": 1, "num_tokens": 0})
        log.write_completions(
            3, [{"prompt": "p " * 300 + "[bold]tail", "completion": HOSTILE, "reward": 1.0}]
        )
        log.note(f"note {HOSTILE}")
        log.write_step(
            {
                "step": 3,
                "reward": 0.4375,
                "frac_reward_zero_std": 0.625,
                "exp/rate": 0.8125,
                "grad_norm/exp_sft": 0.0123,
                "learning_rate": 2e-5,
                "num_tokens": 1_000_000,
                "time/generate": 12.5,
            }
        )
    screen = stream.getvalue()
    final = screen[screen.rindex("step 3/10") :]
    for text in ("reward 0.438", "frac_reward_zero_std 0.625", "rate 0.812", "exp_sft 0.0123"):
        assert text in final
    assert "learning_rate 2e-05" in final
    assert "generate 12.5" in final
    assert "tokens/s" in final
    assert "[bold]tail" in final  # the question's end, not read as markup
    assert "[red]markup[/red] [/nope] \\x1b[2J\\x1b]0;title\\x07" in final
    assert "note [red]markup[/red] [/nope] \\x1b[2J" in screen
    for forbidden in ("\x1b[2J", "\x1b]0", "\x07", "\x9b", "\u202e", "\x00"):
        assert forbidden not in screen


def test_tokens_per_second_and_the_time_left_are_shown(tmp_path, monkeypatch):
    now = iter([100.0, 104.0, 106.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    stream = io.StringIO()
    log = quiet_log(tmp_path, console="plain", stream=stream, total_steps=1000)
    log.write_step({"step": 500, "num_tokens": 7000})  # a resumed run: one row gives no speed
    log.write_step({"step": 501, "num_tokens": 7500})
    assert lines(stream)[0] == "step 500/1000  0.0 s  left 0:33:20"  # 500 steps of 4 s
    assert lines(stream)[1] == "step 501/1000  tok/s 250  0.0 s  left 0:24:57"  # 499 steps of 3 s


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_holds_the_scalars_without_those_before_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with quiet_log(tmp_path, report_to=["tensorboard"]) as log:
        for step in (1, 2, 3):
            log.write_step({"step": step, "reward": step / 8, "kl": None})
    with quiet_log(tmp_path, report_to=["tensorboard"]) as log:
        log.truncate_to(1)
        log.write_step({"step": 2, "reward": 0.75})
        log.write_evaluation({"step": 2, "pass@1": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/pass@1", "reward"]
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.125), (2, 0.75)]


@pytest.mark.parametrize(
    "module, message",
    [("tensorboard.compat.proto", "tensorboard is not installed"), ("rich.live", "rich is not")],
)
def test_an_absent_module_is_reported_once(tmp_path, monkeypatch, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    stream = Terminal()
    console = "live" if module == "rich.live" else "plain"
    with (
        warnings.catch_warnings(),
        quiet_log(tmp_path, report_to=["tensorboard"], console=console, stream=stream) as log,
    ):
        warnings.simplefilter("error")
        for step in (1, 2):
            log.write_step({"step": step})
    assert sum(message in line for line in lines(stream)) == 1
    assert sum(line.startswith("step ") for line in lines(stream)) == 2


STEPS_OF_LOOPS = {
    "grpo": (
        {"reward": 0.5, "frac_reward_zero_std": 0.25, "exp/rate": 1.0, "kl": None, "loss": 0.1},
        "step 1/10  reward 0.5  zero_std 0.25  exp 1",
    ),
    "dpo": (
        {"loss": 0.69, "pairs": 4, "rewards/margins": 0.25, "rewards/accuracies": 0.75}
        | {"logps/chosen": -9.5, "logps/rejected": -8.0, "exp/lift": None, "grad_norm": 2.0},
        "step 1/10  loss 0.69  pairs 4  margin 0.25  accuracy 0.75  chosen -9.5  rejected -8  "
        "grad 2",
    ),
    "sft": (
        {"loss": 1.25, "expert/nll": 1.5, "num_tokens": 700, "grad_norm": 3.0, "learning_rate": 1}
        | {"expert/other": None},
        "step 1/10  loss 1.25  nll 1.5  tokens 700  grad 3  lr 1",
    ),
}


@pytest.mark.parametrize("loop", STEPS_OF_LOOPS)
def test_the_console_shows_what_matters_for_the_loop_and_no_empty_cell(tmp_path, loop, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    row, expected = STEPS_OF_LOOPS[loop]
    stream = io.StringIO()
    with quiet_log(tmp_path, console="plain", stream=stream, loop=loop) as log:
        log.write_step({"step": 1, **row})
    assert lines(stream)[0].startswith(f"{expected}  0.0 s  left")
    screen = Terminal()
    with quiet_log(tmp_path, console="live", stream=screen, loop=loop) as log:
        log.write_completions(1, [{"prompt": "q", "completion": "c", "kind": "expert"}])
        log.write_step({"step": 1, **row})
    panel = screen.getvalue()
    panel = panel[panel.rindex("step 1/10") :]
    known = {label for label, keys in VIEWS[loop].panel.items() if any(row.get(k) for k in keys)}
    for label in VIEWS[loop].panel:
        assert (f"{label} " in panel) == (label in known), label
    assert " - " not in panel
    assert "expert" in panel  # the kind of a text without a reward


class FakeTracker(ModuleType):
    """A module with the functions of wandb and trackio that we call. It records the calls.

    The services need accounts and packages that conflict with ours, so tests do not use them.
    """

    def __init__(self, name, refuses=False):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.id = "abc"
        self.calls = []
        self.refuses = refuses
        self.fails = False

    def init(self, **options):
        if self.refuses:
            raise RuntimeError("No API key configured")
        self.calls.append(("init", options))
        return self

    def define_metric(self, name, step_metric=None):
        self.calls.append(("define_metric", name, step_metric))

    def log(self, values, step=None):
        if self.fails:
            raise RuntimeError("lost connection")
        self.calls.append(("log", values, step))

    def Table(self, **table):
        return table

    def finish(self):
        self.calls.append(("finish",))

    def of(self, kind):
        return [call[1:] for call in self.calls if call[0] == kind]


STEP = {"step": 3, "reward": 0.5, "reward_std": 0.25, "clip_ratio/low": 0.125, "kl": None}
STEP |= {"rewards/f_ABC/mean": 2.0, "exp/lift": 1.5}
LOGGED = {"reward": 0.5, "reward_std": 0.25, "clip_ratio/low": 0.125}
LOGGED |= {"rewards/f_ABC/mean": 2.0, "exp/lift": 1.5}
ALIASES = {"train/reward": 0.5, "train/clip_ratio/low_mean": 0.125, "train/rewards/f_ABC/mean": 2.0}
TEXTS = [
    {"kind": "own", "prompt": "q", "answer": 7, "completion": "c", "reward": 1.0, "advantage": 0.5}
    | {"rewards": {"f_ABC": 2.0}},
    {"kind": "expert", "prompt": "q", "answer": "8", "completion": "d", "reward": None},
]
COLUMNS = ["step", "kind", "prompt", "answer", "completion", "reward", "advantage", "f_ABC"]
TABLE = [[3, "own", "q", "7", "c", 1.0, 0.5, 2.0], [3, "expert", "q", "8", "d", None, None, None]]


def test_wandb_gets_metrics_with_the_names_of_trl_and_a_table(tmp_path, monkeypatch):
    wandb = FakeTracker("wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for _ in range(2):  # a run and its resume
        with quiet_log(tmp_path, report_to=["wandb"], config={"seed": 1}) as log:
            log.write_completions(3, TEXTS)
            log.write_step(STEP)
            log.write_evaluation({"step": 3, "pass@1": 0.5, "levels": []})
    first, second = wandb.of("init")
    assert first[0] == {
        "project": "mine",
        "name": tmp_path.name,
        "dir": str(tmp_path),
        "config": {"seed": 1},
        "id": None,
        "resume": "allow",
    }
    assert second[0]["id"] == "abc"
    assert ("*", "step") in wandb.of("define_metric")
    table, step, evaluation = wandb.of("log")[:3]
    assert table == ({"step": 3, "completions": {"columns": COLUMNS, "data": TABLE}}, None)
    assert step == ({"step": 3} | LOGGED | ALIASES, None)
    assert evaluation == ({"step": 3, "eval/pass@1": 0.5}, None)
    assert wandb.calls[-1] == ("finish",)


def test_trackio_gets_the_same(tmp_path, monkeypatch):
    trackio = FakeTracker("trackio")
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    with quiet_log(tmp_path, report_to=["trackio"], config={"seed": 1}) as log:
        log.write_completions(3, TEXTS)
        log.write_step(STEP)
    ((options,),) = trackio.of("init")
    assert options["project"] == "expo_fast"
    table, step = trackio.of("log")
    frame = table[0]["completions"]["dataframe"]
    assert list(frame.columns) == COLUMNS
    assert frame["completion"].tolist() == ["c", "d"]
    assert step == (LOGGED | ALIASES, 3)
    assert trackio.calls[-1] == ("finish",)


def test_a_tracker_that_fails_gives_one_warning_and_the_run_continues(tmp_path, monkeypatch):
    wandb = FakeTracker("wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with quiet_log(tmp_path, report_to=["wandb"]) as log:
        log.write_step({"step": 1})
        wandb.fails = True
        with pytest.warns(UserWarning, match="wandb of .* could not be written .*lost") as seen:
            log.write_step({"step": 2})
            log.write_step({"step": 3})
    assert len(seen) == 1
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3]


def test_a_tracker_that_refuses_a_run_is_an_error_of_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeTracker("wandb", refuses=True))
    with pytest.raises(ValueError, match=r"report_to='wandb': No API key .* WANDB_MODE=offline"):
        quiet_log(tmp_path, report_to=["wandb"]).open_trackers()


def test_a_named_tracker_that_is_missing_ends_the_command_with_one_sentence(capsys, monkeypatch):
    real = importlib.util.find_spec
    absent = ("wandb", "trackio")
    missing = lambda name, *rest: None if name in absent else real(name, *rest)  # noqa: E731
    monkeypatch.setattr("expo_fast.reporting.trackers.find_spec", missing)
    for name in absent:
        assert exit_status.run(train.main, ["--dry-run", "--report-to", name]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: report_to={name!r}: {name} is not installed: `pip install")
    assert exit_status.run(train.main, ["--report-to", "none", "wandb"]) == 2
    assert "need none alone" in capsys.readouterr().err


def test_seconds_of_phases_are_summed_even_if_one_fails():
    now = iter([0.0, 1.5, 10.0, 10.25, 20.0, 24.0])
    phases = Phases(clock=lambda: next(now))
    with phases.phase("generate"):
        pass
    with phases.phase("reward"):
        pass
    with pytest.raises(ZeroDivisionError), phases.phase("generate"):
        _ = 1 / 0
    assert phases.seconds() == {"time/generate": 5.5, "time/reward": 0.25}
