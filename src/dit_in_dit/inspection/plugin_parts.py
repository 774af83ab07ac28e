"""Checks of users' own model parts: the numbers that they state, and what they give."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dit_in_dit.config.choices import KEYS, PARTS, is_plugin, table
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.model import ModelConfig
from dit_in_dit.config.schema import keys
from dit_in_dit.inspection.hooks import forward_hooks
from dit_in_dit.model.condition import CONDITIONS
from dit_in_dit.model.mixers import MIXERS
from dit_in_dit.model.nested import NestedDiT

Shape = tuple[int, ...]
COUNTS = ("macs", "row_macs", "rows", "width", "length")
BATCH = 2  # images in the forward pass; with one, an output that lacks this axis would broadcast


def check_plugin_parts(model: ModelConfig) -> None:
    """Check the user's own parts that a config names, if there are any, in a forward pass without memory.

    A part that reads numbers cannot run on PyTorch's device `meta`: then the pass runs on the CPU. An error that a part
    raises itself is left to the training, which shows its place.

    Raises:
        UserError: a number that a part states (`COUNTS`) is not a whole number, or the part's output does not have the
            shape and type of its kind: an output that broadcasts would silently train another model.
    """
    values = {f"model.{name}": value for name, _, value in keys(model)}
    named = {key: values[key] for key, kind in KEYS.items() if kind in PARTS}
    own = {key: part for key, name in named.items() if is_plugin(part := table(KEYS[key]).get(name))}
    for key, part in own.items():
        _check_counts(f"{key}={named[key]}", key, part, model)
    if not own or (not model.blocks("inner") and all(".inner." in key for key in own)):
        return
    import_module("torch._dynamo")  # PyTorch 2.6 cannot import it once a device is set, which a part may cause
    for device in ("meta", "cpu"):
        try:
            with torch.random.fork_rng(devices=()), torch.device(device):
                network = NestedDiT(model)
                x, t = torch.zeros(BATCH, *model.image_shape), torch.zeros(BATCH)
                hooks = []
                for place, part in network.named_modules():
                    if found := [key for key in own if type(part) is own[key]]:  # at both levels: that of the part
                        key = max(found, key=lambda key: f".{place[:5]}." in key)
                        hooks.append((part, partial(_check_output, f"{key}={named[key]}", key, model)))
                with forward_hooks(hooks):
                    network(x, t)
            return
        except UserError:
            raise
        except Exception:  # raised by the part itself
            continue


def _check_counts(what: str, key: str, part: Any, model: ModelConfig) -> None:
    """Check the numbers that a part states, each a static method of the config, or of sizes."""
    kind, level = KEYS[key], model.inner if ".inner." in key else model.outer
    wide, hidden = level.width, int(level.width * level.mlp_ratio)
    sizes: dict[str, dict[str, Any]] = {
        "mlp": {"macs": (wide, hidden), "row_macs": (wide, hidden, wide)},
        "modulation": {"macs": (wide, wide, 2, 1)},
    }
    arguments_of = {"mlp": "width and hidden width", "modulation": "condition, width, branches and places"}
    missing = (TypeError, AttributeError) if kind == "modulation" else TypeError  # of `per_branch`
    for name, arguments in sizes.get(kind, dict.fromkeys(COUNTS, (model,))).items():
        if not hasattr(part, name):
            continue
        try:
            count = getattr(part, name)(*arguments)
        except missing as error:
            takes = arguments_of.get(kind, "the model's config")
            raise UserError(f"{what}: {part.__name__}.{name} takes {takes}, as a staticmethod: {error}") from None
        if type(count) is not int or count < 0:
            raise UserError(f"{what}: {part.__name__}.{name} must give a whole number of at least 0: got {count!r}")


def _check_output(named: str, key: str, model: ModelConfig, part: Any, given: tuple[Any, ...], out: Any) -> None:
    """Check shape and type of a part's output; for a condition, the number of rows too."""
    what, kind = f"{named}: {type(part).__name__}", KEYS[key]
    level = model.inner if ".inner." in key else model.outer
    shape, first = tuple(out.shape) if isinstance(out, Tensor) else (), tuple(given[0].shape)
    tokens = (len(given[0]), model.patches)
    asked: dict[str, Callable[[], Shape]] = {
        "embed": lambda: (*tokens, model.sub_patches, model.inner.width),
        "aggregate": lambda: (*tokens, model.outer.width),
        "condition": lambda: _rows(shape, (*tokens, model.sub_patches, part.width(model))),
        "time_embed": lambda: (len(given[0]), model.outer.width),
        "modulation": lambda: (*first[:-2], model.sub_patches if per_place else first[-2], level.width),
    }
    per_place = level is model.inner and CONDITIONS[model.inner.condition].per_block
    branches = 2 if level is model.outer or MIXERS[model.inner.mixer] else 1
    count = {"rope": 2, "modulation": branches * getattr(part, "per_branch", 0)}.get(kind)
    wanted = asked[kind]() if kind in asked else first
    if count is not None and not (isinstance(out, tuple) and len(out) == count):
        raise UserError(f"{what} must give {count} tensors {list(wanted)}: got {type(out).__name__} of {len(out)}")
    for tensor in (out,) if count is None else out:
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != wanted:
            got = str(list(tensor.shape)) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(f"{what} must give a tensor {list(wanted)}: got {got}")
        if tensor.dtype != given[0].dtype:
            raise UserError(f"{what} must keep the type of its input, {given[0].dtype}: got {tensor.dtype}")
    if kind == "condition" and (rows := shape[1] * shape[2]) != part.rows(model):
        raise UserError(f"{what}.rows must be the rows per image that it gives, {rows}: got {part.rows(model)}")


def _rows(shape: Shape, full: Shape) -> Shape:
    """Expected shape of a condition's rows: 1 or all patches, 1 or all sub-patches."""
    if len(shape) != len(full):
        return full
    return full[0], *(1 if shape[axis] == 1 else full[axis] for axis in (1, 2)), full[3]
