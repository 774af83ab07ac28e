"""The device of a run, and what depends on it: precision and compilation."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Literal

import torch

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig
from dit_in_dit.runtime.precision import use_full_float32
from dit_in_dit.runtime.process import local_rank


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The named or best device, under torchrun the GPU of this process. UserError if the device is missing."""
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    available = [kind for kind, count in counts.items() if count]
    kind, _, number = (available[0] if name == "auto" else str(name)).partition(":")
    if kind == "cuda" and not number:
        number = local_rank()
    if kind not in available or (
        number and not (number.isascii() and number.isdecimal() and int(number) < counts[kind])
    ):
        raise UserError(f"device {str(name)!r} is not available here: choose from {', '.join(available)}")
    if kind == "cuda":  # tensors on plain "cuda" go to the current GPU: make it this one
        number = number or str(torch.cuda.current_device())
        torch.cuda.set_device(int(number))
    use_full_float32()  # here, because every computation picks its device first
    return torch.device(f"{kind}:{number}" if number else kind)


def bfloat16_is_native(device: torch.device) -> bool:
    """Whether the device computes products in bfloat16. Without it a CPU takes several times as long as in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_auto(config: RunConfig, device: torch.device) -> RunConfig:
    """The config with train.precision=auto and train.compile=auto replaced by their values for this device. UserError
    for train.compile=graphs on a device that is not CUDA."""
    train = config.train
    if train.compile == "graphs" and device.type != "cuda":
        raise UserError(f"train.compile=graphs needs CUDA: got device {device}; set train.compile=auto")
    if train.precision == "auto":
        precision: Literal["bfloat16", "float32"] = "bfloat16" if bfloat16_is_native(device) else "float32"
        train = replace(train, precision=precision)
    if train.compile == "auto":  # PyTorch compiles for CUDA by Triton
        train = replace(train, compile=device.type == "cuda" and find_spec("triton") is not None)
    return config if train is config.train else replace(config, train=train)


def resolve_sample_precision(config: RunConfig, device: torch.device) -> RunConfig:
    """The config with sample.precision=auto replaced: train.precision on CUDA, float32 on other devices."""
    if config.sample.precision != "auto":
        return config
    run = resolve_auto(config, device).train.precision if device.type == "cuda" else "float32"
    return replace(config, sample=replace(config.sample, precision=run))
