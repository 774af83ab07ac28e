"""Reading of weights from untrusted files without running their code.

A `.pt` file is a pickle: a program. It is read with torch's restricted unpickler, which accepts tensors, plain values
and, here, `argparse.Namespace` (the arguments in a checkpoint of the official DiT), and refuses all else. The result is
then checked: the shape of a plain tensor can still claim more memory than the file has.
"""

from __future__ import annotations

import argparse
import re
import stat
import warnings
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dit_in_dit.config.errors import UserError, truncate

PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)  # bool is an int
DEEPEST = 20  # levels of nesting; an optimizer's state has five
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # DDP, compile, FSDP
# Prefixes of a model inside another module, such as Lightning's or JiT's.
MODELS = ("model.", "ema.", "ema_model.", "net.", "denoiser.", "ema_denoiser.")
MOST_SHARED = 4  # bytes of all tensors divided by bytes of the file; tied weights share memory


def read_pt(path: Path) -> dict[str, Any]:
    """The nested dict of tensors and plain values in a file of `torch.save`; no code of the file is run.

    Tensors are on the CPU. Tensors of a zip file (torch 1.6 and newer) are memory-mapped and read on demand. A file in
    the older format is read whole. A `.safetensors` file is read by `read_safetensors`.

    Raises:
        UserError: the file cannot be read, is damaged, holds something else, or would run code; one line of at most 200
            characters.
    """
    if path.suffix == ".safetensors":
        return dict(read_safetensors(path))
    size = _size(path)
    packed = _check_zip(path, size)
    try:
        # Damaged files cause warnings; their errors are reported below.
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=packed)
    except Exception as error:  # on damaged bytes torch raises anything from AssertionError to struct.error
        raise _refused(path, _reason(error)) from None
    return _plain(path, content, size)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, by name. Raises UserError as `read_pt` does."""
    _size(path)
    try:
        return load_file(path)
    except Exception as error:  # SafetensorError, or Python's errors on odd headers
        known = isinstance(error, SafetensorError | OSError)
        raise _refused(path, str(error).splitlines()[0][:60] if known and str(error) else "it is damaged") from None


def strip_wrappers(weights: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Weights by the model's own names, without the prefixes of wrappers around the model or its blocks.

    Raises:
        UserError: two weights would have the same name.
    """
    bare_weights: dict[str, Any] = {}
    for name, value in weights.items():
        bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if bare in bare_weights:
            raise UserError(
                f"{what} has two weights {truncate(bare, 60)!r}, with and without a wrapper: keep one of them"
            )
        if name != "n_averaged":  # the counter of torch's AveragedModel
            bare_weights[bare] = value
    while prefix := next(
        (p for p in MODELS if bare_weights and all(name.startswith(p) for name in bare_weights)), None
    ):
        bare_weights = {name.removeprefix(prefix): value for name, value in bare_weights.items()}
    return bare_weights


def _refused(path: Path, reason: str) -> UserError:
    return UserError(f"cannot read {truncate(str(path), 60)}: {reason}; get it again, or as .safetensors")


def _size(path: Path) -> int:
    """Size in bytes of a readable regular file (opening a pipe would wait forever); UserError for any other."""
    try:
        status = path.stat()
        regular = stat.S_ISREG(status.st_mode)
        if regular:
            path.open("rb").close()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _refused(path, (getattr(error, "strerror", None) or str(error))[:60]) from None
    if not regular:
        raise _refused(path, "it is not a file")
    if not status.st_size:
        raise _refused(path, "it is empty")
    return status.st_size


def _check_zip(path: Path, size: int) -> bool:
    """Whether the file is a zip. UserError unless the zip is the only archive in the file, and its members are as
    `torch.save` writes them: uncompressed and without overlap."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # torch tells the two formats apart by this
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            members, comment = archive.infolist(), archive.comment
    except Exception:  # zipfile raises nearly as many kinds as torch
        raise _refused(path, "its zip directory is damaged") from None
    compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if compressed or comment or sum(member.file_size for member in members) > size:
        raise _refused(path, "its members are not stored as torch.save stores them (a zip bomb?)")
    return True


def _reason(error: Exception) -> str:
    """The reason for an error of torch, in a few words."""
    message = str(error)
    named = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", message)
    if named:
        return f"it holds {truncate(named[1], 40)}, which could run code"
    if "TorchScript" in message:
        return "it is a TorchScript program, not weights"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:60]
    return "it is damaged, or holds more than tensors and plain values"


def _copy(value: Any, copies: dict[int, Any], depth: int = 0) -> Any:
    """Copy of plain values from an unpickled object: new containers, and tensors that share the memory but no hooks,
    attributes or gradients; ValueError for anything else. `copies` has them by id: a shared object is copied once."""
    if isinstance(value, PLAIN):
        return value
    if depth > DEEPEST:
        raise ValueError(f"it nests more than {DEEPEST} levels")
    if id(value) in copies:
        return copies[id(value)]
    copied: Any
    inside = partial(_copy, copies=copies, depth=depth + 1)
    if isinstance(value, Tensor):
        ordinary = type(value) in (Tensor, torch.nn.Parameter) and not value.is_quantized
        if not ordinary or value.layout != torch.strided or value.device.type != "cpu":
            raise ValueError(f"it holds a {truncate(type(value).__name__, 40)} that is no ordinary tensor")
        copied = value.detach()
    elif isinstance(value, dict):
        copied = {inside(key): inside(part) for key, part in value.items()}
    elif isinstance(value, argparse.Namespace):
        copied = argparse.Namespace(**inside(vars(value)))
    elif kind := next((kind for kind in (list, tuple, set) if isinstance(value, kind)), None):
        copied = kind(map(inside, value))
    else:
        raise ValueError(f"it holds a {truncate(type(value).__name__, 40)}, which is no plain value")
    return copies.setdefault(id(value), copied)


def _plain(path: Path, content: Any, size: int) -> dict[str, Any]:
    """A copy of a dict; UserError when it is no dict, holds anything but plain values, or claims too many bytes."""
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise _refused(path, "it does not hold tensors by name")
    copies: dict[int, Any] = {}
    try:
        copied = _copy(content, copies)
    except (ValueError, TypeError) as error:  # TypeError: an unhashable key in a nested dict
        raise _refused(path, str(error)[:80]) from None
    claimed = sum(copy.nbytes for copy in copies.values() if isinstance(copy, Tensor))
    if claimed > MOST_SHARED * size:
        raise _refused(path, f"its tensors claim {claimed / 1e9:.3g} GB, but the file has {size / 1e9:.3g} GB")
    return copied
