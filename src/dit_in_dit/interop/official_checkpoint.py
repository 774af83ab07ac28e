"""Checkpoint files of the official DiT and SiT, of their training scripts and of others for the same models."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError
from dit_in_dit.interop.official import OfficialKind, OfficialWeights, Predicted, Weights
from dit_in_dit.runs.safe_load import read_pt, strip_wrappers

AVERAGED = ("ema", "model_ema", "ema_model", "ema_state_dict")  # keys of the averaged weights in a checkpoint
TRAINED = ("model", "state_dict", "model_state_dict", "module")
EMA = re.compile(r"(module\.|_orig_mod\.)*ema(_model)?\.")  # prefix of an average inside a module


def read_checkpoint(path: Path, kind: OfficialKind | None = None) -> OfficialWeights:
    """Read a file of the official DiT or SiT: only weights, or a training checkpoint of model, ema, opt and args.

    Args:
        kind: DiT or SiT; None: by the file's args, else by its name, else DiT.

    Raises:
        UserError: the file cannot be read or holds no weights, or its prediction type is unknown.
    """
    content = read_pt(path)
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    averaged, trained = _groups(content, path)
    kind = kind or _kind(str(args.get("model", ""))) or _kind(path.stem) or "dit"
    predict, heads = _output(kind, args, path)
    classes = args.get("num_classes")
    classes = classes if isinstance(classes, int) and classes > 0 else None
    step = _step(content.get("opt"))
    return OfficialWeights(averaged, trained, step, kind, predict, heads, clock=kind, classes=classes)


def _groups(content: Mapping[str, Any], path: Path) -> tuple[Weights, Weights]:
    """Averaged and trained weights; if the file has only one of the two, it is returned as both."""
    groups = []
    for names in (AVERAGED, TRAINED):
        known = [name for name in names if isinstance(content.get(name), dict)]
        if len(known) > 1:
            raise UserError(f"{path.name} has weights as {' and '.join(known)}: keep one of them")
        groups.append(content[known[0]] if known else None)
    averaged, trained = groups
    whole = averaged or trained or content
    if averaged is None or trained is None:
        _check_tensors(whole, path)
        ema = {name: value for name, value in whole.items() if EMA.match(name)}
        other = {name: value for name, value in whole.items() if name not in ema}
        averaged, trained = (ema, other) if ema and other else (whole, whole)
    for weights in (averaged, trained):
        _check_tensors(weights, path)
    return strip_wrappers(averaged, path.name), strip_wrappers(trained, path.name)


def _check_tensors(weights: Mapping[Any, Any], path: Path) -> None:
    if wrong := [n for n, value in weights.items() if not (isinstance(n, str) and isinstance(value, Tensor))]:
        raise UserError(f"{path.name} holds no weights of a DiT: {str(wrong[0])[:40]!r} is no tensor")


def _kind(name: str) -> OfficialKind | None:
    match = re.search(r"(?<![a-z])(dit|sit)(?![a-z])", name.lower())
    return None if match is None else "sit" if match[1] == "sit" else "dit"


def _output(kind: OfficialKind, args: Mapping[str, Any], path: Path) -> tuple[Predicted, int | None]:
    """The prediction type, and the number of attention heads of the size that args name."""
    size = re.search(r"-(S|B|L|XL)/", str(args.get("model", "")))
    heads = presets.SIZES[size[1].lower()][2] if size else None
    if kind == "dit":
        return "noise", heads
    line, output = str(args.get("path_type", "Linear")), str(args.get("prediction", "velocity"))
    if line != "Linear" or output not in ("velocity", "noise"):
        raise UserError(
            f"{path.name} is a SiT of path {line[:20]!r} and prediction {output[:20]!r}: "
            "known are path Linear with velocity or noise"
        )
    return "noise" if output == "noise" else "velocity", heads


def _step(optimizer: Any) -> int:
    """Steps in an optimizer's state; 0 when it has none."""
    states = optimizer.get("state") if isinstance(optimizer, dict) else None
    first = next(iter(states.values()), None) if isinstance(states, dict) else None
    step = first.get("step") if isinstance(first, dict) else None
    if isinstance(step, Tensor):
        step = step.item() if step.numel() == 1 else None
    return int(step) if isinstance(step, int | float) and 0 <= step < 10**12 else 0
