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
from dit_in_dit.config.run import ModelConfig
from dit_in_dit.config.schema import keys
from dit_in_dit.inspection.hooks import forward_hooks
from dit_in_dit.model.nested import NestedDiT

Shape = tuple[int, ...]
COUNTS = ("macs", "rows", "width", "length")
BATCH = 2  # images in the forward pass; with one, an output that lacks this axis would broadcast


def check_plugin_parts(model: ModelConfig) -> None:
    """Check the user's own parts that a config names, if there are any, in a forward pass without memory.

    A part that reads numbers cannot run on PyTorch's device `meta`: then the pass runs on the CPU. An error that a part
    raises itself is left to the training, which shows its place.

    Raises:
        UserError: `macs`, `rows`, `width` or `length` of a part is not a whole number, or the part's output does not
            have the shape and type of its kind. Without this check, an output that broadcasts would silently train
            another model.
    """
    values = {f"model.{name}": value for name, _, value in keys(model)}
    named = {key: values[key] for key, kind in KEYS.items() if kind in PARTS}
    own = {key: name for key, name in named.items() if is_plugin(table(KEYS[key]).get(name))}
    for key, name in own.items():
        _check_counts(f"{key}={name}", table(KEYS[key])[name], model)
    if not own or (not model.blocks("inner") and "model.outer.norm" not in own):
        return
    import_module("torch._dynamo")  # PyTorch 2.6 cannot import it once a device is set, which a part may cause
    asked = {table(KEYS[key])[name]: (f"{key}={name}", KEYS[key]) for key, name in own.items()}
    for device in ("meta", "cpu"):
        try:
            with torch.random.fork_rng(devices=()), torch.device(device):
                network = NestedDiT(model)
                x, t = torch.zeros(BATCH, *model.image_shape), torch.zeros(BATCH)
                parts = [part for part in network.modules() if type(part) in asked]
                with forward_hooks((part, partial(_check_output, *asked[type(part)], model)) for part in parts):
                    network(x, t)
            return
        except UserError:
            raise
        except Exception:  # raised by the part itself
            continue


def _check_counts(what: str, part: Any, model: ModelConfig) -> None:
    """Check the numbers that a part states, each a static method of the config."""
    for name in COUNTS:
        if not hasattr(part, name):
            continue
        try:
            count = getattr(part, name)(model)
        except TypeError as error:
            raise UserError(
                f"{what}: {part.__name__}.{name} takes the model's config, as a staticmethod: {error}"
            ) from None
        if type(count) is not int or count < 0:
            raise UserError(f"{what}: {part.__name__}.{name} must give a whole number of at least 0: got {count!r}")


def _check_output(key: str, kind: str, model: ModelConfig, part: Any, given: tuple[Tensor, ...], out: Any) -> None:
    """Check shape and type of a part's output; for a condition, the number of rows too."""
    what = f"{key}: {type(part).__name__}"
    shape, first = tuple(out.shape) if isinstance(out, Tensor) else (), tuple(given[0].shape)
    tokens = (len(given[0]), model.patches)
    asked: dict[str, Callable[[], Shape]] = {
        "embed": lambda: (*tokens, model.sub_patches, model.inner.width),
        "aggregate": lambda: (*tokens, model.outer.width),
        "condition": lambda: _rows(shape, (*tokens, model.sub_patches, part.width(model))),
    }
    if shape != (wanted := asked.get(kind, lambda: first)()):
        got = list(shape) if isinstance(out, Tensor) else type(out).__name__
        raise UserError(f"{what} must give a tensor {list(wanted)}: got {got}")
    if out.dtype != given[0].dtype:
        raise UserError(f"{what} must keep the type of its input, {given[0].dtype}: got {out.dtype}")
    if kind == "condition" and (rows := shape[1] * shape[2]) != part.rows(model):
        raise UserError(f"{what}.rows must be the rows per image that it gives, {rows}: got {part.rows(model)}")


def _rows(shape: Shape, full: Shape) -> Shape:
    """Expected shape of a condition's rows: 1 or all patches, 1 or all sub-patches."""
    if len(shape) != len(full):
        return full
    return full[0], *(1 if shape[axis] == 1 else full[axis] for axis in (1, 2)), full[3]
