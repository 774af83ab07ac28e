"""Repositories of the Hugging Face Hub: download of a snapshot, upload of a folder. No code of them is run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.runs.pretrained import find_run

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]+)?", re.ASCII)  # USER/NAME[@REVISION]
SAFE, PICKLED = ["*.safetensors", "*.json", "*.yaml", "*.md"], ["*.bin", "*.pt", "*.pth"]
REPLACED = ["checkpoints/*", "dit_in_dit_*.py", "*/dit_in_dit_*.py"]  # files of an earlier version, under other names
_AWAY = "no such path, not in the cache, and the Hub cannot be reached: check the name and the network"
_WAYS = {  # by the names of errors: the HTTP client's classes depend on the version of huggingface_hub
    "GatedRepoError": "it is gated: ask for access on its page, then run `hf auth login`, or set HF_TOKEN",
    "RepositoryNotFoundError": "no such path, and no repository that you may use: check the name, or `hf auth login`",
    "RevisionNotFoundError": "it has no such revision: correct what follows '@'",
    "ImportError": "the package huggingface_hub is missing: pip install 'dit-in-dit[hub]'",
    **dict.fromkeys(("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "TransportError"), _AWAY),
}


def is_repo_id(text: str) -> bool:
    """Whether a text is USER/NAME or USER/NAME@REVISION, and neither a path that exists nor a pretrained model."""
    return NAME.fullmatch(text) is not None and not find_run(text).exists()


def fetch_repo(repo_id: str) -> Path:
    """Folder with the weights, JSON, YAML and card of USER/NAME[@REVISION], from the cache or the Hub.

    Pickled weights are fetched only if there are no `.safetensors`; `safe_load` reads them without running code.
    UserError if the repository does not exist, needs access, or is neither cached nor reached.
    """
    name, _, revision = repo_id.partition("@")
    with _hub(f"fetch {repo_id}") as hub:
        folder = Path(hub.snapshot_download(name, revision=revision or None, allow_patterns=SAFE))
        if not any(folder.rglob("*.safetensors")):
            hub.snapshot_download(name, revision=folder.name, allow_patterns=PICKLED)
    return folder


def push_folder(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a folder as the repository USER/NAME, which is created if it does not exist, and return its URL. UserError
    if there is no token, or the Hub refuses the name or the upload.
    """
    with _hub(f"push {repo_id}") as hub:
        if hub.get_token() is None:
            raise UserError(f"cannot push {repo_id}: no token of the Hub; run `hf auth login`, or set HF_TOKEN")
        url = hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(folder_path=folder, repo_id=url.repo_id, delete_patterns=REPLACED)
    return str(url)


@contextmanager
def _hub(action: str) -> Iterator[Any]:
    """The package huggingface_hub, whose errors become a UserError."""
    try:
        yield import_module("huggingface_hub")
    except UserError:
        raise
    except Exception as error:  # of the Hub, its client, HTTP or the disk
        ways = [_WAYS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _WAYS]
        way = ways[0] if ways else truncate(" ".join(str(error).split()) or type(error).__name__, 120)
        raise UserError(f"cannot {truncate(action, 70)}: {way}") from None
