"""What transformers 4 makes of saved folders: python read_with_transformers4.py FOLDER RESULTS.

The subprocess of test_transformers4.py. It imports nothing of expo_fast.

    FOLDER/models/NAME        their logits of FOLDER/tokens.json
    FOLDER/adapters/NAME      their logits, by PEFT
    FOLDER/tokenizers/NAME    what they make of FOLDER/texts.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

CHAT = [{"role": "user", "content": "  12 + 3?\n"}, {"role": "assistant", "content": "15"}]


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> list[list[float]]:
    return model.eval()(input_ids=torch.tensor([ids])).logits[0].double().tolist()


def tokenizer_results(tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """Return what a tokenizer does, as JSON values."""
    encoded = [dict(tokenizer(text)) for text in texts]
    ids = [row["input_ids"] for row in encoded]
    results = {
        "encoded": encoded,
        "without special tokens": [tokenizer(t, add_special_tokens=False).input_ids for t in texts],
        "decoded": [tokenizer.decode(row) for row in ids],
        "decoded without special tokens": [
            tokenizer.decode(row, skip_special_tokens=True) for row in ids
        ],
        "length": len(tokenizer),
        "special ids": sorted(tokenizer.all_special_ids),
        "start and end": [tokenizer.bos_token, tokenizer.eos_token],
        "pad and unknown": [tokenizer.pad_token, tokenizer.unk_token],
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
        "limit": tokenizer.model_max_length,
        "image_token": getattr(tokenizer, "image_token", None),
    }
    if tokenizer.chat_template:
        results["template"] = tokenizer.chat_template
        results["chat"] = tokenizer.apply_chat_template(
            CHAT, tokenize=False, add_generation_prompt=True
        )
    return results


def main(folder: Path, results_file: Path) -> None:
    tokens = json.loads((folder / "tokens.json").read_text())
    texts = json.loads((folder / "texts.json").read_text())
    results: dict[str, Any] = {"version": transformers.__version__}
    models: dict[str, Any] = {}
    for path in sorted((folder / "models").iterdir()):
        model = AutoModelForCausalLM.from_pretrained(path)
        models[path.name] = {"logits": logits(model, tokens), "dtype": str(model.dtype)}
        if (path / "generation_config.json").exists():
            models[path.name]["generation"] = GenerationConfig.from_pretrained(path).to_dict()
    results["models"] = models
    results["adapters"] = {}
    for path in sorted((folder / "adapters").iterdir()):
        model = AutoPeftModelForCausalLM.from_pretrained(path)
        results["adapters"][path.name] = logits(model, tokens)
    results["tokenizers"] = {}
    for path in sorted((folder / "tokenizers").iterdir()):
        tokenizer = AutoTokenizer.from_pretrained(path)
        results["tokenizers"][path.name] = tokenizer_results(tokenizer, texts)
    default = folder / "default"
    if default.exists():
        tokenizer = AutoTokenizer.from_pretrained(default)
        ids = tokenizer("\n".join(texts[:12])).input_ids
        model = AutoModelForCausalLM.from_pretrained(default, dtype=torch.float32)
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
        results["default"] = {"ids": ids, "nats": loss.item()}
    results_file.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
