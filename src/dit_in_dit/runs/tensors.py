"""Tensors in safetensors files: written one by one, read one by one or all together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit_in_dit.config.errors import UserError

DTYPES = {  # names of types in safetensors, in the order in which it writes tensors
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors in their order in a file: by type, then by name."""
    types, described = [*DTYPES], getattr(tensors, "data", tensors)  # of a sharded state: the tensors before a gather
    return sorted(described, key=lambda name: (types.index(described[name].dtype), name))


def serialize(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, a tensor at a time; equal to the output of `safetensors.torch.save`.

    `save` holds all tensors in memory twice. `save_file` returns no hash, and its errors have no errno.
    """
    names, described = file_order(tensors), getattr(tensors, "data", tensors)
    header, end = {}, 0
    for name in names:
        tensor, start = described[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    yield len(text).to_bytes(8, "little")
    yield text
    for name in names:
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of one file of a checkpoint, each read on demand: no process holds the whole file."""

    def __init__(self, path: Path) -> None:
        try:
            self.path, self._file = path, safe_open(path, "pt")
            self._names = tuple(self._file.keys())  # type: ignore[no-untyped-call]
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {path}: {error}") from None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)  # type: ignore[no-untyped-call]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file."""
    return dict(LazyTensors(path))


def check_weights(weights: Mapping[str, Tensor], what: str) -> None:
    """UserError when weights to be exported or imported are not finite."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{name[:80]} of {what} holds NaN or infinity: use an earlier checkpoint")
