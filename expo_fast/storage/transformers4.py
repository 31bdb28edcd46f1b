"""The fields of config.json and tokenizer_config.json that transformers 4 reads.

transformers 5 has renamed some fields and writes only the new names. transformers 4 then uses a
default without a warning, for example a RoPE base of 10000. So do other programs that read the old
names, such as versions of vLLM and llama.cpp. All of them can read files with both names.
"""

import json
from typing import Any

# Fields of a loaded tokenizer that describe where it was loaded from.
ORIGIN = ("is_local", "local_files_only")
# Parts of `rope_parameters` that do not belong to `rope_scaling`.
OUTSIDE_ROPE_SCALING = ("rope_theta", "partial_rotary_factor")


def config_for_both(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json of transformers 5, and add those of transformers 4.

    `rope_parameters` gives `rope_theta` and `rope_scaling`, and `dtype` gives `torch_dtype`.
    """
    rope = values["rope_parameters"]
    old: dict[str, Any] = {}
    if "sliding_attention" in rope:  # one set for the layers with a window, of Gemma 3 and OLMo 3
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if rope["rope_type"] == "longrope":  # transformers 5 takes the name from rope_scaling
        old["rope_parameters"] = rope | {"type": "longrope"}
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return {
        **values,
        **old,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": _rope_scaling(rope),
        "torch_dtype": values["dtype"],
    }


def _rope_scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    if rope["rope_type"] == "default":
        return None
    if rope["rope_type"] == "longrope":  # Phi-3 refuses other keys
        return {"type": "longrope"} | {key: rope[key] for key in ("short_factor", "long_factor")}
    return {key: value for key, value in rope.items() if key not in OUTSIDE_ROPE_SCALING}


def tokenizer_config_for_both(values: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return the fields of a tokenizer_config.json that transformers 4 and 5 load.

    values: the fields that transformers 5 has written for `tokenizer`. The tokenizer has a backend
        of the `tokenizers` library.

    Both versions then use tokenizer.json unchanged. The fields state every value for which their
    defaults differ.
    """
    values = {key: value for key, value in values.items() if key not in ORIGIN}
    extra_tokens = values.pop("extra_special_tokens", None)  # a list; in transformers 4 a dict
    if extra_tokens:
        values["additional_special_tokens"] = extra_tokens
    named_tokens = values.pop("model_specific_special_tokens", None)  # such as image_token
    if named_tokens:
        values["extra_special_tokens"] = named_tokens
    if tokenizer.chat_template:  # some programs do not read chat_template.jinja
        values["chat_template"] = _chat_template(tokenizer.chat_template)
    return {
        **values,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": tokenizer.model_input_names,
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "clean_up_tokenization_spaces": _cleans_up(tokenizer),
        "add_prefix_space": _adds_prefix_space(tokenizer),
    }


def _chat_template(template: str | dict[str, str]) -> str | list[dict[str, str]]:
    """Return the value of `chat_template` for one template, or for several named templates."""
    if isinstance(template, str):
        return template
    return [{"name": name, "template": text} for name, text in template.items()]


def _cleans_up(tokenizer: Any) -> bool:
    """Return whether decoding removes spaces before punctuation.

    transformers 5 ignores the flag for BPE, but transformers 4 does not.
    """
    is_bpe = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
    forced = tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    return bool(tokenizer.clean_up_tokenization_spaces and (forced or not is_bpe))


def _adds_prefix_space(tokenizer: Any) -> bool:
    """Return `add_prefix_space` of the pre-tokenizer.

    transformers 4 sets it in the pre-tokenizer to the value in tokenizer_config.json.
    """
    pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    if pre_tokenizer is None:
        return False
    state = json.loads(pre_tokenizer.__getstate__())
    return bool(state.get("add_prefix_space", False))
