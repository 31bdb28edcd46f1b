"""Fetch model folders from the Hugging Face hub, and recognize the folders of its cache."""

import re
from dataclasses import dataclass
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

SNAPSHOT = re.compile(r".*/models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)")


@dataclass(frozen=True)
class Repository:
    """A repository of the hub at one of its revisions."""

    name: str  # ORG/NAME
    revision: str  # a commit


def cached_repository(folder: Path) -> Repository | None:
    """Return the repository that a folder of the hub's cache is a snapshot of, or None."""
    parts = SNAPSHOT.fullmatch(folder.resolve().as_posix())
    if parts is None:
        return None
    return Repository(f"{parts['org']}/{parts['name']}", parts["revision"])


def snapshot(
    name: str,  # ORG/NAME
    files: list[str],  # patterns of the files to fetch
    *,
    revision: str | None = None,  # branch, tag or commit; None: the main branch
    offline: bool = False,  # only look into the hub's local cache
    timeout_s: float = 10,
) -> Path:
    """Return the local folder of a hub repository, after downloading the files that it lacks.

    Raise an OSError or ValueError of huggingface_hub if the files cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        name,
        revision=revision,
        allow_patterns=files,
        local_files_only=offline,
        etag_timeout=timeout_s,
    )
    return Path(folder)
