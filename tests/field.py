"""
Records of what official models of the field compute, and their weights drawn again.

`golden/field/NAME.npz` is made by `golden/make_field_outputs.py`, which imports this module's numbers and says what the
keys are. `record(NAME)` reads one.
"""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden" / "field"
TABLES = ("embedding_table.weight", "learnable_tokens", "in_context_posemb", "t_embedder.W")


def draw(key: int) -> np.random.Generator:
    """The stream of numbers `key`."""
    return np.random.Generator(np.random.Philox(key=[key, 0]))


def normal(stream: np.random.Generator, *shape: int) -> Tensor:
    """The stream's next normal numbers."""
    return torch.from_numpy(stream.standard_normal(shape, np.float32))


def weights(shapes: dict[str, list[int]], kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an official state dict: the kept tables, everything else from draw(1) in the order of `shapes`.

    Norm weights are 1 + N(0, 0.2^2), biases N(0, 0.2^2), embeddings and random frequencies N(0, 1), matrices and
    convolutions N(0, 1 / inputs).
    """
    stream, found = draw(1), {}
    for name, shape in shapes.items():
        if name in kept:
            found[name] = kept[name].clone()
        elif name.endswith(TABLES):
            found[name] = normal(stream, *shape)
        elif len(shape) == 1:
            found[name] = 0.2 * normal(stream, *shape) + float(name.endswith("weight"))
        else:
            found[name] = normal(stream, *shape) / float(np.prod(shape[1:])) ** 0.5
    return found


@dataclass(frozen=True)
class Record:
    """One official model: its configuration, inputs, output, and sizes.

    `x` (4, C, H, W), `t` (4,) in official time, `y` (4,), `out` as `x`. `noise_at` is the official time of pure noise.
    `predicts` is "image - noise", "noise - image" or "image". `more` has further arrays, `unused` names of tensors that
    `out` does not depend on. `counts` has trainable parameters and MACs of each published size, `sizes` its arguments.
    """

    name: str
    shapes: dict[str, list[int]]
    config: dict[str, Any]
    x: Tensor
    t: Tensor
    y: Tensor
    out: Tensor
    noise_at: int
    predicts: str
    saved: dict[str, Any]
    unused: list[str]
    commit: str
    counts: dict[str, list[int]]
    sizes: dict[str, dict[str, Any]]
    kept: dict[str, Tensor]
    more: dict[str, Tensor]

    def weights(self) -> dict[str, Tensor]:
        """Draw the official state dict again."""
        return weights(self.shapes, self.kept)

    def averaged(self, factor: float) -> dict[str, Tensor]:
        """Return the state dict of an average, `factor` times the weights.

        Official averages take in the tables that are parameters and never trained: they round, they do not change.
        """
        found = {}
        for name, value in self.weights().items():
            if name in self.kept or name == "t_embedder.W":
                table = name.endswith(("freqs_cos", "freqs_sin"))  # a buffer
                found[name] = value if table else value.mul(0.9999).add(value, alpha=1 - 0.9999)
            else:
                found[name] = value * factor
        return found

    def checkpoint(self) -> dict[str, Any]:
        """Return a training checkpoint as the official code writes it, but with an empty optimizer.

        The averages are 1/2, 1/4 of the weights. `args` is an `argparse.Namespace` where the official code saves one.
        """
        key, prefix = self.saved["model"]
        found: dict[str, Any] = {key: {prefix + name: value for name, value in self.weights().items()}}
        for place, (key, prefix) in enumerate(self.saved["averages"]):
            part = {prefix + name: value for name, value in self.averaged(0.5 ** (place + 1)).items()}
            found[key] = found.get(key, {}) | part
        for name, shape in self.saved.get("beside", {}).items():
            found[key][name] = torch.ones(shape)
        return found | {name: Namespace(seed=0) if name == "args" else {} for name in self.saved["others"]}


def names() -> list[str]:
    """Names of the records of models."""
    return sorted(path.stem for path in FOLDER.glob("*.npz") if path.stem != "losses")


@cache
def record(name: str) -> Record:
    """Read a record."""
    with np.load(FOLDER / f"{name}.npz") as file:
        found = {key: file[key] for key in file.files}
    texts = {key: str(found.pop(key)) for key in list(found) if found[key].dtype.kind == "U"}
    arrays = {key: torch.from_numpy(value) for key, value in found.items()}
    parts = {
        key: json.loads(texts[key]) for key in ("shapes", "config", "saved", "counts", "sizes", "noise_at", "unused")
    }
    parts |= {key: texts[key] for key in ("predicts", "commit")} | {
        key: arrays.pop(key) for key in ("x", "t", "y", "out")
    }
    kept = {key.removeprefix("kept/"): arrays.pop(key) for key in list(arrays) if key.startswith("kept/")}
    return Record(name=name, kept=kept, more=arrays, **parts)
