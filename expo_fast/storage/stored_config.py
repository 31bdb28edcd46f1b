"""A config.json that needs no other library to be read, and its transformers config.

The configs of transformers import half of torch, which takes as long as torch itself. Most starts
of a run need only numbers that config.json states. They are taken from the file if transformers
would take each of them unchanged. transformers reads every other config.json at once.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# transformers takes other fields or computes defaults for other architectures.
EXPLICIT_TYPES = ("llama",)
ROPE_FIELDS = {"rope_theta", "rope_type"}
DTYPES = ("float32", "bfloat16", "float16")


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _is_fraction(value: Any) -> bool:
    return type(value) is float and 0 <= value <= 1


def _is_token(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 0)


def _is_ends(value: Any) -> bool:
    if isinstance(value, list):
        return all(type(token) is int for token in value)
    return _is_token(value)


def _is_default_rope(value: Any) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, dict)
        and value.keys() == ROPE_FIELDS
        and value["rope_type"] == "default"
        and _is_number(value["rope_theta"])
    )


# Fields without which transformers would take a default.
NEEDED: dict[str, Callable[[Any], bool]] = {
    "model_type": _is_text,
    "vocab_size": _is_size,
    "hidden_size": _is_size,
    "intermediate_size": _is_size,
    "num_hidden_layers": _is_size,
    "num_attention_heads": _is_size,
    "num_key_value_heads": _is_size,
    "max_position_embeddings": _is_size,
    "rms_norm_eps": _is_fraction,
    "hidden_act": _is_text,
    "attention_bias": _is_flag,
    "mlp_bias": _is_flag,
    "tie_word_embeddings": _is_flag,
    "eos_token_id": _is_ends,
}
# Fields that may be missing. The decoder does not read them, apart from head_dim and RoPE's.
OPTIONAL: dict[str, Callable[[Any], bool]] = {
    "head_dim": _is_size,
    "rope_parameters": _is_default_rope,
    "rope_theta": _is_number,
    "rope_scaling": lambda value: value is None,
    "_model_name_or_path": _is_text,
    "_name_or_path": _is_text,
    "architectures": lambda value: isinstance(value, list),
    "attention_dropout": _is_fraction,
    "bos_token_id": _is_token,
    "dtype": lambda value: value in DTYPES,
    "initializer_range": _is_fraction,
    "is_llama_config": _is_flag,
    "pad_token_id": _is_token,
    "pretraining_tp": _is_size,
    "rope_interleaved": _is_flag,
    "torch_dtype": lambda value: value in DTYPES,
    "transformers.js_config": lambda value: isinstance(value, dict),
    "transformers_version": _is_text,
    "unk_token_id": _is_token,
    "use_cache": _is_flag,
}
CHECKS = NEEDED | OPTIONAL
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def is_explicit(values: Mapping[str, Any]) -> bool:
    """Return whether transformers takes what the decoder needs unchanged from these values.

    It refuses some values and warns of others, so any value that is unusual is left to it.
    """
    if values.get("model_type") not in EXPLICIT_TYPES or not NEEDED.keys() <= values.keys():
        return False
    for name, value in values.items():
        if name not in CHECKS or not CHECKS[name](value):
            return False
    if values["hidden_size"] % values["num_attention_heads"]:
        return False
    for name in TOKENS:
        token = values.get(name)
        if isinstance(token, int) and token >= values["vocab_size"]:
            return False
    return bool(values.get("rope_parameters")) or "rope_theta" in values


class StoredConfig:
    """The values of a config.json, which is read with transformers when more is needed.

    Attributes are those of the transformers config. Changed ones are changed there too.
    """

    def __init__(self, folder: Path, values: Mapping[str, Any]):
        """values: of the config.json of `folder`, for which `is_explicit` holds."""
        set_own = super().__setattr__
        set_own("_folder", folder)
        set_own("_file_values", dict(values))
        set_own("_values", _decoder_values(values))
        set_own("_changed", {})
        set_own("_complete", None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for their methods
            raise AttributeError(name)
        if self._complete is None and name in self._values:
            return self._values[name]
        return getattr(self.complete(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._complete is not None:
            setattr(self._complete, name, value)
            return
        self._values[name] = value
        self._changed[name] = value

    def __copy__(self) -> Any:
        return copy.copy(self.complete())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.complete(), memo)

    def complete(self) -> Any:
        """Return the transformers config, which is made at the first call.

        It is made from the values that were read, because the folder may be gone by then.
        """
        if self._complete is None:
            from transformers import AutoConfig

            values = copy.deepcopy(self._file_values)
            kind = type(AutoConfig.for_model(values["model_type"]))
            config: Any = kind.from_dict(values, name_or_path=str(self._folder))
            for name, value in self._changed.items():
                setattr(config, name, value)
            super().__setattr__("_complete", config)
        return self._complete

    def fields(self) -> dict[str, Any]:
        """Return the values that the decoder reads."""
        if self._complete is not None:
            return vars(self._complete)
        return dict(self._values)


def _decoder_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that the decoder reads, as transformers names them."""
    chosen = {name: values[name] for name in NEEDED}
    heads = values["num_attention_heads"]
    chosen["head_dim"] = values.get("head_dim") or values["hidden_size"] // heads
    theta = values.get("rope_theta")
    chosen["rope_parameters"] = values.get("rope_parameters") or {
        "rope_theta": theta,
        "rope_type": "default",
    }
    return chosen


def complete_config(config: Any) -> Any:
    """Return the transformers config of a config, which may be a `StoredConfig`."""
    return config.complete() if isinstance(config, StoredConfig) else config


def config_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a config for `check_config`."""
    fields = config.fields() if isinstance(config, StoredConfig) else vars(config)
    return fields | {"model_type": config.model_type}
