"""One meaning of float32 on every device."""

from __future__ import annotations

from typing import Any

import torch

FULL = "float32, no TF32"  # in a protocol
MIXED = "float32, convolutions in TF32 where the GPU has it"  # PyTorch's default


def use_full_float32() -> None:
    """Make this process compute float32 products and convolutions in float32.

    By default PyTorch rounds the inputs of a GPU's convolutions to 10 mantissa bits (TF32), but not the inputs of
    matrix products: the outputs of a model with both would depend on the device.
    """
    backends: tuple[Any, ...] = (torch.backends, torch.backends.cudnn)
    for backend in backends:  # a precision set here overrides the older switches
        if hasattr(backend, "fp32_precision"):  # since PyTorch 2.9
            backend.fp32_precision = "none"
    # The older switches: once the newer ones are set, PyTorch refuses to read these, which its compiler does.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def precision_of_version(version: str) -> str:
    """The precision of evaluations with this version of PyTorch, for protocols that name no precision."""
    return MIXED if "+cu" in version or "+rocm" in version else FULL
