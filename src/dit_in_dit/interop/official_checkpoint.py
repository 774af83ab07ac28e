"""Checkpoint files of official models, of their training scripts and of others for the same models."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError
from dit_in_dit.interop.field_names import OfficialKind, Weights, seen_kind
from dit_in_dit.interop.official import ALIKE, OfficialWeights, Predicted, title
from dit_in_dit.runs.safe_load import read_pt, strip_wrappers

AVERAGED = ("ema", "model_ema", "ema_model", "ema_state_dict", "model_ema1", "model_ema2")  # keys of averaged weights
SEVERAL = {"model_ema1", "model_ema2"}  # JiT keeps two averages; the first is imported, unless another is named
TRAINED = ("model", "state_dict", "model_state_dict", "module")
EMA = re.compile(r"(module\.|_orig_mod\.)*ema(_model|_denoiser)?\.")  # prefix of an average inside a module
DENOISER = ("denoiser.", "ema_denoiser.")  # the model in a Lightning checkpoint, beside an encoder and projectors


def read_checkpoint(path: Path, kind: OfficialKind | None = None, average: str | None = None) -> OfficialWeights:
    """Read a file of an official model: only weights, or a training checkpoint with averages, optimizer and args.

    Args:
        kind: DiT, SiT or REPA's SiT, whose weights have the same names; None: by the file's args or name, else DiT.
        average: key of the averaged weights, if the file has several; None: the first.

    Raises:
        UserError: the file cannot be read or holds no weights, or its kind or prediction type is another.
    """
    content = read_pt(path)
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    averaged, trained = _groups(content, path, average)
    seen = seen_kind(averaged)
    if seen and kind not in (None, seen):
        raise UserError(f"--kind {kind}: {path.name} has weights of a {title(seen)}: leave out this option")
    kind = seen or kind or _kind(str(args.get("model", ""))) or _kind(path.stem) or "dit"
    predict, heads = _output(kind, args, path) if kind in ALIKE else ("velocity", None)
    classes = args.get("num_classes")
    classes = classes if isinstance(classes, int) and classes > 0 else None
    steps = _step(content.get("opt"))
    return OfficialWeights(averaged, trained, steps, kind, predict, heads, classes=classes)


def _groups(content: Mapping[str, Any], path: Path, average: str | None) -> tuple[Weights, Weights]:
    """Averaged and trained weights; if the file has only one of the two, it is returned as both."""
    groups = []
    for names in (AVERAGED, TRAINED):
        known = [name for name in names if isinstance(content.get(name), dict)]
        if average and names is AVERAGED:
            if average not in known:
                raise UserError(f"--average {average[:40]}: {path.name} has {', '.join(known) or 'no averages'}")
            known = [average]
        if len(known) > 1 and set(known) != SEVERAL:
            raise UserError(f"{path.name} has weights as {' and '.join(known)}: keep one of them")
        groups.append(content[known[0]] if known else None)
    averaged, trained = groups
    whole = averaged or trained or content
    if averaged is None or trained is None:
        whole = {name: value for name, value in whole.items() if str(name).startswith(DENOISER)} or whole
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
    if kind == "repa":
        if (line := str(args.get("path_type", "linear"))) != "linear":
            raise UserError(f"{path.name} is of path {line[:20]!r}: known is path linear")
        return "velocity", heads
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
