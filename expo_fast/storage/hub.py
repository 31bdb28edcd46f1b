"""Model folders of the Hugging Face hub: download, upload, and the folders of its cache."""

import re
import shutil
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

CARD = "README.md"
NOT_UPLOADED = ("MANIFEST.json", CARD)  # the manifest lists files of the trainer's state too
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


def is_folder(target: str) -> bool:
    """Return whether the target of an upload is a local folder, which begins with / or a dot."""
    return target.startswith(("/", "."))


def name_of(target: str) -> str:
    """Return the name of a repository, or of a local folder."""
    return Path(target).name


def check_target(target: str | None) -> None:
    """Raise ValueError if nothing can be uploaded to ORG/NAME. None: nothing will be.

    It asks the hub for the name of the token's owner.
    """
    if target is None or is_folder(target):
        return
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # also of the network
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--push-to-hub {target}: the hub accepts no upload ({reason}): run `hf auth login`, "
            "or set HF_TOKEN"
        ) from error


def push(folder: Path, card: str, target: str) -> str:
    """Upload the files of a model folder and its card, in one commit. Return where they are.

    target: ORG/NAME, which is created if it does not exist, or a local folder.
    Raise an OSError or an error of huggingface_hub if a file cannot be written.
    """
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    files = [file for file in files if file.name not in NOT_UPLOADED]
    if is_folder(target):
        local = Path(target)
        local.mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(file, local)
        (local / CARD).write_text(card, encoding="utf-8")
        return target
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    api.create_repo(target, exist_ok=True)
    operations = [
        CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in files
    ]
    operations.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=card.encode()))
    commit = api.create_commit(
        target,
        operations,
        commit_message=f"Upload {folder.name} with expo_fast",
    )
    return str(commit.repo_url)
