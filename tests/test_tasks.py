"""Data sources: rows that load, rows that are refused, and the error messages."""

import gzip
import json
import random
import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

from expo_fast.data import arithmetic
from expo_fast.data.files import LINE_BYTES
from expo_fast.data.problems import (
    Problem,
    fingerprint,
    last_question,
    load_problems,
    overlap,
    worked_examples,
)
from expo_fast.reward import score_answers
from expo_fast.reward_functions import reward_columns

ROW = {"problem": "What is 40 + 2?", "answer": "42"}
TURN = {"role": "assistant", "content": "Well."}


def lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture
def save(tmp_path):
    def write(data: bytes, name: str = "data.jsonl") -> str:
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return write


# Rows that load


def test_known_columns_become_fields_and_others_are_kept(save):
    row = {"id": 7, "question": "Q?", "answer": "A", "solution": "S", "level": 3, "unit": ["kg"]}
    (problem,) = load_problems(save(lines(row)))
    assert problem == Problem("7", "Q?", "A", "S", 3, {"unit": ["kg"]})


def test_the_column_prompt_comes_before_problem_and_question(save):
    (problem,) = load_problems(save(lines({"question": "c", "prompt": "a", **ROW})))
    assert problem.prompt == "a"
    assert problem.columns == {"question": "c", "problem": ROW["problem"]}


def test_a_null_in_a_chat_message_is_ignored(save):
    turns = [{"role": "user", "content": "Q?"}]
    (problem,) = load_problems(save(lines({"prompt": [turns[0] | {"name": None}], "answer": "A"})))
    assert problem.prompt == tuple(turns)


def test_chat_messages_are_kept(save):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q?"}]
    (problem,) = load_problems(save(lines({"prompt": turns, "answer": "A"})))
    assert problem.prompt == tuple(turns)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (42, "42"),
        (42.0, "42"),
        (-0.0, "0"),
        (2.5, "2.5"),
        (" 7\n", "7"),
        (10**400, "1" + "0" * 400),
        (-(10**400), "-1" + "0" * 400),
        (1e-07, "0.0000001"),
        (-2.5e-10, "-0.00000000025"),
        (5e-324, "0." + "0" * 323 + "5"),
        (1e16, "1" + "0" * 16),
        (1.5e300, "15" + "0" * 299),
        (1e23, "1" + "0" * 23),  # int(1e23) is 99999999999999991611392
        (0.1, "0.1"),
        (123456789.125, "123456789.125"),
    ],
)
def test_numbers_become_texts_of_answers(save, value, text):
    assert load_problems(save(lines({**ROW, "answer": value})))[0].answer == text


@pytest.mark.parametrize(
    ("value", "right", "wrong"),
    [
        (1e-07, ["0.0000001", "10^{-7}", "1e-7", r"1 \times 10^{-7}"], ["0", "1e-8", "10^{7}"]),
        (-2.5e-10, [r"-2.5 \cdot 10^{-10}", "-2.5E-10"], ["2.5e-10", "-2.5e-11", "0"]),
        (6.5e20, [r"6.5 \times 10^{20}", "650000000000000000000"], ["6.5e19", "65", "6.4e20"]),
        (1e300, ["10^{300}", "1e300"], ["10^{299}", "10^{301}"]),
        (3.0, ["3", "3.0", r"\frac{6}{2}"], ["30", "0.3", "-3"]),
        (10**30, ["10^{30}", "1e30"], ["10^{31}", "10^{30}+1"]),
    ],
)
def test_an_answer_that_json_holds_as_a_number_is_judged_as_one(save, value, right, wrong):
    (problem,) = load_problems(save(lines({**ROW, "answer": value})))
    texts = [rf"\boxed{{{text}}}" for text in [*right, *wrong]]
    verdicts = score_answers([problem.answer] * len(texts), texts)
    assert verdicts == [1.0] * len(right) + [0.0] * len(wrong)


@pytest.mark.parametrize(
    ("value", "level"),
    [("Level 5", 5), ("level 2", 2), ("4", 4), (3, 3), (3.0, 3), (None, None), ("Level ?", None)],
)
def test_levels_are_parsed(save, value, level):
    assert load_problems(save(lines({**ROW, "level": value})))[0].level == level


def test_a_gsm8k_answer_is_split_into_solution_and_answer(save):
    worked = "4 boxes hold 4*600=<<4*600=2400>>2400 pens.\nSo 2400.\n#### 2,400"
    (problem,) = load_problems(save(lines({**ROW, "answer": worked})))
    assert problem.solution == "4 boxes hold 4*600=2400 pens.\nSo 2400."
    assert problem.answer == "2400"


def test_an_answer_with_hashes_is_not_split_if_there_is_a_solution(save):
    (problem,) = load_problems(save(lines({**ROW, "answer": "a #### 1", "solution": "s"})))
    assert (problem.answer, problem.solution) == ("a #### 1", "s")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_bom_crlf_blank_lines_and_gzip_change_nothing(save, pack):
    rows = [{**ROW, "id": i, "problem": f"é\u2028{i}"} for i in range(3)]
    plain = load_problems(save(lines(*rows)))
    encoded = b"\xef\xbb\xbf" + lines(*rows).replace(b"\n", b"\r\n \r\n\r\n").rstrip()
    assert load_problems(save(pack(encoded))) == plain
    assert [p.prompt for p in plain] == [row["problem"] for row in rows]


def test_missing_ids_are_made_from_the_file_name_and_line(save):
    problems = load_problems(save(b"\n" + lines(ROW, ROW)))
    assert [p.id for p in problems] == ["data.jsonl:2", "data.jsonl:3"]


def test_pairs_are_texts_or_assistant_messages_and_need_no_answer(save):
    pair = {"prompt": "Q?", "chosen": [TURN], "rejected": "No."}
    bare, graded = load_problems(save(lines(pair, {**pair, "answer": "7"})))
    assert bare.pair == graded.pair == ("Well.", "No.")
    assert (bare.answer, graded.answer) == ("", "7")


# Rows of TRL's and verl's forms


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [SYSTEM, user("Hi"), assistant("Hello"), user("Q?")]
IMPLICIT = {
    "UltraFeedback": ([user("Q?")], [assistant("Yes.")], [assistant("No.")]),
    "earlier turns": (EARLIER, [assistant("Yes.")], [assistant("No.")]),
    "text": ("Human: Q? Assistant:", " Yes.", " No."),
    "text, cut where it differs": ("The answer is 1", "2", "3"),
    "text, one the beginning of the other": ("Q? Ye", "s", "s, I think."),
}


@pytest.mark.parametrize("name", IMPLICIT)
def test_an_implicit_prompt_is_what_trl_extracts(save, name):
    prompt, chosen, rejected = IMPLICIT[name]
    row = {"chosen": prompt + chosen, "rejected": prompt + rejected, "score_chosen": 9.0}
    (problem,) = load_problems(save(lines(row)))
    assert problem.prompt == (prompt if isinstance(prompt, str) else tuple(prompt))
    texts = [x if isinstance(x, str) else x[0]["content"] for x in (chosen, rejected)]
    assert problem.pair == tuple(texts)
    assert problem.answer == "" and problem.columns == {"score_chosen": 9.0}
    data_utils = pytest.importorskip("trl.data_utils")
    expected = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert data_utils.extract_prompt(row) == expected


def test_conversations_win_over_the_question_as_text(save):
    """HuggingFaceH4's UltraFeedback repeats it in `prompt`."""
    prompt, chosen, rejected = IMPLICIT["earlier turns"]
    row = {"prompt": "Q?", "chosen": prompt + chosen, "rejected": prompt + rejected}
    (problem,) = load_problems(save(lines(row)))
    assert (problem.prompt, problem.pair) == (tuple(prompt), ("Yes.", "No."))
    data_utils = pytest.importorskip("trl.data_utils")
    assert data_utils.maybe_extract_prompt(row)["prompt"] == prompt


def test_an_explicit_prompt_beside_replies_is_kept(save):
    row = {"prompt": [user("Q?")], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}
    text = {"prompt": "Q? Yes", "chosen": "Q? Yes.", "rejected": "Q? Yes!"}
    one, other = load_problems(save(lines(row, text)))
    assert (one.prompt, one.pair) == ((user("Q?"),), ("Yes.", "No."))
    assert (other.prompt, other.pair) == ("Q? Yes", ("Q? Yes.", "Q? Yes!"))


@pytest.mark.parametrize(
    ("chosen", "rejected", "says"),
    [
        ([user("Q?"), TURN], [user("P?"), TURN], "no common prompt that an answer follows"),
        ([SYSTEM, user("Q?")], [SYSTEM, user("P?")], "no common prompt that an answer follows"),
        (
            [user("Q?"), TURN, user("So?")],
            [user("Q?"), TURN, user("No?")],
            "no common prompt that an answer follows",
        ),
        (
            [user("Q?"), assistant("A"), user("More"), assistant("B")],
            [user("Q?"), assistant("C")],
            "1: chosen must be text .* a list of one chat message",
        ),
        ([user("Q?"), TURN], [user("Q?"), TURN], "1: chosen and rejected are the same text"),
        ([user("Q?"), user("P?")], [user("Q?"), TURN], "1: chosen must be text"),
        ("Yes.", "No.", "no common prompt that an answer follows"),
        ("", "No.", "no common prompt that an answer follows"),
        ([user("Q?"), TURN], "No.", "1: chosen must be text"),
        ([TURN], [assistant("No.")], "1: no column 'prompt' or"),
        ([5, 6], [5, 7], "1: chosen must be text"),
    ],
)
def test_pairs_without_a_prompt_are_refused(save, chosen, rejected, says):
    with pytest.raises(ValueError, match=says):
        load_problems(save(lines({"chosen": chosen, "rejected": rejected})))


SOLUTIONS = {
    "\\boxed{\\frac{1}{2}}": ("\\frac{1}{2}", None),
    "$\\boxed{7}$.": ("7", None),
    "First 3, then \\boxed{4}.": ("4", "First 3, then \\boxed{4}."),
    "\\frac{1}{3}": ("\\frac{1}{3}", None),
    "42": ("42", None),
    "40 + 2 = 42\n#### 42": ("42", "40 + 2 = 42"),
    "40 + 2 = 42.\nThat is all.": ("", "40 + 2 = 42.\nThat is all."),
}


@pytest.mark.parametrize("solution", SOLUTIONS)
def test_trls_solution_holds_the_answer(save, solution):
    row = {"prompt": [user("Q?")], "solution": solution}
    (problem,) = load_problems(save(lines(row)))
    assert (problem.answer, problem.solution) == SOLUTIONS[solution]
    given = reward_columns([problem])["solution"]
    assert given == [solution if problem.solution is None else problem.solution]


@pytest.mark.parametrize(("number", "text"), [(7, "7"), (-0.5, "-0.5"), (1e-07, "0.0000001")])
def test_trls_solution_may_be_a_number(save, number, text):
    (problem,) = load_problems(save(lines({"prompt": "1?", "solution": number})))
    assert problem.answer == text
    assert problem.columns["solution"] == text  # TRL's accuracy_reward parses it
    assert problem.solution is None


@pytest.mark.parametrize("column", ["tools", "chat_template_kwargs"])
def test_columns_that_change_how_a_chat_is_rendered_are_refused(save, column):
    row = {"answer": "1", column: {"enable_thinking": False}}
    chat = [{"role": "user", "content": "1?"}]
    with pytest.raises(ValueError, match=rf":1: TRL renders chat messages with .* '{column}'"):
        load_problems(save(lines({"prompt": chat, **row})))
    (problem,) = load_problems(save(lines({"prompt": "1?", **row})))
    assert column in problem.columns
    assert load_problems(save(lines({"prompt": chat, **row, column: None})))


def test_an_answer_beside_a_solution_is_the_answer(save):
    row = {**ROW, "solution": "So \\boxed{43}.", "reward_model": {"ground_truth": "44"}}
    (problem,) = load_problems(save(lines(row)))
    assert (problem.answer, problem.solution) == ("42", "So \\boxed{43}.")


VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [user("Q?")],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "42"},
    "extra_info": {"split": "train", "index": 0},
}


@pytest.mark.parametrize("more", [{}, {"answer": None}, {"solution": None}])
@pytest.mark.parametrize("truth", ["42", 42, 42.0, "#### 42"])
def test_verls_ground_truth_is_the_answer(save, truth, more):
    reward_model = {"style": "rule", "ground_truth": truth}
    (problem,) = load_problems(save(lines(VERL | {"reward_model": reward_model} | more)))
    assert (problem.prompt, problem.answer) == ((user("Q?"),), "42")
    expected = {"reward_model": reward_model, "data_source": "openai/gsm8k"}
    assert expected.items() <= problem.columns.items()
    assert problem.columns["extra_info"] == {"split": "train", "index": 0}


@pytest.mark.parametrize(
    ("reward_model", "says"),
    [
        ({"ground_truth": ["42"]}, r"1: reward_model.ground_truth must be text .*, not \["),
        ({"ground_truth": {"x": 1}}, "1: reward_model.ground_truth must be text"),
        ({"ground_truth": None}, "1: no column 'answer'"),
        ({"style": "model"}, "1: no column 'answer'"),
        ("42", "1: no column 'answer'"),
    ],
)
def test_verls_other_ground_truths_are_refused(save, reward_model, says):
    with pytest.raises(ValueError, match=says):
        load_problems(save(lines(VERL | {"reward_model": reward_model})))


def test_a_prompt_may_begin_the_answer(save):
    row = {"prompt": [user("Q?"), assistant("Let me")], "answer": "7"}
    (problem,) = load_problems(save(lines(row)))
    assert (problem.prefill, last_question(problem)) == ("Let me", "Q?")
    (plain,) = load_problems(save(lines({"prompt": "Q?", "answer": "7"})))
    assert plain.prefill == "" and overlap([plain], [problem]) == [problem]


@pytest.mark.parametrize(
    "prompt",
    [
        [assistant("A")],
        [user("Q?"), assistant(" ")],
        [user("Q?"), assistant("A"), assistant("B")],
        [user("Q?"), {"role": "tool", "content": "5"}],
        [user(" "), assistant("A")],
    ],
)
def test_a_prompt_that_asks_nothing_is_refused(save, prompt):
    with pytest.raises(ValueError, match="1: prompt: the last message must be the user's question"):
        load_problems(save(lines({"prompt": prompt, "answer": "7"})))


# Rows that are refused: {path} in a message stands for the file


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "{path}: holds no problem"),
        (b" \n\r\n", "{path}: holds no problem"),
        (lines(ROW) + b'\n{"problem": "x",, }\n', r'{path}:3:17: not JSON \(.*\): ", }}'),
        (lines(ROW) + b'{"problem": "cut', r"{path}:2:13: not JSON \(Unterminated string"),
        (b"\0" * 64, "{path}:1:1: not JSON"),
        (lines(ROW, [1, 2]), r"{path}:2: a row must be a JSON object, not \[1, 2\]"),
        (
            lines({"answer": "A", "q": 1}),
            "{path}:1: no column 'prompt' or .*; the row has 'answer'",
        ),
        (lines({"prompt": "Q"}), "{path}:1: no column 'answer'; the row has 'prompt'"),
        (lines({"prompt": "a", "chosen": "b"}), "{path}:1: no column 'answer'"),
        (lines({"prompt": "a", "chosen": "b", "rejected": "b"}), "{path}:1: .*the same text"),
        (lines({"prompt": "a", "chosen": " ", "rejected": "b"}), "{path}:1: chosen must be text"),
        (
            lines({"prompt": "a", "chosen": [TURN, TURN], "rejected": [TURN]}),
            "{path}:1: chosen must be text .* a list of one chat message",
        ),
        (lines({**ROW, "problem": 5}), "{path}:1: problem must be text .*, not 5"),
        (lines({**ROW, "problem": " "}), '{path}:1: problem must be text .*, not " "'),
        (lines({**ROW, "problem": []}), r"{path}:1: problem must be text .*, not \[\]"),
        (lines({**ROW, "problem": ["Q"]}), "{path}:1: problem: a chat message needs text"),
        (lines({**ROW, "problem": [{"from": "human"}]}), "needs text in role and content"),
        (lines({**ROW, "problem": [{"role": "user", "content": None}]}), "needs text in role"),
        (lines({**ROW, "problem": [{"role": "assistant", "content": "a"}]}), "last message"),
        (
            lines({**ROW, "problem": [{"role": "user", "content": "Q", "n": 1}]}),
            "no other kind of value beside them: .*1",
        ),
        (lines({**ROW, "answer": None}), "{path}:1: answer must be .*, not null"),
        (lines({**ROW, "answer": float("nan")}), "{path}:1: answer must be .*, not NaN"),
        (lines({**ROW, "answer": float("inf")}), "{path}:1: answer must be .*, not Infinity"),
        (lines({**ROW, "answer": "\t"}), "{path}:1: answer must be text that is not empty"),
        (lines({**ROW, "answer": "6 * 7 = 42 ####"}), "{path}:1: answer must be text"),
        (lines({**ROW, "answer": ["42"]}), r'{path}:1: answer must be .*, not \["42"\]'),
        (lines({**ROW, "answer": True}), "{path}:1: answer must be .*, not true"),
        (lines({**ROW, "solution": 3}), "{path}:1: solution must be text, not 3"),
        (
            lines({**ROW, "level": "hard"}),
            '{path}:1: level must be a whole number .*, not "hard": rename',
        ),
        (lines({**ROW, "level": 1.5}), "{path}:1: level must be a whole number .*, not 1.5"),
        (lines({**ROW, "level": True}), "{path}:1: level must be a whole number"),
        (lines({**ROW, "id": ""}), "{path}:1: id must be text"),
        (lines({**ROW, "id": 1}, {**ROW, "id": "1"}), "{path}:2: id '1' is that of {path}:1"),
        (lines(ROW) + b'{"problem": "caf\xe9"}', "{path}:2: not UTF-8 at byte 17 of the line"),
        (lines({**ROW, "problem": "\ud83d"}), r"{path}:1: '\\ud83d' is half a character"),
        (b'{"answer": 1, "answer": 2}', "{path}:1: the key 'answer' is there twice"),
        (b'{"x": {"y": 1, "y": 1}}', "{path}:1: the key 'y' is there twice"),
        (b'{"x": ' + b"[" * 70 + b"]" * 70 + b"}", "{path}:1: nested more than 64 deep"),
        (b"[" * 200_000, "{path}:1: nested more than 64 deep"),
        (b'{"x": ' + b"9" * 5000 + b"}", "{path}:1: .*4300 digits"),
        (b'{"x": "' + b"a" * LINE_BYTES + b'"}', "{path}:1: a line of more than 8 MiB"),
        (gzip.compress(lines(ROW), mtime=0)[:-12], "{path}:.*: the gzip is cut short or damaged"),
        (
            gzip.compress(lines(ROW), mtime=0)[:-5] + b"\0" * 5,
            "{path}:2: the gzip is cut short or damaged",
        ),
        (
            gzip.compress(b"", mtime=0)[:10] + b"\xff" * 20,
            "{path}:1: the gzip is cut short or damaged",
        ),
        (b"\x1f\x8b, and then text", "{path}:1: the gzip is cut short or damaged"),
    ],
)
def test_invalid_data_is_refused_in_one_sentence_with_file_and_line(save, data, message):
    path = save(data)
    with pytest.raises(ValueError, match=message.format(path=re.escape(path))) as caught:
        load_problems(path)
    assert type(caught.value) is ValueError  # not a subclass with another message
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2 * len(path) + 200  # long values are shortened


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no/such.jsonl: no such file; .*hub:ORG/NAME"):
        load_problems("no/such.jsonl")
    with pytest.raises(ValueError, match="is a folder: name a JSONL file"):
        load_problems(str(tmp_path))


# Levels, limits


@pytest.fixture
def ten(save) -> str:
    return save(lines(*({**ROW, "level": f"Level {i % 3 + 1}", "id": i} for i in range(10))))


def test_levels_filter_problems(ten):
    assert [p.id for p in load_problems(ten, levels=(3, 2))] == ["1", "2", "4", "5", "7", "8"]
    with pytest.raises(ValueError, match=r"no problem of level 4, 5; levels present: 1, 2, 3$"):
        load_problems(ten, levels=(4, 5))


def test_levels_of_data_without_levels_are_an_error(save):
    with pytest.raises(ValueError, match="no problem of level 1; levels present: none"):
        load_problems(save(lines(ROW)), levels=(1,))


def test_a_limit_draws_nested_subsets_in_order(ten):
    ids = {n: [int(p.id) for p in load_problems(ten, limit=n, seed=1)] for n in (1, 4, 9, 10, 99)}
    assert [len(v) for v in ids.values()] == [1, 4, 9, 10, 10]
    assert all(v == sorted(v) for v in ids.values())
    assert set(ids[1]) < set(ids[4]) < set(ids[9]) < set(ids[10])
    assert ids[4] != [0, 1, 2, 3]  # the first rows of a sorted file may be one subject
    assert ids[4] != [int(p.id) for p in load_problems(ten, limit=4, seed=2)]
    with pytest.raises(ValueError, match="limit is 0"):
        load_problems(ten, limit=0)


# Hub data sets, through a fake of the `datasets` package


@pytest.fixture
def hub(monkeypatch):
    calls = []

    def load_dataset(path, config, *, split):
        assert path == "org/name"
        calls.append((config, split))
        if split == "validation":
            raise ValueError('Unknown split "validation". Should be one of ["train"].\nmore\nlines')
        return [{**ROW, "level": "Level 5", "type": "Algebra"}, {**ROW, "level": "Level 1"}]

    fake = types.ModuleType("datasets")
    fake.__dict__["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return calls


def test_rows_of_the_hub_are_read_like_those_of_a_file(hub):
    first, second = load_problems("hub:org/name")
    assert first == Problem("name:1", ROW["problem"], "42", None, 5, {"type": "Algebra"})
    assert (second.id, second.level) == ("name:2", 1)
    assert len(load_problems("hub:org/name:test[:10%]", levels=(5,))) == 1
    load_problems("hub:org/name/main:test")
    expected = [(None, "train"), (None, "test[:10%]"), ("main", "test")]
    assert hub == expected


@pytest.mark.parametrize("source", ["hub:name", "hub:", "hub:a//b", "hub:a/b/c/d", "hub:/b:train"])
def test_hub_names_are_checked_before_a_download(hub, source):
    with pytest.raises(ValueError, match=f"^{source}: write hub:ORG/NAME"):
        load_problems(source)
    assert hub == []


def test_a_hub_failure_is_one_line_that_names_the_source(hub):
    expected = 'hub:org/name:validation: can\'t be loaded: Unknown split "validation".'
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        load_problems("hub:org/name:validation")
    assert "\n" not in str(caught.value)


def test_without_the_hub_package_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hub:org/name: .*pip install .expo-fast\[data\]."):
        load_problems("hub:org/name")


# Worked examples, fingerprint, overlap


def solved(n: int) -> list[Problem]:
    order = random.Random(0).sample(range(n), n)
    return [Problem(f"{i:03}", f"Q{i}", "A", "s" * (i + 1)) for i in order]


def test_worked_examples_are_short_varied_and_removed_from_the_data():
    problems = solved(90)
    shots, rest = worked_examples(problems, 3)
    assert [shot.id for shot in shots] == ["005", "015", "025"]  # of 0..29, the shortest third
    assert rest == [p for p in problems if p not in shots]
    assert worked_examples(problems[::-1], 3)[0] == shots
    assert worked_examples(problems, 0) == ((), problems)


def test_copies_of_worked_examples_are_removed_from_the_data():
    problems = [*solved(2), Problem("copy", " q0 ", "A"), Problem("new", "Q9", "A")]
    shots, rest = worked_examples(problems, 2)
    assert {shot.id for shot in shots} == {"000", "001"}
    assert [p.id for p in rest] == ["new"]


def test_worked_examples_need_solutions():
    with pytest.raises(ValueError, match=r"3 .*: only 2 problems have a solution; use --shots 2"):
        worked_examples([*solved(2), Problem("x", "Q9", "A")], 3)
    with pytest.raises(ValueError, match="-1 worked examples"):
        worked_examples(solved(2), -1)


def test_the_fingerprint_depends_on_each_field_and_the_order():
    base = Problem("i", "Q", "A", "S", 1, {"a": 1, "b": 2})
    others = [
        Problem("j", "Q", "A", "S", 1, {"a": 1, "b": 2}),
        Problem("i", "q", "A", "S", 1, {"a": 1, "b": 2}),
        Problem("i", ({"role": "user", "content": "Q"},), "A", "S", 1, {"a": 1, "b": 2}),
        Problem("i", "Q", "B", "S", 1, {"a": 1, "b": 2}),
        Problem("i", "Q", "A", None, 1, {"a": 1, "b": 2}),
        Problem("i", "Q", "A", "S", None, {"a": 1, "b": 2}),
        Problem("i", "Q", "A", "S", 1, {"a": 1, "b": 3}),
    ]
    prints = {fingerprint([p]) for p in (base, *others)}
    assert len(prints) == 8
    assert all(re.fullmatch("[0-9a-f]{64}", p) for p in prints)
    assert fingerprint([base, others[0]]) != fingerprint([others[0], base])
    assert fingerprint([base]) == fingerprint([Problem("i", "Q", "A", "S", 1, {"b": 2, "a": 1})])


def test_overlap_ignores_case_spaces_and_unicode_form():
    chat = ({"role": "system", "content": "s"}, {"role": "user", "content": "what  is\n2+2?"})
    train = [Problem("1", "What is 2 + 2?", "4"), Problem("2", "Caf\u00e9?", "y")]
    evaluation = [
        Problem("a", chat, "4"),
        Problem("b", "What is 2-2?", "0"),
        Problem("c", "CAFE\u0301?", "y"),
    ]
    assert [p.id for p in overlap(train, evaluation)] == ["a", "c"]


# builtin:arithmetic


def test_builtin_problems_have_the_given_levels_limit_and_seed():
    problems = load_problems("builtin:arithmetic:eval", levels=(4, 2), limit=7, seed=3)
    assert [p.level for p in problems] == [2, 4, 2, 4, 2, 4, 2]
    third = arithmetic.word_problem(4, 1, split="eval", seed=3)
    assert (problems[3].prompt, problems[3].answer) == (third.question, str(third.answer))
    assert problems[3].solution == third.solution
    assert Counter(p.level for p in load_problems("builtin:arithmetic")) == dict.fromkeys(
        arithmetic.LEVELS, 200
    )


@pytest.mark.parametrize(
    ("source", "levels", "message"),
    [
        ("builtin:geometry", (), "builtin:geometry: no such data set; .*: arithmetic"),
        ("builtin:arithmetic:test", (), "splits train, eval, not level 1 of split 'test'"),
        ("builtin:arithmetic", (2, 9), "levels 1-5 and splits train, eval, not level 9"),
    ],
)
def test_unknown_builtin_sources_are_refused(source, levels, message):
    with pytest.raises(ValueError, match=message):
        load_problems(source, levels=levels)


def test_a_smaller_limit_gives_the_first_problems_of_a_larger_one():
    long = load_problems("builtin:arithmetic", limit=50)
    assert load_problems("builtin:arithmetic", limit=20) == long[:20]


def test_builtin_problems_are_equal_in_another_process():
    code = (
        "from expo_fast.data.problems import *;"
        "print(fingerprint(load_problems('builtin:arithmetic')))"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == fingerprint(load_problems("builtin:arithmetic")), done.stderr


def test_builtin_problems_of_different_seeds_differ():
    one, two = (load_problems("builtin:arithmetic", limit=200, seed=s) for s in (1, 2))
    assert len(overlap(one, two)) < 4


def test_a_builtin_name_may_contain_a_level():
    problems = load_problems("builtin:arithmetic-3:eval", limit=20)
    assert {p.level for p in problems} == {3}
    assert problems == load_problems("builtin:arithmetic:eval", levels=(3,), limit=20)
    with pytest.raises(ValueError, match="levels present: 3"):
        load_problems("builtin:arithmetic-3", levels=(2,))
