"""`recipe`: the command that trains a preset on GPUs, and estimates of its memory and time."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from dit_in_dit.cli.options import Commands, number_where, whole_number
from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import override
from dit_in_dit.config.small_recipe import small_recipe_yaml

USUAL = (1, 8, 64)  # GPUs
GPU = "h100"
FEW = 8  # with fewer images in a forward pass, a GPU probably waits for its host


def add(commands: Commands) -> None:
    """Add the command."""
    recipe = commands.add(
        "recipe",
        _recipe,
        "print the command that trains a preset on GPUs, with estimated memory and time; without a preset, a whole "
        "recipe for a few thousand images on one GPU, as YAML",
    )
    recipe.add_argument("preset", nargs="?", help="see `dit-in-dit presets`")
    recipe.add_argument(
        "--gpus",
        type=whole_number,
        action="append",
        metavar="N",
        help="number of GPUs; repeatable (default: 1, 8 and 64, if they divide the batch)",
    )
    recipe.add_argument("--gpu", default=GPU, help="a100, h100 (default), h200, b200, l40s, rtx4090")
    share = number_where(lambda share: 0 < share <= 1, "above 0 and at most 1")
    recipe.add_argument("--mfu", type=share, metavar="SHARE", help="share of the GPU's peak that a step reaches")
    recipe.add_argument("--per-node", type=whole_number, default=8, metavar="N", help="GPUs in a machine (default 8)")
    recipe.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; repeatable")
    recipe.add_argument("--json", action="store_true", help="print JSON")


def _recipe(options: argparse.Namespace) -> None:
    if options.preset is None:
        if options.set or options.gpus or options.json or options.mfu or options.gpu != GPU:
            raise UserError("recipe without a preset takes no options: name a preset, or edit the printed YAML")
        print(small_recipe_yaml(), end="")
        return
    from dit_in_dit.inspection.gpus import GPUS
    from dit_in_dit.inspection.launch_plan import MFU, recipe

    config = override(presets.get(options.preset), options.set)
    if config.train.epochs is not None:
        raise UserError("recipe does not read the data: set train.steps instead of train.epochs")
    mfu = options.mfu or MFU
    usual = [gpus for gpus in USUAL if config.global_batch % gpus == 0]
    how = {"gpu": options.gpu, "mfu": mfu, "per_node": options.per_node, "settings": options.set}
    recipes = [recipe(options.preset, config, gpus, **how) for gpus in options.gpus or usual]
    if options.json:
        print(json.dumps({"gpu": options.gpu, "mfu": mfu, "recipes": [asdict(one) for one in recipes]}, indent=1))
        return
    capacity, peak = GPUS[options.gpu]
    assumed = "" if options.mfu else " (an assumption)"
    print(f"{options.preset}: {config.train.steps:,} steps of {config.global_batch} examples")
    print(f"on {options.gpu}: {capacity} GB, {peak} TFLOPS in bfloat16, of which a step reaches {mfu:g}{assumed}.")
    print("Estimated from counts; nothing of this was measured on a GPU.")
    for one in recipes:
        again = "" if one.recompute == "none" else f", recompute {one.recompute}"
        print(f"\n{one.gpus} GPU{'s' if one.gpus > 1 else ''}")
        print(f"  each {one.rows} images x {one.accumulate} passes{again}: at most {one.memory / 1e9:.0f} GB")
        print(f"  {one.step:.3g} s a step, {one.images:,.0f} images/s, {one.hours:,.1f} hours")
        if one.rows < FEW:
            print(f"  {one.rows} images are few for a GPU: expect less of its peak")
        if one.gpus > options.per_node:
            where = f"a sharded copy for {one.shard} GPUs; " if one.shard else ""
            sent = f"{one.inside / 1e9:.2g} GB over NVLink, {one.outside / 1e9:.2g} GB over the network"
            print(f"  {where}a step sends {sent}")
        print(f"  {one.command}")
        if one.gpus > options.per_node:
            print(f"  {one.sky}")
