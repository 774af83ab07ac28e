"""Sampling fitted to the device: precision, size of micro-batches, compilation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dit_in_dit.config.run import ModelConfig, RunConfig, SampleConfig
from dit_in_dit.inspection.trace import inspect
from dit_in_dit.model.compiled import compile_blocks
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runtime.device import resolve_sample_precision
from dit_in_dit.runtime.memory import device_memory
from dit_in_dit.sampling.guide import Guide

MOST_IMAGES = 256  # per forward pass: larger ones are not faster
COMPILE_FROM = 256  # samples; fewer are drawn in less time than compilation takes


def fit_to_device(
    model: NestedDiT,
    config: RunConfig,
    guide: Guide | None = None,
    *,
    num: int = 0,
    given: bool = False,
    compiled: bool | None = None,
) -> RunConfig:
    """The config with sample.precision and sample.micro_batch for the model's device, whose blocks are compiled if that
    is worth it: on CUDA, for COMPILE_FROM samples or more, unless the run has train.compile=false.

    Args:
        guide: weak model of autoguidance, which is in memory too and is compiled as the model is.
        num: number of samples.
        given: sample.micro_batch was chosen; false: its default becomes the number that fits, on CUDA.
        compiled: compile the model or not, in place of the rule.
    """
    device = next(model.parameters()).device
    config = resolve_sample_precision(config, device)
    if not given and config.sample.micro_batch == SampleConfig.micro_batch:
        models = [config.model] + ([guide.net.config] if guide else [])
        size = fitting_micro_batch(models, device_memory(device))
        config = replace(config, sample=replace(config.sample, micro_batch=size))
    worth = device.type == "cuda" and num >= COMPILE_FROM and config.train.compile is not False
    if worth if compiled is None else compiled:
        for net in [model] + ([guide.net] if guide else []):
            compile_blocks(net, fall_back=compiled is None)
    return config


def fitting_micro_batch(models: Sequence[ModelConfig], memory: float) -> int:
    """Images per forward pass in a device's `memory` (bytes): a power of two, at least the default.

    Guidance doubles the images. Half of the memory must hold what a training step of every model in float32 would keep
    of them, which is more than a forward pass needs at any time.
    """
    size = SampleConfig.micro_batch
    if memory:
        kept = 2 * sum(inspect(model)["activation_bytes"]["total"] for model in models)
        while 2 * size <= MOST_IMAGES and 2 * size * kept <= memory / 2:
            size *= 2
    return size
