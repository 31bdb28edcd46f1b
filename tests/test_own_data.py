"""Data of one's own: forms of rows and files, held-out shares, mixtures and defaults."""

import csv
import dataclasses
import gzip
import json
import re
import sys
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from expo_fast import train
from expo_fast.algorithms.training_data import load_training_data, select_problems
from expo_fast.cli import exit_status
from expo_fast.cli.flags import from_toml, parse
from expo_fast.config import Train
from expo_fast.data.problems import Problem, hold_out, load_problems, question_text
from expo_fast.data.prompts import Prompter, expert_text
from expo_fast.data.sources import BENCHMARKS
from expo_fast.weights import save_model
from jobs import rows_in, write_rows
from tiny import tiny_model, tiny_tokenizer

ROW = {"problem": "What is 40 + 2?", "answer": "42"}
ROOT = Path(__file__).resolve().parents[1]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def write(path: Path, *rows: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, rows)
    return str(path)


def questions(n: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"question": f"{i} + 1?", "answer": str(i + 1), "solution": f"{i} + 1 = {i + 1}."}
        for i in range(first, first + n)
    ]


# Forms of rows


@pytest.mark.parametrize(
    ("row", "prompt", "solution", "answer"),
    [
        ({"prompt": "Q?", "completion": "It is 7."}, "Q?", "It is 7.", ""),
        ({"prompt": "Q?", "completion": "So \\boxed{7}."}, "Q?", "So \\boxed{7}.", "7"),
        ({"prompt": "Q?", "completion": "Paris"}, "Q?", "Paris", ""),
        ({"prompt": "Q?", "completion": "a #### 7"}, "Q?", "a #### 7", ""),
        ({"prompt": [user("Q?")], "completion": [assistant("A")]}, (user("Q?"),), "A", ""),
        ({"prompt": "Q?", "completion": "It is 7.", "answer": 7}, "Q?", "It is 7.", "7"),
        ({"prompt": "Q?", "completion": "It is 7.", "solution": "7"}, "Q?", "It is 7.", "7"),
        ({"messages": [user("Q?"), assistant("A")]}, (user("Q?"),), "A", ""),
        (
            {"messages": [user("Hi"), assistant("Yes?"), user("Q?"), assistant("A")]},
            (user("Hi"), assistant("Yes?"), user("Q?")),
            "A",
            "",
        ),
        ({"messages": [user("Q?")], "answer": "7"}, (user("Q?"),), None, "7"),
        ({"prompt": "Q", "messages": [user("Q?"), assistant("A")]}, (user("Q?"),), "A", ""),
        ({"prompt": "Q?", "answer": "7", "messages": [user("R")]}, "Q?", None, "7"),
        ({"instruction": "Add.", "input": "3, 4", "output": "7"}, "Add.\n\n3, 4", "7", ""),
        ({"instruction": "Say hi.", "input": "", "output": "Hi."}, "Say hi.", "Hi.", ""),
        ({"instruction": "Q?", "answer": "7"}, "Q?", None, "7"),
        ({"prompt": "Q?", "ground_truth": 7}, "Q?", None, "7"),
        ({"question": "Q?", "ground_truth": "x #### 7"}, "Q?", "x", "7"),
    ],
)
def test_rows_of_other_trainers_are_read(tmp_path, row, prompt, solution, answer):
    (problem,) = load_problems(write(tmp_path / "a.jsonl", row))
    assert (problem.prompt, problem.solution, problem.answer) == (prompt, solution, answer)


def test_the_ground_truth_stays_a_column_for_reward_functions(tmp_path):
    source = write(tmp_path / "a.jsonl", {"prompt": "Q?", "ground_truth": 7})
    assert load_problems(source)[0].columns == {"ground_truth": 7}
    tests = {"inputs": [1], "outputs": [2]}
    source = write(tmp_path / "b.jsonl", {"prompt": "Q?", "ground_truth": tests})
    (problem,) = load_problems(source, answers=False)
    assert (problem.answer, problem.columns) == ("", {"ground_truth": tests})
    with pytest.raises(ValueError, match=r"b.jsonl:1: ground_truth must be text"):
        load_problems(source)


def test_plain_text_is_read_where_no_answer_is_needed(tmp_path):
    source = write(tmp_path / "a.jsonl", {"text": "Once upon a time.", "source": "x"})
    (problem,) = load_problems(source, answers=False)
    assert problem.is_text
    assert (problem.prompt, problem.solution) == ("", "Once upon a time.")
    assert problem.columns == {"source": "x"}
    with pytest.raises(ValueError, match=r"a.jsonl:1: .*'text' and no question: only --method sft"):
        load_problems(source)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "Q?", "completion": " "}, "1: completion must be text"),
        ({"prompt": "Q?", "completion": [user("A")]}, "1: completion must be text"),
        ({"messages": [assistant("A")]}, "1: prompt must be text .* a list of chat messages"),
        ({"messages": []}, "1: prompt must be text .* a list of chat messages"),
        ({"instruction": 5, "output": "A"}, "1: prompt must be text"),
        ({"instruction": "Q", "input": 5, "output": "A"}, "1: input must be text, not 5"),
        ({"text": " "}, "1: text must be text that is not empty"),
        ({"text": 5}, "1: text must be text that is not empty, not 5"),
    ],
)
def test_rows_of_other_trainers_that_make_no_sense_are_refused(tmp_path, row, says):
    with pytest.raises(ValueError, match=says):
        load_problems(write(tmp_path / "a.jsonl", row), answers=False)


def test_columns_get_the_names_of_options(tmp_path):
    row = {"q": "Q?", "answer": "long text", "meta": {"final": 7}, "prompt": "old"}
    source = write(tmp_path / "a.jsonl", row)
    (problem,) = load_problems(source, columns=("prompt=q", "answer=meta.final"))
    assert (problem.prompt, problem.answer) == ("Q?", "7")
    assert problem.columns == {"meta": {"final": 7}}
    usual = write(tmp_path / "b.jsonl", {"prompt": "Q?", "answer": "7"})
    assert load_problems(usual, columns=("prompt=q",))[0].prompt == "Q?"
    assert load_problems("builtin:arithmetic", columns=("prompt=q",))
    with pytest.raises(ValueError, match=r"b.jsonl:1: no column 'z' for 'level'; the row has 'p"):
        load_problems(usual, columns=("level=z",))
    with pytest.raises(ValueError, match="'promt=q': 'promt' is none of prompt, problem"):
        load_problems(usual, columns=("promt=q",))
    with pytest.raises(ValueError, match=r"columns=\('prompt',\): need NAME=COLUMN"):
        Train(columns=("prompt",))


# A text without a known answer


def test_a_named_question_is_read_before_the_rows_own_prompt(tmp_path):
    """Before, `prompt` was read, because it comes first among the columns of a question."""
    row = {"prompt": "Q1?", "problem": "Q2?", "q": "Q3?", "answer": "1"}
    (problem,) = load_problems(write(tmp_path / "a.jsonl", row), columns=("question=q",))
    assert problem.prompt == "Q3?"
    assert problem.columns == {"problem": "Q2?"}


@pytest.mark.parametrize("columns", [("answer=a", "answer=b"), ("prompt=a", "question=b")])
def test_two_columns_of_one_use_are_refused(tmp_path, columns):
    source = write(tmp_path / "a.jsonl", {"a": "1", "b": "2", "prompt": "Q?", "answer": "1"})
    message = f"columns: '{columns[0]}' and '{columns[1]}' name the same: give one of them"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_problems(source, columns=columns)


def test_a_null_question_or_pair_is_no_column(tmp_path):
    """A table of rows in several forms, as pandas and datasets write it as JSON lines."""
    pair = {"chosen": "4", "rejected": "5"}
    nulls = {"prompt": None, "question": None, "chosen": None, "rejected": None}
    one = nulls | {"question": "Q?", "answer": "4"}
    two = nulls | {"prompt": "Q2?", "answer": "4"} | pair
    first, second = load_problems(write(tmp_path / "a.jsonl", one, two))
    assert (first.prompt, first.pair, first.columns) == ("Q?", None, {})
    assert (second.prompt, second.pair) == ("Q2?", ("4", "5"))
    with pytest.raises(ValueError, match="rejected must be text"):
        load_problems(write(tmp_path / "b.jsonl", two | {"rejected": None}))
    with pytest.raises(ValueError, match=r"c\.jsonl:1: prompt is null: write the question, or"):
        load_problems(write(tmp_path / "c.jsonl", {"prompt": None, "answer": "4"}))


def test_tables_of_pandas_and_of_spreadsheets_are_read(tmp_path):
    """pandas writes whole numbers beside a gap as 3.0, and spreadsheets write rows of commas."""
    file = tmp_path / "a.csv"
    file.write_text("question,answer,level\r\n1?,1,3.0\r\n2?,2,\r\n,,\r\n3?,3,2\r\n,,\r\n")
    assert [p.level for p in load_problems(str(file))] == [3, None, 2]


def test_a_long_text_of_a_table_is_read(tmp_path):
    """Python's csv refuses cells of more than 128 KiB, unless it is told otherwise."""
    text = "word " * 40_000
    (tmp_path / "a.csv").write_text(f"text\n{text}\n")
    (problem,) = load_problems(str(tmp_path / "a.csv"), answers=False)
    assert problem.solution == text


def test_a_decimal_of_parquet_is_a_number(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"question": "1?", "answer": Decimal("-1.50")}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (problem,) = load_problems(str(tmp_path / "a.parquet"))
    assert problem.answer == "-1.50"


def test_evaluation_data_may_lack_columns_that_only_the_training_reads(tmp_path):
    rows = [{"q": f"{i}?", "answer": str(i), "cot": f"It is {i}."} for i in range(9)]
    source = write(tmp_path / "a.jsonl", *rows)
    held_out = write(tmp_path / "b.jsonl", {"question": "What?", "answer": "1"})
    columns = ("prompt=q", "solution=cot")
    config = Train(train_data=source, eval_data=held_out, columns=columns, method="sft")
    data = select_problems(config)
    assert [p.prompt for p in data.held_out] == ["What?"]
    assert data.problems[0].solution == "It is 0."
    with pytest.raises(ValueError, match="no column 'cott' for 'solution'"):
        select_problems(dataclasses.replace(config, columns=("prompt=q", "solution=cott")))


def test_no_box_is_appended_to_a_text_without_a_known_answer():
    poem = Problem("a", "Write a poem.", "", solution="Roses.\nViolets.")
    assert expert_text(poem) == "Roses.\nViolets."


# Forms of files


def test_all_forms_of_files_have_the_same_problems(tmp_path):
    rows = [{"question": f'Q "{i}",\nand?', "answer": str(i), "level": str(i)} for i in range(1, 4)]
    write(tmp_path / "a.jsonl", *rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    write(tmp_path / "lines.json", *rows)
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", newline="") as file:
            table = csv.DictWriter(file, ["", *rows[0]], delimiter=delimiter)
            table.writeheader()
            table.writerows([{"": i, **row} for i, row in enumerate(rows)])
    for name in ("a.csv", "a.json", "a.jsonl"):
        packed = gzip.compress((tmp_path / name).read_bytes())
        (tmp_path / f"{name}.gz").write_bytes(packed)
    parquet = pytest.importorskip("pyarrow.parquet")
    table = sys.modules["pyarrow"].Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet")

    def content(name: str) -> list[tuple[object, ...]]:
        problems = load_problems(str(tmp_path / name))
        assert all(not p.columns for p in problems)
        return [(p.prompt, p.answer, p.level) for p in problems]

    expected = content("a.jsonl")
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 9
    for name in names:
        assert content(name) == expected, name
    assert load_problems(str(tmp_path / "a.parquet"))[1].id == "a.parquet:2"
    assert load_problems(str(tmp_path / "a.json"))[1].id == "a.json:2"


def test_verls_parquet_of_numpy_arrays_is_read(tmp_path):
    pandas = pytest.importorskip("pandas")
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("pyarrow")
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": numpy.array([user(f"Q{i}?")], dtype=object),
            "reward_model": {"style": "rule", "ground_truth": str(i)},
            "extra_info": {"index": i},
        }
        for i in range(3)
    ]
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    problems = load_problems(str(tmp_path / "a.parquet"))
    assert [(p.prompt, p.answer) for p in problems] == [
        ((user(f"Q{i}?"),), str(i)) for i in (0, 1, 2)
    ]
    assert problems[2].columns["extra_info"] == {"index": 2}


def test_a_null_of_a_table_is_no_column(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": "Q?", "answer": "7", "chosen": None, "rejected": None, "level": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (problem,) = load_problems(str(tmp_path / "a.parquet"))
    assert (problem.answer, problem.pair, problem.level) == ("7", None, None)
    (tmp_path / "a.csv").write_text("prompt,answer,level\nQ?,7,\n")
    assert load_problems(str(tmp_path / "a.csv"))[0].level is None


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", '[{"prompt": "Q"},\n {"prompt" 5}]', "a.json:2:12: not JSON"),
        ("a.json", '[{"prompt": "Q", "answer": 1}, 5]', "a.json:2: a row must be a JSON object"),
        ("a.json", '[{"prompt": "Q"}, {"prompt": "R"}]', "a.json:1: no column 'answer'"),
        ("a.json", '[{"frage": "Q", "answer": "R"}]', "'answer'; --columns prompt=COLUMN names"),
        ("a.json", '[{"prompt": "Q", "antwort": "R"}]', "'antwort'; --columns answer=COLUMN"),
        ("a.json", "[]", "a.json: holds no problem"),
        ("a.json", '{"data": [{"prompt": "Q"}]}', "a.json:1: no column 'prompt'"),
        ("a.json", '[{"a": 1, "a": 2}]', "a.json: the key 'a' is there twice"),
        ("a.csv", "prompt,answer\nQ\n", r"a.csv:2: the row has 1 cells, .* 2 columns: \[.Q"),
        ("a.csv", "prompt,prompt\nQ,R\n", "a.csv:1: two columns have the same name"),
        ("a.csv", 'prompt,answer\nQ,"7\n', r"a.csv:2: not CSV \("),
        ("a.csv", "prompt,answer\nQ,\n", "a.csv:2: no column 'answer'; the row has 'prompt'"),
        ("a.csv", "prompt;answer\nQ;7\n", "a.csv:2: no column 'prompt'"),
        ("a.csv", "", "a.csv: holds no problem"),
        ("a.csv", b"prompt,answer\ncaf\xe9,7\n", "a.csv:2: not UTF-8 at byte 4 of the line"),
        ("a.parquet", "PAR1 and then text", "a.parquet: not a Parquet file, or damaged"),
    ],
)
def test_a_broken_file_is_refused_in_one_sentence(tmp_path, name, content, says):
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=says) as caught:
        load_problems(str(tmp_path / name))
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)


def test_without_pyarrow_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a.parquet: .*pip install 'expo-fast\[data\]'$"):
        load_problems(str(tmp_path / "a.parquet"))


# Several files


def test_a_folder_and_a_pattern_have_the_rows_of_all_their_files(tmp_path):
    write(tmp_path / "d/a.jsonl", {"id": 1, **ROW}, {**ROW, "problem": "b"})
    write(tmp_path / "d/b.jsonl", {"id": 1, **ROW, "problem": "c"})
    write(tmp_path / "d/notes.txt", "no data")
    write(tmp_path / "d/deeper/c.jsonl", {**ROW, "problem": "d"})
    ids = [p.id for p in load_problems(str(tmp_path / "d"))]
    assert ids == ["1", "a.jsonl:2", "1@2"]
    assert [p.id for p in load_problems(str(tmp_path / "d" / "*.jsonl"))] == ids
    assert len(load_problems(str(tmp_path / "d" / "**" / "*.jsonl"))) == 4
    with pytest.raises(FileNotFoundError, match=r"\*.csv: no such file"):
        load_problems(str(tmp_path / "*.csv"))


def test_equal_ids_of_two_sources_are_made_distinct(tmp_path):
    one = write(tmp_path / "a/x.jsonl", *questions(4))
    two = write(tmp_path / "b/x.jsonl", *questions(4, first=10))
    data = select_problems(Train(train_data=(one, two), eval_every=0))
    assert [p.id for p in data.problems[3:6]] == ["x.jsonl:4", "x.jsonl:1@2", "x.jsonl:2@2"]
    assert [len(part) for part in data.sources] == [4, 4]


# Names


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """Return the names that the hub is asked for."""
    names: list[str] = []

    def rows(name: str):
        names.append(name)
        yield from ()

    monkeypatch.setattr("expo_fast.data.sources._hub_rows", rows)
    return names


@pytest.mark.parametrize("name", ["openai/gsm8k", "a-b/c.d_e:test", "openai/gsm8k:train[:9]"])
def test_a_name_of_the_hub_needs_no_prefix(asked, name):
    with pytest.raises(ValueError, match="holds no problem"):
        load_problems(name)
    assert asked == [name]


@pytest.mark.parametrize(
    "path", ["data/trian.jsonl", "tests/nothing", "./a/b", "a/b/c", "no.csv", "~/a", "C:\\a\\b"]
)
def test_a_misspelt_path_is_no_name_of_the_hub(asked, path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_problems(path)
    assert asked == []


def test_benchmarks_are_read_from_a_folder_or_the_hub(asked, tmp_path, monkeypatch):
    write(tmp_path / "here/GSM8K_test.jsonl", {"question": "Q?", "answer": "a #### 7"})
    write(tmp_path / "here/gsm8k_train.jsonl", {"question": "R?", "answer": "a #### 8"})
    write(tmp_path / "here/math500/test-1.jsonl", {"problem": "P?", "answer": "9", "level": 3})
    write(tmp_path / "here/math500/train.jsonl", {"problem": "S?", "answer": "9"})
    folder = str(tmp_path / "here")
    assert [p.answer for p in load_problems("gsm8k", data_dir=folder)] == ["7"]
    monkeypatch.setenv("EXPO_FAST_DATA", folder)
    assert [p.prompt for p in load_problems("math-500")] == ["P?"]
    assert asked == []
    monkeypatch.setenv("EXPO_FAST_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="gsm8k: holds no problem"):
        load_problems("gsm8k")
    assert asked == [BENCHMARKS["gsm8k"]]
    with pytest.raises(FileNotFoundError, match="--data-dir nowhere: no such folder"):
        load_problems("gsm8k", data_dir="nowhere")


def test_without_a_folder_and_a_hub_a_benchmark_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delenv("EXPO_FAST_DATA", raising=False)
    says = (
        r"gsm8k: EXPO_FAST_DATA names no folder \(see --data-dir\), and the hub fails: hub:openai"
    )
    with pytest.raises(ValueError, match=says):
        load_problems("gsm8k")
    with pytest.raises(ValueError, match=r"math-500: .* has no file math-500.jsonl \(see"):
        load_problems("math-500", data_dir=str(tmp_path))


# Held-out share


def made(n: int, first: int = 0) -> list[Problem]:
    return [Problem(str(i), f"{i} + 1?", str(i + 1)) for i in range(first, first + n)]


def test_the_held_out_share_does_not_change_with_rows_and_their_order():
    few = {p.id for p in hold_out(made(300), 0.1, limit=1000)}
    assert 15 < len(few) < 45
    assert {p.id for p in hold_out(made(300)[::-1], 0.1, limit=1000)} == few
    more = {p.id for p in hold_out(made(600), 0.1, limit=1000)}
    assert {id_ for id_ in more if int(id_) < 300} == few
    smaller = {p.id for p in hold_out(made(300), 0.1, limit=5)}
    assert len(smaller) == 5 and smaller < few
    assert len(hold_out(made(3), 0.0001, limit=9)) == 1
    twice = [*made(50), Problem("copy", " 7 + 1 ? ", "8")]
    assert len(hold_out(twice, 1.0, limit=999)) == 50


def test_copies_of_a_held_out_question_are_not_trained_on(tmp_path):
    rows = questions(40)
    source = write(tmp_path / "a.jsonl", *rows, *rows)
    data = select_problems(Train(train_data=source, eval_fraction=0.3, shots=2))
    held_out = {question_text(p) for p in data.held_out}
    trained = {question_text(p) for p in data.problems}
    shown = {question_text(p) for p in data.shots}
    assert len(held_out) > 4 and len(shown) == 2
    assert not held_out & trained and not shown & (held_out | trained)
    assert len(held_out | trained | shown) == 40
    (note,) = data.notes
    assert note.startswith(f"held out {len(held_out)} of 80 problems of {source} for evaluation")


def test_chats_with_the_same_last_turn_are_different_questions(tmp_path):
    """Before, they were one question: one chat was held out, and no chat was left to train on."""
    rows = []
    for i in range(40):
        turns = [user(f"{i} + 1?"), assistant("Let me think."), user("Now the final answer.")]
        rows.append({"messages": [*turns, assistant(f"\\boxed{{{i + 1}}}")]})
    config = Train(train_data=write(tmp_path / "a.jsonl", *rows), eval_fraction=0.3, method="sft")
    data = select_problems(config)
    assert len(data.held_out) > 4
    assert len(data.held_out) + len(data.problems) == 40
    system = {"role": "system", "content": "Be brief."}
    one = Problem("1", (system, user("1?")), "1")
    begun = Problem("2", (user("1?"), assistant("It is")), "1")
    assert question_text(one) == question_text(begun) == "1?"


def test_without_evaluations_nothing_is_held_out(tmp_path):
    source = write(tmp_path / "a.jsonl", *questions(20))
    data = load_training_data(Train(train_data=source, eval_every=0))
    assert (len(data.problems), data.held_out, data.notes) == (20, [], ())


def test_builtin_data_have_an_eval_split_of_their_own():
    assert Train().eval_sources == ("builtin:arithmetic-2:eval",)
    assert Train(train_data="builtin:arithmetic-1").eval_sources == ("builtin:arithmetic-1:eval",)
    both = ("builtin:arithmetic-1", "builtin:arithmetic-3:train")
    expected = ("builtin:arithmetic-1:eval", "builtin:arithmetic-3:eval")
    assert Train(train_data=both).eval_sources == expected
    assert Train(train_data=("builtin:arithmetic", "a.jsonl")).eval_sources == ()
    assert Train(train_data="builtin:arithmetic:eval").eval_sources == ()


def test_several_sources_are_evaluated_on_within_the_limit(tmp_path):
    one = write(tmp_path / "a.jsonl", *questions(30))
    two = write(tmp_path / "b.jsonl", *questions(30, first=100))
    rest = write(tmp_path / "c.jsonl", *questions(20, first=200))
    config = Train(train_data=rest, eval_data=(one, two), eval_limit=12)
    held_out = load_training_data(config).held_out
    assert len(held_out) == 12
    assert {p.id.partition(":")[0] for p in held_out} == {"a.jsonl", "b.jsonl"}


# Mixtures


def test_weights_set_the_share_of_each_source_in_a_batch(tmp_path, job):
    write(tmp_path / "a.jsonl", *questions(9))
    write(tmp_path / "b.jsonl", *questions(9, first=100))
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    given = job("--method", "sft", "--eval-every", 0, "--data-weights", 1, 2, data=files)
    train.main([*given, "--prompts-per-step", "6", "--steps", "4"])
    seen: Counter[str] = Counter()
    for step in (1, 2, 3, 4):
        ids = [row["id"] for row in completions(tmp_path / "run", step)]
        assert sum(id_.startswith("a") for id_ in ids) == 2
        assert len(set(ids)) == 6
        assert ids != sorted(ids)  # shuffled
        seen.update(ids)
    assert all(seen[f"b.jsonl:{n}"] in (1, 2) for n in range(1, 10))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data_weights": (1.0,)}, "data_weights=.*: need one number above 0 for each source"),
        ({"data_weights": (1.0, 0.0)}, "data_weights=.*: need one number above 0"),
        ({"data_weights": (1.0, float("inf"))}, "data_weights=.*: need one number above 0"),
        ({"data_weights": (1.0, 99.0)}, "data_weights=.*: need at least one of the prompts_per"),
        ({"train_data": ()}, r"train_data=\(\): need a source"),
        ({"train_data": ("a", "")}, "train_data=.*: need a source"),
        ({"eval_data": ""}, "eval_data='': need a source"),
        ({"eval_fraction": 0.0}, "eval_fraction=0.0: need more than 0"),
        ({"eval_fraction": 1.5}, "eval_fraction=1.5: need at most 1"),
    ],
)
def test_wrong_options_of_data_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        Train(**{"train_data": ("a.jsonl", "b.jsonl")} | changes)


def test_the_questions_of_a_batch_are_rounded_by_the_largest_remainders():
    def counts(*weights: float) -> list[int]:
        sources = tuple(f"{i}.jsonl" for i in range(len(weights)))
        return Train(train_data=sources, data_weights=weights).questions_of_sources

    assert counts(1, 1) == [8, 8]
    assert counts(1, 2) == [5, 11]
    assert counts(1, 1, 1) == [6, 5, 5]
    assert counts(3, 2, 2) == [7, 5, 4]


# Defaults


def test_defaults_of_other_data_are_not_those_of_the_demo(tmp_path):
    demo = Train().resolved()
    assert (demo.shots, demo.max_completion_length) == (2, 64)
    assert demo.eval_data == "builtin:arithmetic-2:eval"
    own = Train(train_data="a.jsonl").resolved()
    assert (own.shots, own.max_completion_length, own.eval_data) == (0, 512, None)
    given = Train(train_data="a.jsonl", shots=1, max_completion_length=9, eval_data="b").resolved()
    assert (given.shots, given.max_completion_length, given.eval_data) == (1, 9, "b")


def test_new_options_of_data_do_not_change_the_name_of_a_run():
    """The name of the default job is that of commit c8c507a."""
    assert Train().run_dir == Train().resolved().run_dir == Path("runs/expo-grpo-0b30e83d")
    other = Train(train_data="a.jsonl")
    assert other.run_dir == other.resolved().run_dir
    assert other.run_dir != Train(train_data="a.jsonl", eval_fraction=0.2).run_dir


# Complete runs


@pytest.fixture
def job(tmp_path: Path):
    """Return a function that returns the flags of a short run of a tiny model."""
    save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    (tmp_path / "rewards.py").write_text(
        "def odd(completion_ids, **columns):\n"
        "    return [float(sum(ids) % 2) for ids in completion_ids]\n"
    )

    def flags(*more: object, data: list[str]) -> list[str]:
        given = f"--model {tmp_path}/model --output-dir {tmp_path}/run --steps 1 "
        given += "--prompts-per-step 2 --dtype float32 --eval-samples 1 "
        return [*given.split(), "--train-data", *data, *map(str, more)]

    return flags


def completions(run: Path, step: int) -> list[dict[str, Any]]:
    return rows_in(run / f"completions/step-{step}.jsonl")


def test_a_run_on_own_data_evaluates_on_a_held_out_share_and_says_so(tmp_path, job, capsys):
    source = write(tmp_path / "mine.jsonl", *questions(30))
    given = job("--method", "grpo", "--max-completion-length", 1, data=[source])
    given += ["--schedule", "constant"]
    train.main([*given, "--dry-run"])
    printed = capsys.readouterr().out
    assert "\nshots = 0\n" in printed and "\nmax_completion_length = 1\n" in printed
    assert re.search(rf"\n# held out \d of 30 problems of {source} for evaluation", printed)
    train.main(given)
    printed = capsys.readouterr().out
    (n,) = re.findall(r"held out (\d) of 30 problems", printed)
    assert f"evaluation: step 1  problems {n}  " in printed
    assert (
        "warning: step 1: 100% of the completions were cut at --max-completion-length 1 " in printed
    )
    record = from_toml(Train, tmp_path / "run/config.toml")
    assert (record.shots, record.max_completion_length, record.eval_data) == (0, 1, None)
    ids = {row["id"] for row in completions(tmp_path / "run", 1)}
    assert len(ids) == 2
    train.main([*given, "--steps", "3"])  # resumes
    printed = capsys.readouterr().out
    assert "resumed from" in printed
    assert printed.count("warning: step") == 1  # of two steps


def test_a_run_of_older_defaults_is_resumed_with_them(tmp_path, job):
    """The record of an older run has the demo's defaults for data of one's own."""
    source = write(tmp_path / "mine.jsonl", *questions(30))
    old = ("--eval-data", "builtin:arithmetic-1:eval", "--shots", 2, "--max-completion-length", 9)
    short = ("--method", "grpo", "--instruction", "", "--eval-limit", 4, "--schedule", "constant")
    train.main(job(*short, *old, data=[source]))
    before = (tmp_path / "run/config.toml").read_text()
    train.main([*job(*short, data=[source]), "--steps", "2"])
    after = (tmp_path / "run/config.toml").read_text()
    assert after == before.replace("steps = 1\n", "steps = 2\n", 1)


def test_prompts_without_answers_train_with_a_reward(tmp_path, job, capsys):
    rows = [{"prompt": f"Say {i}."} for i in range(8)]
    source = write(tmp_path / "mine.jsonl", *rows)
    reward = ("--reward", f"{tmp_path}/rewards.py:odd", "--max-completion-length", 8)
    train.main(job("--method", "grpo", *reward, data=[source]))
    assert "no evaluation: no row of" in capsys.readouterr().out
    assert not (tmp_path / "run/evaluations.jsonl").exists()
    for more in (("--method", "expo-grpo", *reward), ("--method", "grpo")):
        given = job(*more, "--output-dir", tmp_path / "other", data=[source])
        assert exit_status.run(train.main, given) == 2
        assert "mine.jsonl:1: no column 'answer'; the row has 'prompt'" in capsys.readouterr().err


def test_sft_trains_on_plain_text_and_other_methods_refuse_it(tmp_path, job, capsys):
    rows = [{"text": f"Text {i}: The answer is here."} for i in range(8)]
    source = write(tmp_path / "mine.jsonl", *rows)
    train.main(job("--method", "sft", data=[source]))
    texts = [row["completion"] for row in completions(tmp_path / "run", 1)]
    assert all("ext " in text and text.endswith("The answer is here.") for text in texts)
    assert "no evaluation: no row of" in capsys.readouterr().out
    reward = ("--reward", f"{tmp_path}/rewards.py:odd")
    elsewhere = ("--output-dir", tmp_path / "other")
    for more in (("--method", "grpo", *reward), ("--method", "dpo")):
        given = job(*more, *elsewhere, data=[source])
        assert exit_status.run(train.main, given) == 2
        assert "is plain text" in capsys.readouterr().err
    given = job("--method", "expo-grpo", *elsewhere, data=[source])
    assert exit_status.run(train.main, given) == 2
    assert "only --method sft trains on plain text" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_token_ids_of_plain_text_are_those_of_trl(tmp_path):
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from tiny import transformers_copy

    tokenizer = tiny_tokenizer()
    settings = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None)
    trainer = SFTTrainer(
        model=transformers_copy(tiny_model()),
        args=settings,
        train_dataset=Dataset.from_list([{"text": "Once upon a time."}]),
        processing_class=tokenizer,
    )
    source = write(tmp_path / "a.jsonl", {"text": "Once upon a time."})
    (problem,) = load_problems(source, answers=False)
    prompter = Prompter(tokenizer)
    dataset: Any = trainer.train_dataset
    ids = (*prompter.solve(problem), *prompter.target(problem))
    assert list(ids) == dataset[0]["input_ids"]
    assert len(prompter.solve(problem)) == 1  # all tokens but the first are predicted


def test_the_length_limit_of_samples_does_not_refuse_texts_of_the_data(tmp_path, job):
    """The tiny model's context of 256 holds no 512 sampled tokens, and sft samples none."""
    source = write(tmp_path / "mine.jsonl", *questions(8))
    train.main(job("--method", "sft", "--eval-every", 0, data=[source]))
    given = job("--method", "grpo", "--output-dir", tmp_path / "other", data=[source])
    with pytest.raises(
        ValueError, match="max_completion_length=512, but the model's context holds 256"
    ):
        train.main(given)


def test_an_instruction_to_box_is_warned_of_where_no_text_has_a_box(tmp_path, recwarn):
    chats = [{"prompt": f"Hi {n}", "completion": f"Hello {n}."} for n in range(4)]
    source = write(tmp_path / "a.jsonl", *chats)
    config = Train(method="sft", train_data=source, prompts_per_step=2)
    with pytest.warns(UserWarning, match=r'no text of .* has a box, .* --instruction "" leaves it'):
        load_training_data(config)
    recwarn.clear()
    load_training_data(dataclasses.replace(config, instruction=""))
    boxed = write(tmp_path / "b.jsonl", *questions(4))  # they get a box from their answers
    load_training_data(dataclasses.replace(config, train_data=boxed))
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore:no text of")
def test_the_example_files_are_read():
    folder = ROOT / "examples/data"
    problems = load_problems(str(folder / "word_problems.jsonl"))
    assert all(p.answer and p.solution and p.level for p in problems)
    config = parse(Train, ["--train-data", str(folder / "word_problems.jsonl")])
    assert len(load_training_data(config).held_out) > 0
    for name, method in (("pairs", "dpo"), ("chats", "sft")):
        given = ["--method", method, "--train-data", str(folder / f"{name}.jsonl")]
        data = load_training_data(parse(Train, [*given, "--prompts-per-step", "4"]))
        assert len(data.problems) == 8
