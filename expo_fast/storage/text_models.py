"""The text model inside a model of images and text, such as Gemma 3 from 4B on and Ministral 3.

Their config has a `text_config`, and their files also hold the tensors of images, which are left
out. What is saved later is the text model alone, which transformers loads without the rest.
"""

import re
from collections.abc import Mapping
from typing import Any

MODEL_TYPES = ("gemma3", "mistral3")
OF_IMAGES = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\.")
OF_TEXT = re.compile(r"(?:model\.language_model|language_model\.model)\.")
HEAD = re.compile(r"language_model\.lm_head\.")


def has_text_model(values: Mapping[str, Any]) -> bool:
    """Return whether the values of a config.json are those of a model of images and text."""
    return values.get("model_type") in MODEL_TYPES and isinstance(values.get("text_config"), dict)


def text_key(key: str) -> str | None:
    """Return the name of a tensor in the text model alone; None for a tensor of images."""
    if OF_IMAGES.match(key):
        return None
    for prefix, name in ((OF_TEXT, "model."), (HEAD, "lm_head.")):
        if prefix.match(key):
            return prefix.sub(name, key, count=1)
    return key
