"""Large data sets: tables of problems, reading in several processes, checks by length, orders."""

import dataclasses
import datetime
import hashlib
import json
import random
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from expo_fast.algorithms import training_data
from expo_fast.algorithms.trainer import EpochOrder, questions_of_step
from expo_fast.config import Train
from expo_fast.data import large_files, problems, row_reading
from expo_fast.data.files import LINE_BYTES, Row
from expo_fast.data.problem_table import ProblemTable
from expo_fast.data.problems import Problem, fingerprint, load_problems, same_fingerprint
from expo_fast.data.prompts import Prompter
from expo_fast.data.row_blocks import most_tokens
from expo_fast.data.row_reading import RowOptions, read_row
from tiny import tiny_tokenizer

CHAT = ({"role": "system", "content": "s"}, {"role": "user", "content": "Q?"})
MIXED = [
    Problem("1", "Q?", "7", "It is \\boxed{7}.", 3, {"b": [1, {"c": None}], "a": 1.5}),
    Problem("2", CHAT, "7"),
    Problem("3", "Wie gro\u00df?", "", None, None, {}, ("gut", "schlecht")),
    Problem("4", "", "", "plain text"),
    Problem("5", "When?", "7", None, None, {"day": datetime.date(2026, 1, 2)}),
]


def rows(n: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for i in range(n):
        row: dict[str, Any] = {"question": f"{i} + 1 \u2212 0?", "answer": str(i + 1)}
        row |= {"solution": f"So {i} + 1 = \\boxed{{{i + 1}}}.", "subject": "sums", "level": i % 4}
        found.append(row)
    return found


def write(path: Path, values: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(value) for value in values) + "\n\n")
    return str(path)


# Tables


def test_a_table_is_a_sequence_of_the_same_problems():
    table = ProblemTable.of(MIXED)
    assert table == MIXED and len(table) == 5
    assert table[-1] == MIXED[-1] and table[1:3] == MIXED[1:3] and table[::-1] == MIXED[::-1]
    assert table != MIXED[:4] and table != MIXED[::-1]
    assert ProblemTable.of(table) is table
    joined = ProblemTable.joined([table[3:], table[:2]])
    assert joined == [*MIXED[3:], *MIXED[:2]]
    assert joined.numbers("solution").tolist() == [10, 0, 16, 0]
    with pytest.raises(IndexError):
        table[5]


def test_problems_are_found_by_their_ids():
    parts = problems.join_sources([MIXED, MIXED[:2]])
    table = ProblemTable.joined(parts)
    assert [each.id for each in parts[1]] == ["1@2", "2@2"]
    found = table.by_id(["2", "1@2", "none"])
    assert found == {"2": MIXED[1], "1@2": dataclasses.replace(MIXED[0], id="1@2")}


def test_the_fingerprint_is_that_of_the_same_problems_in_any_table():
    table = ProblemTable.of(MIXED)
    assert fingerprint(table) == fingerprint(MIXED)
    assert fingerprint(table[1:]) == fingerprint(MIXED[1:])
    renamed = problems.join_sources([MIXED[:1], MIXED[:1]])
    assert fingerprint(renamed[1]) != fingerprint(renamed[0])
    joined = ProblemTable.joined([table[2:], table[:2]])
    assert fingerprint(joined) == fingerprint([*MIXED[2:], *MIXED[:2]])


def test_the_fingerprint_of_earlier_versions_is_known():
    digest = hashlib.sha256()
    for problem in MIXED:
        line = json.dumps(dataclasses.asdict(problem), sort_keys=True, default=str)
        digest.update(line.encode() + b"\n")
    assert same_fingerprint(MIXED, digest.hexdigest())
    assert same_fingerprint(MIXED, fingerprint(MIXED))
    assert not same_fingerprint(MIXED[1:], digest.hexdigest())
    assert not same_fingerprint(MIXED, None)


def test_a_table_takes_little_more_memory_than_its_file(tmp_path: Path):
    source = write(tmp_path / "a.jsonl", rows(2000))
    (store,) = load_problems(source).stores
    numbers = sum(column.nbytes for column in store.columns.values()) + store.ends.nbytes
    assert len(store.content) + numbers < 1.5 * Path(source).stat().st_size


# Rows


USUAL = [
    {"question": "Q?", "answer": " 7 ", "solution": " So 7. ", "level": "Level 3", "id": 5, "x": 1},
    {"prompt": "Q?", "answer": "7", "solution": None},
    {"problem": "Q?", "answer": "7", "solution": " "},
    {"prompt": "Q?", "answer": "2 + 5 = 7 #### 7"},
    {"prompt": "Q?", "answer": 7.0},
    {"prompt": "Q?", "question": "R?", "answer": "7"},
    {"prompt": "Q?", "answer": "7", "completion": "It is 7.", "output": "x"},
    {"prompt": "Q?", "answer": "7", "chosen": "a", "rejected": "b"},
    {"prompt": "Q?", "answer": "7", "messages": [{"role": "user", "content": "R?"}]},
    {"prompt": "Q?", "answer": "7", "ground_truth": "8", "tools": []},
    {"prompt": "Q?", "answer": "7", "text": "T", "input": "i", "reward_model": None},
]


@pytest.mark.parametrize("value", USUAL)
def test_the_short_path_for_usual_rows_changes_nothing(value, monkeypatch):
    row = Row("a.jsonl:3", value)
    found = read_row(row, RowOptions({}))
    monkeypatch.setattr(row_reading, "_usual_row", lambda where, row, options: None)
    assert read_row(row, RowOptions({})) == found


# Reading in several processes


def read_in_pieces(source: str, monkeypatch) -> ProblemTable:
    """Return the problems of a file that is read by two processes, in pieces of a kilobyte."""
    monkeypatch.setattr(large_files, "LARGE", 0)
    monkeypatch.setattr(large_files, "PIECE", 1000)
    monkeypatch.setattr(large_files, "n_cores", lambda: 2)
    return load_problems(source)


def test_a_large_file_is_read_as_a_small_one(tmp_path: Path, monkeypatch):
    long = {"prompt": "long?" + " " * 3000, "answer": "7"}  # longer than a piece
    source = write(tmp_path / "a.jsonl", [*rows(30), long, *rows(20)])
    small = load_problems(source)
    large = read_in_pieces(source, monkeypatch)
    assert large == small and len(large) == 51
    assert large[-1].id == "a.jsonl:51"
    assert fingerprint(large) == fingerprint(small)
    for name in large.stores[0].columns:
        assert large.numbers(name).tolist() == small.numbers(name).tolist()


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"prompt": "Q?", "answer": ""}, "a.jsonl:31: answer must be text"),
        ({"prompt": "Q?", "answer": "7", "id": "a.jsonl:9"}, "31: id 'a.jsonl:9' is that of .*:9;"),
    ],
)
def test_the_first_bad_row_of_a_large_file_is_named(tmp_path: Path, monkeypatch, bad, says):
    source = write(tmp_path / "a.jsonl", [*rows(30), bad, *rows(20), {}, *rows(20)])
    if "id" in bad:
        source = write(tmp_path / "a.jsonl", [*rows(30), bad, *rows(20)])
    with pytest.raises(ValueError, match=says):
        read_in_pieces(source, monkeypatch)


def test_a_line_that_is_too_long_is_refused_in_a_large_file(tmp_path: Path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(rows(1)[0]) + '\n{"prompt": "' + "a" * (LINE_BYTES + 99) + '"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:2: a line of more than 8 MiB"):
        read_in_pieces(str(file), monkeypatch)


# Lengths


class Counting(Prompter):
    """A prompter that counts the prompts that it renders."""

    rendered: list[str]

    def _render(self, problem: Problem, *, explain: bool) -> tuple[int, ...]:
        self.rendered.append(problem.id)
        return super()._render(problem, explain=explain)


@pytest.fixture
def prompter() -> Counting:
    found = Counting(tiny_tokenizer())
    object.__setattr__(found, "rendered", [])
    return found


def test_only_prompts_that_may_be_too_long_are_rendered(prompter: Counting):
    many = [Problem(str(i), f"What is {i}?", str(i)) for i in range(200)]
    long = Problem("long", "What " * 300, "7")
    config = Train(method="grpo", max_completion_length=9)
    training_data.check_lengths(config, prompter, [*many, long], [], 4000)
    assert set(prompter.rendered) == {"0"}  # the first one of its form
    training_data.check_lengths(config, prompter, [*many, long], [], 1620)
    assert set(prompter.rendered) == {"0", "long"}
    with pytest.raises(ValueError, match=r"problem long takes \d+ prompt tokens"):
        training_data.check_lengths(config, prompter, [*many, long], [], 300)


def test_texts_that_are_trained_on_count(prompter: Counting):
    many = [Problem(str(i), f"What is {i}?", str(i), f"It is {i}.") for i in range(50)]
    long = Problem("long", "What?", "7", "So " * 900)
    config = Train(method="sft")
    training_data.check_lengths(config, prompter, [*many, long], [], 6000)
    assert set(prompter.rendered) == {"0"}
    with pytest.raises(ValueError, match="problem long takes"):
        training_data.check_lengths(config, prompter, [*many, long], [], 500)
    grpo = Train(method="grpo", max_completion_length=9)
    training_data.check_lengths(grpo, prompter, [*many, long], [], 500)


@pytest.mark.parametrize(
    "text", ["What?", "Wie gro\u00df ist \u03c0?", "\ufdfa" * 3, "e\u0301 \ufb03"]
)
def test_no_tokenizer_makes_more_tokens_than_the_bound(text):
    ids = tiny_tokenizer()(text, add_special_tokens=False).input_ids
    assert len(ids) <= most_tokens(text)
    assert most_tokens(text) >= len(text.encode())


# Orders


def test_an_order_is_that_of_random_sample():
    for n in (1, 2, 7, 1000):
        order = EpochOrder(n, seed=5)
        expected = random.Random(5).sample(range(n), n)
        assert list(order.part(0, n // 2)) == expected[: n // 2]
        assert list(order.part(n // 2, n)) == expected[n // 2 :]
        assert list(order.part(0, n)) == expected  # drawn before


def test_a_step_of_a_million_questions_draws_its_own_only(monkeypatch):
    drawn = []
    draw = EpochOrder._draw
    monkeypatch.setattr(EpochOrder, "_draw", lambda self: drawn.append(draw(self)))
    questions_of_step(range(1_000_000), 3, 8, seed=77)  # pyright: ignore[reportArgumentType]
    assert len(drawn) == 32


@pytest.mark.parametrize("has_read", [False, True])
def test_a_reader_that_has_ended_is_one_sentence(has_read: bool):
    """With unread data, Linux reports a reset connection in place of its end."""
    ours, theirs = Pipe()
    ours.send_bytes(b"a piece")
    if has_read:
        theirs.recv_bytes()
    theirs.close()
    with pytest.raises(OSError, match=r"^rows\.jsonl: a process that reads it has ended"):
        large_files.receive(ours, Path("rows.jsonl"))
