"""One meaning of float32 on every device."""

from __future__ import annotations

from typing import Any

import torch

FULL = "float32, no TF32"  # as a protocol names it
MIXED = "float32, convolutions in TF32 where the GPU has it"  # PyTorch's default


def use_full_float32() -> None:
    """Have this process compute float32 products and convolutions in float32.

    By default PyTorch rounds what goes into a GPU's convolutions to 10 bits (TF32) but not what goes into its matrix
    products: a model that has both, and every measure of it, would depend on the device.
    """
    backends: tuple[Any, ...] = (torch.backends, torch.backends.cudnn)
    for backend in backends:  # a precision set here would outlast the older switches
        if hasattr(backend, "fp32_precision"):  # since PyTorch 2.9
            backend.fp32_precision = "none"
    # The older switches on purpose: with the newer ones PyTorch refuses to read these, as its compiler does.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def before_it_was_named(version: str) -> str:
    """The precision of an evaluation whose protocol names none, made with PyTorch of this version."""
    return MIXED if "+cu" in version or "+rocm" in version else FULL
