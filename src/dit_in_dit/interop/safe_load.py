"""Weights from files of others, read without running any of them.

A `.pt` file is a pickle: a program. It is read with torch's restricted unpickler, which knows tensors, plain values
and, here, `argparse.Namespace` (in which the official DiT keeps its arguments); whatever else it names is refused.
What was read is then looked at, because plain tensors can still lie about how large they are.
"""

from __future__ import annotations

import argparse
import re
import stat
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dit_in_dit.config.errors import UserError, truncate

PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)  # bool is an int
DEEPEST = 20  # groups within groups; an optimizer's state has five
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # DDP, compile, FSDP
MODELS = ("model.", "ema.", "ema_model.")  # the model as a part of another module, such as Lightning's
MOST_SHARED = 4  # bytes of all tensors together over those of their file: weights may be tied, not multiplied


def read_pt(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote: a dict of tensors and plain values, nested; no code of the file is run.

    Tensors lie on the CPU; those of a zip file (torch 1.6 and newer) are mapped, so that what is never touched is never
    read. A file in the older format is read whole. A name in `.safetensors` is read as such.

    Raises:
        UserError: it cannot be read, is damaged, holds something else, or would run code; one line of at most 200
            characters.
    """
    if path.suffix == ".safetensors":
        return dict(read_safetensors(path))
    size = _size(path)
    packed = _check_zip(path, size)
    try:
        # Bytes that make no sense bring warnings; what comes of them is said below.
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(str(path), map_location="cpu", weights_only=True, mmap=packed)
    except Exception as error:  # what torch raises on damaged bytes is anything from AssertionError to struct.error
        raise _refused(path, _reason(error)) from None
    return _plain(path, found, size)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, by name. Raises UserError as `read_pt` does."""
    _size(path)
    try:
        return load_file(path)
    except Exception as error:  # besides SafetensorError, Python's errors about odd headers
        known = isinstance(error, SafetensorError | OSError)
        raise _refused(path, str(error).splitlines()[0][:60] if known and str(error) else "it is damaged") from None


def unwrapped(weights: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Weights by the names that they have in the model itself, whatever was around it, or around its blocks.

    Raises:
        UserError: two weights would have the same name.
    """
    found: dict[str, Any] = {}
    for name, value in weights.items():
        bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if bare in found:
            raise UserError(f"{what} has two weights {truncate(bare, 60)!r}, wrapped and not: keep one of them")
        if name != "n_averaged":  # the counter of torch's AveragedModel
            found[bare] = value
    while prefix := next((p for p in MODELS if found and all(name.startswith(p) for name in found)), None):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _refused(path: Path, reason: str) -> UserError:
    return UserError(f"cannot read {truncate(str(path), 60)}: {reason}; get it again, or as .safetensors")


def _size(path: Path) -> int:
    """Bytes of a regular file (to open a pipe would wait for ever) that can be read."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise _refused(path, "it is not a file")
        with path.open("rb"):
            pass
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, UserError):
            raise
        raise _refused(path, (getattr(error, "strerror", None) or str(error))[:60]) from None
    if not found.st_size:
        raise _refused(path, "it is empty")
    return found.st_size


def _check_zip(path: Path, size: int) -> bool:
    """Whether the file is a zip; refused when its members are not as `torch.save` writes them: stored as they are, so
    that they cannot grow, one after the other, and the only archive in the file."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # how torch tells the two formats apart
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            members, comment = archive.infolist(), archive.comment
    except Exception:  # zipfile raises nearly as much as torch does
        raise _refused(path, "its zip directory is damaged") from None
    compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if compressed or comment or sum(member.file_size for member in members) > size:
        raise _refused(path, "its members are not stored as torch.save stores them (a zip bomb?)")
    return True


def _reason(error: Exception) -> str:
    """Why torch gave up, in a few words."""
    message = str(error)
    named = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", message)
    if named:
        return f"it is made of {truncate(named[1], 40)}, which could run code"
    if "TorchScript" in message:
        return "it is a TorchScript program, not weights"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:60]
    return "it is damaged, or holds more than tensors and plain values"


class _Plain:
    """Copies of plain values out of what was unpickled: new containers, and tensors that share the memory but nothing
    else that may hang on them (hooks, attributes, gradients)."""

    def __init__(self) -> None:
        self.bytes = 0  # of all tensors
        self._made: dict[int, Any] = {}  # by id: what is shared is copied once

    def __call__(self, value: Any, depth: int = 0) -> Any:
        """The copy; ValueError when it is, or holds, anything else."""
        if isinstance(value, PLAIN):
            return value
        if depth > DEEPEST:
            raise ValueError(f"it nests more than {DEEPEST} levels")
        if id(value) not in self._made:
            self._made[id(value)] = self._copy(value, depth + 1)
        return self._made[id(value)]

    def _copy(self, value: Any, depth: int) -> Any:
        if isinstance(value, Tensor):
            ordinary = type(value) in (Tensor, torch.nn.Parameter) and not value.is_quantized
            if not ordinary or value.layout != torch.strided or value.device.type != "cpu":
                raise ValueError(f"it holds a {truncate(type(value).__name__, 40)} that is no ordinary tensor")
            self.bytes += value.numel() * value.element_size()
            return value.detach()
        if isinstance(value, dict):
            return {self(key, depth): self(part, depth) for key, part in value.items()}
        if isinstance(value, argparse.Namespace):
            return argparse.Namespace(**self(vars(value), depth))
        for kind in (list, tuple, set):
            if isinstance(value, kind):
                return kind(self(part, depth) for part in value)
        raise ValueError(f"it holds a {truncate(type(value).__name__, 40)}, which is no plain value")


def _plain(path: Path, found: Any, size: int) -> dict[str, Any]:
    """A copy of the dict; UserError when it is none, holds what is not plain, or claims more bytes than there are."""
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise _refused(path, "it does not hold tensors by name")
    copy = _Plain()
    try:
        made: dict[str, Any] = copy(found)
    except (ValueError, TypeError) as error:  # TypeError: names that are no names, in a group
        raise _refused(path, str(error)[:80]) from None
    if copy.bytes > MOST_SHARED * size:
        raise _refused(path, f"its tensors claim {copy.bytes / 1e9:.3g} GB, the file has {size / 1e9:.3g} GB")
    return made
