"""Cost of a model in closed form: MACs (one multiply-accumulate is 2 FLOPs) and parameters.

MACs count the matrix products, convolutions and attention of one forward pass for one image. Sums, norms and
activations do not count, as in every published "Gflops" of a DiT (which are MACs).

>>> dd.cost.macs(dd.presets.get("dit-xl2").model)["total"]
118616702976
"""

from __future__ import annotations

from itertools import pairwise

import torch

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import ModelConfig
from dit_in_dit.model.aggregate import AGGREGATORS, FUSIONS, SPREADS
from dit_in_dit.model.condition import CONDITIONS, TimeEmbed
from dit_in_dit.model.embed import EMBEDS, OuterEmbed
from dit_in_dit.model.mixers import MIXERS
from dit_in_dit.model.nested import NestedDiT, part_of
from dit_in_dit.runtime.memory import installed_memory

FORWARDS_PER_STEP = 3  # MACs of a training step over those of a forward pass: the backward pass costs two


def macs(model: ModelConfig) -> dict[str, int]:
    """MACs per image of each part of the model, and their `total`.

    A block of width D on L tokens that attend to M tokens each costs L (4 D^2 + 2 M D) for attention, 2 L D H for an
    MLP of hidden width H, and 6 D K for adaLN on each conditioning row of width K.
    """
    outer, inner = model.outer, model.inner
    tokens, inner_tokens = model.patches, model.patches * model.sub_patches
    levels = [level for level, _ in model.program]
    pairs = list(pairwise(levels))

    mlp = 2 * outer.width * int(outer.width * outer.mlp_ratio)
    attention = 4 * outer.width**2 + 2 * tokens * outer.width
    outer_block = tokens * (attention + mlp) + 6 * outer.width**2

    mixer, condition = MIXERS[inner.mixer], CONDITIONS[inner.condition]
    mix = mixer.macs(model) if mixer else 0
    inner_mlp = 2 * inner.width * int(inner.width * inner.mlp_ratio)
    modulation = (6 if mixer else 3) * inner.width * condition.width(model)
    inner_block = inner_tokens * (mix + inner_mlp) + condition.rows(model) * modulation

    ends_inner = levels[-1] == "inner"
    outer_head = tokens * outer.width * model.patch_size**2 * model.out_channels + 2 * outer.width**2
    inner_head = inner_tokens * inner.width * inner.sub_patch**2 * model.out_channels + 2 * inner.width * outer.width
    parts = {
        "outer_embed": OuterEmbed.macs(model) if model.reads_patches else 0,
        "inner_embed": EMBEDS[inner.embed].macs(model) if "inner" in levels else 0,
        "time_embed": TimeEmbed.macs(model),
        "outer_blocks": model.blocks("outer") * outer_block,
        "inner_blocks": model.blocks("inner") * inner_block,
        "condition": levels.count("inner") * condition.macs(model),
        "aggregate": pairs.count(("inner", "outer")) * AGGREGATORS[inner.aggregate].macs(model),
        "spread": pairs.count(("outer", "inner")) * SPREADS[inner.spread].macs(model),
        "outer_head": 0 if ends_inner and not FUSIONS[inner.fuse].keeps_outer else outer_head,
        "inner_head": inner_head if ends_inner else 0,
    }
    if model.split:
        parts["split"] = 2 * model.split[0] * model.patches * model.channels * model.patch_size**2
    return {**parts, "total": sum(parts.values())}


def training_macs(model: ModelConfig) -> dict[str, int]:
    """MACs of a training step per image, for the same parts as `macs`, and their `total`."""
    return {part: FORWARDS_PER_STEP * number for part, number in macs(model).items()}


def parameters(model: ModelConfig) -> dict[str, int]:
    """Numbers of trainable parameters of each part, and their `total`; the model is built without memory."""
    with torch.device("meta"):
        module = NestedDiT(model)
    parts: dict[str, int] = {}
    for name, parameter in module.named_parameters():
        parts[part_of(name)] = parts.get(part_of(name), 0) + parameter.numel()
    return {**parts, "total": sum(parts.values())}


def held_bytes(model: ModelConfig) -> int:
    """Bytes of the model's parameters and buffers; the model is built without memory."""
    with torch.device("meta"):
        module = NestedDiT(model)
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def check_fits(model: ModelConfig, device: torch.device, moments: int = 2) -> None:
    """Check that this machine can hold the model in training. A process that is too large would be killed silently.

    Args:
        moments: number of tensors that the optimizer keeps for each weight tensor.

    Raises:
        UserError: the weights, their average and the moments do not fit into memory.
    """
    copies = 2 + moments if device.type == "cpu" else 1  # the weights, their average and the moments
    needed, installed = copies * held_bytes(model), installed_memory()
    if needed > installed:
        raise UserError(
            f"the weights in training must fit into {installed / 1e9:,.0f} GB of memory: "
            f"got {needed / 1e9:,.0f} GB; make the model smaller (model.outer.width, the blocks, model.image_size)"
        )
