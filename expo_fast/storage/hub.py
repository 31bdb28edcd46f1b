"""Fetch model folders from the Hugging Face hub."""

from pathlib import Path

MODEL_FILES = [  # patterns of what a model or an adapter needs; never a pickle
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "adapter_config.json",
    "adapter_model.safetensors",
]


def snapshot(
    name: str,  # ORG/NAME
    files: list[str],  # patterns of the files to fetch
    *,
    offline: bool = False,  # only look into the hub's local cache
    timeout_s: float = 10,
) -> Path:
    """Return the local folder of a hub repository, after downloading the files that it lacks.

    Raise an OSError or ValueError of huggingface_hub if the files cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        name, allow_patterns=files, local_files_only=offline, etag_timeout=timeout_s
    )
    return Path(folder)
