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

    `kind` tells DiT, SiT and REPA's SiT apart, whose weights have the same names; None: by the file's args or name,
    else DiT. `average` is the key of the averaged weights, if the file has several; None: the first. UserError when the
    file cannot be read or holds no weights, or its kind or prediction type is another.
    """
    content = read_pt(path)
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    averaged, trained = _groups(content, path, average)
    seen, size = seen_kind(averaged), str(args.get("model", ""))
    if seen and kind not in (None, seen):
        raise UserError(f"--kind {kind}: {path.name} has weights of a {title(seen)}: leave out this option")
    kind = seen or kind or _kind(size) or _kind(path.stem) or "dit"
    letter = re.search(r"-(S|B|L|XL)/", size) if kind in ALIKE else None
    heads = presets.SIZES[letter[1].lower()][2] if letter else None
    classes = args.get("num_classes")
    classes = classes if isinstance(classes, int) and classes > 0 else None
    predict, step = _predicted(kind, args, path), _step(content.get("opt"))
    return OfficialWeights(averaged, trained, step, kind, predict, heads, classes=classes)


def _groups(content: Mapping[str, Any], path: Path, average: str | None) -> tuple[Weights, Weights]:
    """Averaged and trained weights; if the file has only one of the two, it is returned as both."""
    averages, names = ([n for n in keys if isinstance(content.get(n), dict)] for keys in (AVERAGED, TRAINED))
    if average and average not in averages:
        raise UserError(f"--average {average[:40]}: {path.name} has {', '.join(averages) or 'no averages'}")
    averages = [average] if average else averages
    for several in (averages, names):
        if len(several) > 1 and set(several) != SEVERAL:
            raise UserError(f"{path.name} has weights as {' and '.join(several)}: keep one of them")
    averaged, trained = (content[keys[0]] if keys else None for keys in (averages, names))
    whole = averaged or trained or content
    if averaged is None or trained is None:
        whole = {name: value for name, value in whole.items() if str(name).startswith(DENOISER)} or whole
        ema = {name: value for name, value in whole.items() if EMA.match(str(name))}
        other = {name: value for name, value in whole.items() if name not in ema}
        averaged, trained = (ema, other) if ema and other else (whole, whole)
    return _bare(averaged, path), _bare(trained, path)


def _bare(weights: Mapping[Any, Any], path: Path) -> Weights:
    """Weights without prefixes of wrappers; UserError when there is something else than tensors."""
    if wrong := [n for n, value in weights.items() if not (isinstance(n, str) and isinstance(value, Tensor))]:
        raise UserError(f"{path.name} holds no weights of a DiT: {str(wrong[0])[:40]!r} is no tensor")
    return strip_wrappers(weights, path.name)


def _kind(name: str) -> OfficialKind | None:
    match = re.search(r"(?<![a-z])(dit|sit)(?![a-z])", name.lower())
    return None if match is None else "sit" if match[1] == "sit" else "dit"


def _predicted(kind: OfficialKind, args: Mapping[str, Any], path: Path) -> Predicted:
    """The prediction type of DiT and SiT; UserError when args name another path."""
    linear = "Linear" if kind == "sit" else "linear"
    line, output = str(args.get("path_type", linear)), str(args.get("prediction", "velocity"))
    if kind == "repa" and line != linear:
        raise UserError(f"{path.name} is of path {line[:20]!r}: known is path linear")
    if kind == "sit" and (line != linear or output not in ("velocity", "noise")):
        names = f"path {line[:20]!r} and prediction {output[:20]!r}"
        raise UserError(f"{path.name} is a SiT of {names}: known are path Linear with velocity or noise")
    return "noise" if kind == "dit" or (kind == "sit" and output == "noise") else "velocity"


def _step(optimizer: Any) -> int:
    """Steps in an optimizer's state; 0 when it has none."""
    try:
        step = next(iter(optimizer["state"].values()))["step"]
        return int(step) if 0 <= step < 10**12 else 0
    except (AttributeError, IndexError, KeyError, RuntimeError, StopIteration, TypeError, ValueError):
        return 0
