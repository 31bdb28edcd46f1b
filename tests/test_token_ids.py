"""Tokenizers and embeddings may differ in size. Texts beyond the embedding are refused early."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from expo_fast import evaluate, train
from expo_fast.cli import exit_status
from expo_fast.generate import Generator, Request
from expo_fast.modeling.lora import attach, save_adapter
from expo_fast.modeling.packing import Sample, forward
from expo_fast.weights import save_model
from jobs import rows_in, write_rows
from tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer, tiny_vocabulary

V = len(tiny_vocabulary())
EXTRA = "<extra>"  # the tokenizer's token V, which the embedding lacks


def larger_tokenizer(**changes: Any) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([EXTRA])
    assert tokenizer.convert_tokens_to_ids(EXTRA) == V
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def write_data(file: Path, *, first: int, **changes: str) -> None:
    """Write nine problems. `changes` are columns of the last one."""
    rows = []
    for n in range(first, first + 9):
        row = {"id": f"q{n}", "question": f"{n} + 1?", "answer": str(n + 1)}
        row |= {"solution": f"{n} + 1 = {n + 1}.", "chosen": f"{n + 1}", "rejected": "none"}
        rows.append(row)
    rows[-1] |= changes
    write_rows(file, rows)


def flags(folder: Path, method: str) -> list[str]:
    text = (
        f"--model {folder}/model --train-data {folder}/train.jsonl --eval-data {folder}/eval.jsonl "
        f"--output-dir {folder}/run --method {method} --steps 1 --prompts-per-step 2 --shots 0 "
        "--max-completion-length 8 --eval-limit 9 --eval-samples 1 --dtype float32"
    )
    if method == "expo-dpo":  # offline, a random model that explains nothing ends the run
        text += " --pairs-every 1"
    return text.split()


def make_job(
    folder: Path,
    tokenizer: Any,
    train_data: dict[str, str] | None = None,
    eval_data: dict[str, str] | None = None,
) -> None:
    save_model(tiny_model(), tokenizer, folder / "model")
    write_data(folder / "train.jsonl", first=0, **(train_data or {}))
    write_data(folder / "eval.jsonl", first=100, **(eval_data or {}))


def one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], main: Any) -> str:
    """Return the only line that a command prints when it refuses its arguments."""
    assert exit_status.run(main, arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str], main: Any) -> str:
    """Return the only line that a command prints when it refuses a text."""
    line = one_line(capsys, arguments, main)
    assert f"token '{EXTRA}' with the id {V}" in line
    assert f"embedding has {V} rows" in line
    return line


METHODS = ("grpo", "expo-grpo", "expert-grpo", "star", "expo-dpo", "expert-dpo", "dpo", "sft")
IN_TEMPLATE = CHAT_TEMPLATE.replace("assistant\n", f"assistant{EXTRA}\n")


@pytest.mark.parametrize("only", ["", "--dry-run"])
@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_beyond_the_embedding_is_refused_before_any_work(
    tmp_path, capsys, method: str, only: str
):
    make_job(tmp_path, larger_tokenizer(), {"question": f"What is {EXTRA}?"})
    line = refusal(capsys, [*flags(tmp_path, method), *only.split()], train.main)
    assert "problem q8" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "more", "tokenizer", "train_data", "eval_data"),
    [
        ("grpo", "", {"chat_template": IN_TEMPLATE}, {}, {}),
        ("grpo", f"--system-prompt {EXTRA}", {"chat_template": IN_TEMPLATE}, {}, {}),
        ("grpo", "--shots 7", {}, {"solution": EXTRA}, {}),
        ("grpo", f"--instruction {EXTRA}", {}, {}, {}),
        ("grpo", "", {}, {}, {"question": EXTRA}),
        ("grpo", "--diagnose 4", {}, {"solution": EXTRA}, {}),
        ("expo-grpo", "--diagnose 0", {}, {"answer": EXTRA}, {}),
        ("expert-grpo", "--diagnose 0", {}, {"solution": EXTRA}, {}),
        ("expert-dpo", "--diagnose 0", {}, {"solution": EXTRA}, {}),
        ("dpo", "", {}, {"chosen": EXTRA}, {}),
        ("dpo", "", {}, {"rejected": EXTRA}, {}),
        ("sft", "", {}, {"chosen": EXTRA}, {}),
    ],
)
def test_any_text_beyond_the_embedding_is_refused_in_a_dry_run(
    tmp_path, capsys, method, more, tokenizer, train_data, eval_data
):
    make_job(tmp_path, larger_tokenizer(**tokenizer), train_data, eval_data)
    arguments = [*flags(tmp_path, method), *more.split(), "--dry-run"]
    refusal(capsys, arguments, train.main)


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE.replace("<|im_end|>", EXTRA)])
@pytest.mark.parametrize("method", ["grpo", "expo-dpo", "sft"])
def test_an_end_beyond_the_embedding_is_refused(tmp_path, capsys, method, template):
    tokenizer = larger_tokenizer(chat_template=template, eos_token=EXTRA)
    make_job(tmp_path, tokenizer)
    line = one_line(capsys, [*flags(tmp_path, method), "--dry-run"], train.main)
    assert f"a turn ends with {EXTRA} ({V}), but the model's vocabulary has {V} tokens" in line


@pytest.mark.parametrize("method", METHODS)
def test_a_larger_tokenizer_trains_if_its_further_tokens_do_not_occur(tmp_path, method: str):
    make_job(tmp_path, larger_tokenizer())
    train.main(flags(tmp_path, method))
    (row,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(row)["step"] == 1


@pytest.mark.parametrize(
    ("method", "more", "tokenizer", "train_data"),
    [
        ("grpo", "--diagnose 0", {}, {"solution": EXTRA}),
        ("grpo", "--diagnose 0", {"eos_token": EXTRA}, {}),  # texts end as the template's do
        ("expo-grpo", "--append-answer", {"eos_token": EXTRA}, {}),
        ("expert-grpo", "--diagnose 0", {"eos_token": EXTRA}, {}),
        ("sft", "", {"eos_token": EXTRA}, {}),
        ("dpo", "", {}, {"answer": EXTRA}),
        ("sft", "", {}, {"rejected": EXTRA}),
    ],
)
def test_texts_that_a_run_does_not_read_may_have_further_tokens(
    tmp_path, method, more, tokenizer, train_data
):
    make_job(tmp_path, larger_tokenizer(**tokenizer), train_data)
    train.main([*flags(tmp_path, method), *more.split(), "--eval-every", "0"])


def test_an_adapters_larger_tokenizer_is_compared_with_the_bases_embedding(tmp_path, capsys):
    make_job(tmp_path, tiny_tokenizer())
    model = tiny_model()
    attach(model, rank=2, alpha=4, seed=0)
    tokenizer = larger_tokenizer(chat_template=IN_TEMPLATE)
    save_adapter(model, tokenizer, tmp_path / "adapter", str(tmp_path / "model"))
    arguments = [*flags(tmp_path, "grpo"), "--model", str(tmp_path / "adapter"), "--dry-run"]
    refusal(capsys, arguments, train.main)


@pytest.mark.parametrize("changes", [{"question": EXTRA}, {"answer": EXTRA}])
def test_an_evaluation_reads_only_the_questions(tmp_path, capsys, changes: dict[str, str]):
    make_job(tmp_path, larger_tokenizer(), eval_data=changes)
    arguments = f"--model {tmp_path}/model --data {tmp_path}/eval.jsonl --shots 0 --samples 1"
    arguments += " --max-completion-length 4"
    if "question" in changes:
        assert "problem q108" in refusal(capsys, arguments.split(), evaluate.main)
    else:
        evaluate.main(arguments.split())


@pytest.mark.parametrize("method", ["grpo", "expo-grpo", "expo-dpo"])
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None])
def test_an_embedding_larger_than_the_tokenizer_trains(tmp_path, method: str, template: Any):
    """The model can draw ids without a token. Their text is empty."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    make_job(tmp_path, tokenizer)
    save_model(tiny_model(vocab_size=4 * V), tokenizer, tmp_path / "model")
    train.main([*flags(tmp_path, method), "--num-generations", "4"])
    file = tmp_path / "run/completions/step-1.jsonl"
    rows = rows_in(file)
    assert method != "grpo" or min(len(row["completion"]) for row in rows) < 8


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_sampled_id_without_a_token_has_no_text_and_stops_nothing(backend: str):
    model = tiny_model(vocab_size=4 * V)
    generator = Generator(model, tokenizer=tiny_tokenizer(), backend=backend)
    asked = [Request([5, 6], 20, seed=s, stop_ids=(), stop_strings=("zq~",)) for s in range(8)]
    done = generator.sample(asked)
    drawn = [token for completion in done for token in completion.token_ids]
    assert max(drawn) >= V
    assert {completion.finish_reason for completion in done} == {"length"}
    assert tiny_tokenizer().decode([V, 5, V + 1]) == tiny_tokenizer().decode([5])


def test_a_sample_beyond_the_embedding_is_named_before_the_forward_pass():
    samples = [Sample((5, 6), (7, V, 8))]
    with pytest.raises(ValueError, match=f"a sample has the token id {V} outside"), torch.no_grad():
        list(forward(tiny_model(), samples, 64))
