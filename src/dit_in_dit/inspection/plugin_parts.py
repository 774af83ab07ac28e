"""Checks of users' own model parts: the MACs and the output shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_in_dit.config.choices import KEYS, PACKAGE, PARTS, table
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import ModelConfig
from dit_in_dit.config.schema import keys
from dit_in_dit.inspection.hooks import forward_hooks
from dit_in_dit.model.nested import NestedDiT

Shape = tuple[int, ...]
BATCH = 2  # of the forward pass: a part that drops this axis would broadcast with one image


def check_plugin_parts(model: ModelConfig) -> None:
    """Check the user's own parts that a config names, if there are any, in a forward pass without memory.

    A part that cannot run on PyTorch's device `meta`, because its forward pass reads numbers, is not checked.

    Raises:
        UserError: `macs` of a part is not a whole number, or the part's output does not have the shape of its kind.
            Without this check, an output that broadcasts would silently train another model.
    """
    values = {f"model.{name}": value for name, _, value in keys(model)}
    named = {key: values[key] for key, kind in KEYS.items() if kind in PARTS}
    own = {key: name for key, name in named.items() if is_plugin(table(KEYS[key])[name])}
    for key, name in own.items():
        _check_macs(key, name, table(KEYS[key])[name], model)
    if not own or (not model.blocks("inner") and "model.outer.norm" not in own):
        return
    with torch.device("meta"):
        network = NestedDiT(model)
        x, t = torch.zeros(BATCH, *model.image_shape), torch.zeros(BATCH)
    asked = {table(KEYS[key])[name]: (f"{key}={name}", KEYS[key]) for key, name in own.items()}
    hooks = [(part, partial(_check_shape, *asked[type(part)], model)) for part in _parts(network, tuple(asked))]
    with forward_hooks(hooks), torch.no_grad():
        try:
            network(x, t)
        except (NotImplementedError, RuntimeError):  # its own error comes when it trains, with the place
            return


def is_plugin(part: Any) -> bool:
    """Whether a class in a table is a user's own."""
    return part is not None and part.__module__.split(".")[0] != PACKAGE


def _parts(network: NestedDiT, classes: tuple[type, ...]) -> Iterator[nn.Module]:
    return (module for module in network.modules() if type(module) in classes)


def _check_macs(key: str, name: str, part: Any, model: ModelConfig) -> None:
    if not hasattr(part, "macs"):
        return
    try:
        macs = part.macs(model)
    except TypeError as error:
        raise UserError(
            f"{key}={name}: {part.__name__}.macs takes the model's config, as a staticmethod: {error}"
        ) from None
    if type(macs) is not int or macs < 0:
        raise UserError(f"{key}={name}: {part.__name__}.macs must give a whole number of at least 0: got {macs!r}")


def _check_shape(key: str, kind: str, model: ModelConfig, part: nn.Module, given: tuple[Tensor, ...], out: Any) -> None:
    shape, first = tuple(out.shape) if isinstance(out, Tensor) else (), tuple(given[0].shape)
    tokens = (len(given[0]), model.patches)
    asked: dict[str, Callable[[], Shape]] = {
        "embed": lambda: (*tokens, model.sub_patches, model.inner.width),
        "aggregate": lambda: (*tokens, model.outer.width),
        "condition": lambda: _rows(shape, (*tokens, model.sub_patches, part.width(model))),  # type: ignore[operator]
    }
    if shape != (wanted := asked.get(kind, lambda: first)()):
        got = list(shape) if isinstance(out, Tensor) else type(out).__name__
        raise UserError(f"{key}: {type(part).__name__} must give a tensor {list(wanted)}: got {got}")


def _rows(shape: Shape, full: Shape) -> Shape:
    """Expected shape of a condition's rows: 1 or all patches, 1 or all sub-patches."""
    if len(shape) != len(full):
        return full
    return full[0], *(1 if shape[axis] == 1 else full[axis] for axis in (1, 2)), full[3]
