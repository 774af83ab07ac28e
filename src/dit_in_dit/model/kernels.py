"""Which of the project's own kernels run on which device. Only a measurement on a device turns them on."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Kernels(NamedTuple):
    """Choices that differ between devices; the defaults are PyTorch's kernels."""

    fused: bool = False  # norm with modulation, and gate with residual, as one function each (`model.fused`)
    tiny_up_to: int = 0  # longest groups of tokens whose attention the Triton kernel computes (`model.tiny`)


PYTORCH = Kernels()
# By the name of a GPU as CUDA reports it, else by device type. Empty: nothing has been measured on any GPU yet.
KERNELS: dict[str, Kernels] = {}


def kernels_of(device: torch.device) -> Kernels:
    """The kernels for a device."""
    if not KERNELS:
        return PYTORCH
    name = torch.cuda.get_device_properties(device).name if device.type == "cuda" else device.type
    return KERNELS.get(name, PYTORCH)
