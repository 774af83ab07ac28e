"""Repositories of the Hugging Face Hub: names, download of a snapshot, upload of a folder. No code is run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.runs.pretrained import find_run

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)  # USER/NAME
SAFE, PICKLED = ("*.safetensors", "*.json", "*.yaml", "*.md"), ("*.bin", "*.pt", "*.pth")
REPLACED = ("checkpoints/*", "dit_in_dit_*.py", "*/dit_in_dit_*.py")  # what an earlier push of another version left


def is_repo_id(text: str) -> bool:
    """Whether a text is USER/NAME or USER/NAME@REVISION, and neither a path that exists nor a pretrained model."""
    name, at, revision = text.partition("@")
    return NAME.fullmatch(name) is not None and bool(revision) == bool(at) and not find_run(text).exists()


def fetch_repo(repo_id: str) -> Path:
    """Folder with the repository's weights, JSON, YAML and card, from the cache or the Hub.

    Pickled weights are fetched only if there are no `.safetensors`; `safe_load` reads them without running code.

    Args:
        repo_id: USER/NAME or USER/NAME@REVISION; the revision is a branch, tag or commit.

    Raises:
        UserError: the repository does not exist, needs access, or is neither cached nor reached.
    """
    name, _, revision = repo_id.partition("@")
    with _one_line(repo_id, "fetch") as hub:

        def snapshot(patterns: tuple[str, ...]) -> Path:
            return Path(hub.snapshot_download(name, revision=revision or None, allow_patterns=list(patterns)))

        folder = snapshot(SAFE)
        return folder if any(folder.rglob("*.safetensors")) else snapshot((*SAFE, *PICKLED))


def push_folder(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a folder as the repository USER/NAME, which is created if it does not exist. Returns its URL.

    Raises:
        UserError: the name is no USER/NAME, there is no token, or the Hub refuses the upload.
    """
    if not NAME.fullmatch(repo_id):
        raise UserError(f"a repository is USER/NAME, of letters, digits, '-', '_' and '.': got {truncate(repo_id)!r}")
    with _one_line(repo_id, "push") as hub:
        if hub.get_token() is None:
            raise UserError(f"cannot push {repo_id}: no token of the Hub; run `hf auth login`, or set HF_TOKEN")
        url = hub.create_repo(repo_id, private=private, exist_ok=True)
        about = "Upload by dit-in-dit"
        hub.upload_folder(folder_path=folder, repo_id=repo_id, commit_message=about, delete_patterns=list(REPLACED))
    return str(url)


@contextmanager
def _one_line(repo_id: str, action: str) -> Iterator[Any]:
    """The package huggingface_hub, whose errors become a UserError."""
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError:
        raise UserError(f"{repo_id} needs the package huggingface_hub: pip install 'dit-in-dit[hub]'") from None
    try:
        yield hub
    except UserError:
        raise
    except errors.GatedRepoError:
        way = "it is gated: ask for access on its page, then run `hf auth login`, or set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        way = "no such path, and no repository on the Hub that you may use: check the name, or run `hf auth login`"
    except errors.RevisionNotFoundError:
        way = "it has no such revision: leave out what follows '@'"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        way = "no such path, not in the cache, and the Hub cannot be reached: check the name and the network"
    except Exception as error:  # of the Hub, its client, HTTP, or the disk
        way = truncate((str(error).strip() or type(error).__name__).splitlines()[0], 120)
    raise UserError(f"cannot {action} {truncate(repo_id, 60)}: {way}")
