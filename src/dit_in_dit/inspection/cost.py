"""Cost of a model in closed form: MACs (one multiply-accumulate is 2 FLOPs) and parameters.

MACs count the matrix products, convolutions and attention of one forward pass for one image. Sums, norms and
activations do not count, as in every published "Gflops" of a DiT (which are MACs).

>>> dd.cost.macs(dd.presets.get("dit-xl2").model)["total"]
118616702976
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.model import ModelConfig, OuterConfig
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.token_drop import TokenDrop
from dit_in_dit.model.aggregate import AGGREGATORS, SPREADS
from dit_in_dit.model.condition import CONDITIONS, TIME_EMBEDS
from dit_in_dit.model.embed import InnerEmbed, OuterEmbed
from dit_in_dit.model.mixers import MIXERS
from dit_in_dit.model.mlps import MLPS
from dit_in_dit.model.modulation import MODULATIONS
from dit_in_dit.model.nested import NestedDiT, part_of, shares_modulation
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
    mixer, condition = MIXERS[inner.mixer], CONDITIONS[inner.condition]
    rows, row = condition.rows(model), condition.width(model)

    inner_count = inner_tokens + model.carries_tokens * model.tokens.count
    places = model.sub_patches if condition.per_block else 1
    inner_block = _block(inner, inner_count, rows, row, branches=1 + bool(mixer), places=places)
    inner_block += mixer.image_macs(model) if mixer else 0

    outer_head = tokens * outer.width * model.patch_size**2 * model.out_channels + _head(outer, 1, outer.width)
    rows, row = (rows, row) if inner.head_condition == "rows" else (1, outer.width)
    inner_head = inner_tokens * inner.width * inner.sub_patch**2 * model.out_channels + _head(inner, rows, row)
    parts = {
        "outer_embed": OuterEmbed.macs(model) if model.reads_patches else 0,
        "inner_embed": InnerEmbed.macs(model) if "inner" in levels else 0,
        "time_embed": TIME_EMBEDS[model.time_embed].macs(model),
        "outer_blocks": sum(_outer_block(model, number) for number in range(model.blocks("outer"))),
        "inner_blocks": model.blocks("inner") * inner_block,
        "condition": model.row_stages * condition.macs(model),
        **({"shared_modulation": 6 * outer.width**2} if shares_modulation(model) else {}),
        "aggregate": pairs.count(("inner", "outer")) * AGGREGATORS[inner.aggregate].macs(model),
        "spread": pairs.count(("outer", "inner")) * SPREADS[inner.spread].macs(model),
        "outer_head": outer_head if "outer" in model.heads else 0,
        "inner_head": inner_head if "inner" in model.heads else 0,
    }
    if model.internal_head:
        parts["internal_head"] = outer_head
    if model.augment_labels:
        parts["augment_embed"] = model.augment_labels * model.outer.width  # in training
    if model.split:
        parts["split"] = 2 * model.split[0] * model.patches * model.channels * model.patch_size**2
    return {**parts, "total": sum(parts.values())}


def _outer_block(model: ModelConfig, number: int, drop: TokenDrop | None = None) -> int:
    """MACs per image of outer block `number`, with the tokens of time and class once they have joined."""
    joined = model.tokens.count if number >= model.tokens.start else 0
    patches = drop.kept if drop is not None and number in drop else model.patches
    tokens, width = patches + joined, model.outer.width
    attention = tokens * (4 * width**2 + 2 * tokens * width)
    return attention + _block(model.outer, tokens, 1, width, branches=2)


def _block(level: OuterConfig, tokens: int, rows: int, row: int, *, branches: int, places: int = 1) -> int:
    """MACs of the MLP on `tokens` tokens, and of the modulation by `rows` conditioning rows of width `row`."""
    mlp, hidden = MLPS[level.mlp], int(level.width * level.mlp_ratio)
    modulation = MODULATIONS[level.modulation].macs(row, level.width, branches, places)
    return tokens * mlp.macs(level.width, hidden) + rows * (mlp.row_macs(level.width, hidden, row) + modulation)


def _head(level: OuterConfig, rows: int, row: int) -> int:
    """MACs of a head's modulation."""
    return 0 if level.head_condition == "none" or level.modulation == "shared" else 2 * level.width * row * rows


def stage_macs(model: ModelConfig) -> list[int]:
    """MACs per image of the blocks of each stage of the program, in order."""
    inner, stages, number = macs(model)["inner_blocks"], list[int](), 0
    for level, count in model.program:
        if level == "inner":
            stages.append(inner * count // model.blocks("inner"))
        else:
            stages.append(sum(_outer_block(model, number + each) for each in range(count)))
            number += count
    return stages


def macs_through(model: ModelConfig, number: int) -> int:
    """MACs per image of a forward pass that ends after outer block `number`."""
    parts, left, previous = macs(model), number + 1, ""
    ends = ("outer_blocks", "inner_blocks", "condition", "aggregate", "spread", "outer_head", "inner_head", "total")
    total = sum(value for part, value in parts.items() if part not in ends)
    pairs = list(pairwise(str(level) for level, _ in model.program))
    for place, (level, count) in enumerate(model.program):
        if joins := {("inner", "outer"): "aggregate", ("outer", "inner"): "spread"}.get((previous, level)):
            total += parts[joins] // pairs.count((previous, level))
        if level == "inner":
            total += parts["inner_blocks"] * count // model.blocks("inner")
            later = [level for level, _ in model.program[place:]].count("inner")
            total += parts["condition"] // model.row_stages if later <= model.row_stages else 0
        else:
            taken = min(left, count)
            total += sum(_outer_block(model, number + 1 - left + each) for each in range(taken))
            left -= taken
        if not left:
            break
        previous = level
    return total


def training_macs(model: ModelConfig, drop: TokenDrop | None = None) -> dict[str, int]:
    """MACs of a training step per image, for the same parts as `macs`, and their `total`; with `drop`, of a step in
    which patches bypass outer blocks."""
    parts = macs(model)
    blocks = sum(_outer_block(model, number, drop) for number in range(model.blocks("outer")))
    parts |= {"outer_blocks": blocks, "total": parts["total"] - parts["outer_blocks"] + blocks}
    return {part: FORWARDS_PER_STEP * number for part, number in parts.items()}


def run_macs(config: RunConfig, steps: Any) -> Any:
    """MACs of the first `steps` steps of a run, without recomputed activations; steps is a number or an array."""
    sparse, dense, until = _per_step(config)
    return sparse * np.minimum(steps, until) + dense * np.maximum(steps - until, 0)


def steps_within(config: RunConfig, budget: float) -> float:
    """The number of steps whose `run_macs` are `budget`."""
    sparse, dense, until = _per_step(config)
    return min(budget / sparse, until) + max(budget - sparse * until, 0) / dense


def _per_step(config: RunConfig) -> tuple[float, float, float]:
    """MACs of a step at first and later, and the number of the first steps; infinite if all steps are equal."""
    sparse, dense = (
        float(training_macs(config.model, drop)["total"] * config.global_batch) for drop in (config.token_drop, None)
    )
    until = config.train.token_drop_steps
    return sparse, dense, math.inf if until is None else until


def parameters(model: ModelConfig) -> dict[str, int]:
    """Numbers of trainable parameters of each part, and their `total`; the model is built without memory."""
    with torch.device("meta"):
        module = NestedDiT(model)
    parts: dict[str, int] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parts[part_of(name)] = parts.get(part_of(name), 0) + parameter.numel()
    return {**parts, "total": sum(parts.values())}


def held_bytes(model: ModelConfig) -> int:
    """Bytes of the model's parameters and buffers; the model is built without memory."""
    with torch.device("meta"):
        module = NestedDiT(model)
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def check_fits(model: ModelConfig, device: torch.device, moments: float = 2, averages: int = 1) -> None:
    """Check that this machine can hold the weights in training, their `averages`, and `moments` optimizer tensors for
    each weight tensor; a process that is too large would be killed silently. Raises UserError."""
    copies = 1 + averages + moments if device.type == "cpu" else 1  # the weights, their averages and the moments
    needed, installed = copies * held_bytes(model), installed_memory()
    if needed > installed:
        raise UserError(
            f"the weights in training must fit into {installed / 1e9:,.0f} GB of memory: "
            f"got {needed / 1e9:,.0f} GB; make the model smaller (model.outer.width, the blocks, model.image_size)"
        )
