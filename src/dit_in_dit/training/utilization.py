"""MFU and peak memory of a run in training."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dit_in_dit.config.run import RunConfig
from dit_in_dit.inspection.cost import training_macs
from dit_in_dit.inspection.gpus import peak_flops
from dit_in_dit.runtime.memory import peak_memory


class Utilization:
    """Share of the device's peak that a run uses (MFU), and its peak memory.

    MFU as in PaLM (Chowdhery et al. 2022, appendix B): FLOPs per second of the forward and backward pass, without
    recomputation, over the peak of dense bfloat16 products of all the run's devices. It is unknown for devices that are
    not in `inspection.gpus`, in float32, for a model given to train(), and with train.token_drop_steps.
    """

    def __init__(self, config: RunConfig, device: torch.device, processes: int, objects: Mapping[str, str]) -> None:
        self.config, self.device, self.rate = config, device, 0.0  # rate: images per second at the peak
        known = device.type == "cuda" and config.train.precision == "bfloat16" and "model" not in objects
        known = known and config.token_drop == config.lasting_token_drop
        if peak := peak_flops(torch.cuda.get_device_name(device)) if known else None:
            self.rate = processes * peak / (2 * training_macs(config.model, config.token_drop)["total"])

    def read(self, images_per_second: float) -> dict[str, float]:
        """`mfu` (0 to 1) and `memory` (bytes), each if it is known. The device is not waited for."""
        memory = peak_memory(self.device)
        return {
            **({"mfu": images_per_second / self.rate} if self.rate else {}),
            **({"memory": memory} if memory is not None else {}),
        }
