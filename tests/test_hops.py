"""A training step has few hops to a kernel, and no two modules call each other."""

from pathlib import Path

import pytest

from expo_fast import train
from expo_fast.methods import METHODS
from expo_fast.weights import save_model
from hops import trace
from jobs import write_rows
from tiny import tiny_model, tiny_tokenizer

MOST_MODULES_IN_A_CHAIN = 7  # from the command line to the backend, of the model or of the loss


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("method", ["expo-grpo", "expo-dpo", "sft"])
def test_a_step_has_a_short_chain_of_modules_and_no_callbacks(tmp_path: Path, method: str):
    save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    rows = [
        {"question": f"{n} + 1?", "answer": str(n + 1), "solution": f"{n} + 1 = {n + 1}."}
        for n in range(4)
    ]
    write_rows(tmp_path / "train.jsonl", rows)
    flags = (
        f"--method {method} --model {tmp_path}/model --train-data {tmp_path}/train.jsonl "
        f"--output-dir {tmp_path}/run --shots 0 --eval-every 0 --steps 1 --prompts-per-step 4 "
        "--max-completion-length 20 --dtype float32"
    )
    hops = trace(train.main, flags.split())
    assert hops.mutual_pairs == []
    assert len(hops.longest_chain) <= MOST_MODULES_IN_A_CHAIN, hops.longest_chain
    loop = METHODS[method].loop
    assert {f"algorithms.{loop}", "op_backends.custom_ops"} <= hops.modules
