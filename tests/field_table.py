"""
The table of docs/field.md: differences from the official code, and costs.

    PYTHONPATH=src python tests/field_table.py

prints it: for each model the official file, its commit, the largest difference of the outputs relative to the largest
output, and parameters and MACs of the largest published size, of ours and of the official code. DiT and SiT are in
`golden/official_outputs.npz`, whose script names their commits; it has no counts of MACs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

import field
from dit_in_dit.config import presets
from dit_in_dit.config.field import FAMILIES
from dit_in_dit.config.run import ModelConfig
from dit_in_dit.inspection.cost import macs, parameters
from dit_in_dit.interop.import_run import import_run
from dit_in_dit.model.layers import sincos
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs.checkpoint import Checkpoint

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parent / "golden"
HEAD = "| Model | Official file | Commit | Largest difference | Size | Parameters: ours / official | MACs |"
# Record: its family, and preset and name of its largest published size.
LARGEST = {
    "repa": ("repa", "repa-xl2", "SiT-XL/2 trunk"),
    "lightningdit": ("lightningdit", "lightningdit-xl1", "LightningDiT-XL/1"),
    "lightningdit_qk": ("lightningdit", "lightningdit-xl1", "LightningDiT-XL/1"),
    "jit": ("jit", "jit-g16", "JiT-G/16"),
    "pixeldit_pre": ("pixeldit", "pixeldit-xl16", "PixelDiT-XL/16"),
    "pixeldit_post": ("pixeldit_post", "pixeldit-post-xl16", "PixelDiT-XL/16"),
    "deco": ("deco", "deco-xl16", "DeCo-XL/16"),
    "pixnerd": ("pixnerd", "pixnerd-xl16", "PixNerd-XL/16"),
    "ddt": ("ddt", "ddt-xl2", "DDT-XL/2"),
    "rae": ("rae", "rae-xl", "DiTDH-XL"),
    "raev2": ("raev2", "raev2", "DiTDH"),
    "mpdit": ("mpdit", "mpdit-xl", "MPDiT-XL/4x"),
}
# What the weights of the record's toy sizes do not show.
UNSEEN = {
    "repa": {"heads": 4},
    "mpdit": {"heads": 4},
    "jit": {"settings": ["model.tokens.start=2"]},
    "ddt": {"settings": ["model.stages=outer*2 inner*2"]},
}


def options(name: str) -> dict[str, Any]:
    """Options of the import of a record's weights."""
    size = tuple(field.record(name).x.shape[2:])
    shown = any(table.startswith(("pos_embed", "dec_rope")) for table in field.record(name).kept)
    return UNSEEN.get(name, {}) | ({} if shown else {"size": size})


def outputs(record: field.Record, model: NestedDiT, x: Tensor) -> Tensor:
    """The model's output for official times, with the official sign."""
    t = 1 - record.t if record.noise_at == 0 else record.t
    with torch.no_grad():
        out = model(x, t, record.y)
    return -out if record.predicts == "image - noise" else out


def difference(out: Tensor, official: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((out - official).abs().max() / official.abs().max()).item()


def largest_difference(name: str) -> float:
    """The difference of a record's outputs from those of our model with the imported weights."""
    record = field.record(name)
    with TemporaryDirectory() as place:
        torch.save(record.weights(), Path(place, "weights.pt"))
        import_run(Path(place, "weights.pt"), Path(place, "run"), **options(name))
        model = Checkpoint.open(Path(place, "run")).model(CPU)
    found = difference(outputs(record, model, record.x), record.out)
    if "wide/x" in record.more:
        x = record.more["wide/x"]
        wide = NestedDiT(replace(model.config, image_size=tuple(x.shape[2:])))
        wide.load_state_dict(model.state_dict())
        found = max(found, difference(outputs(record, wide, x), record.more["wide/out"]))
    return found


def published_model(preset: str, name: str) -> ModelConfig:
    """The model of a record's published size."""
    return replace(presets.get(preset).model, **({"qk_norm": True} if name == "lightningdit_qk" else {}))


def plain_rows() -> Iterator[list[str]]:
    """The rows of DiT and SiT, without the table's marks."""
    golden = np.load(GOLDEN / "official_outputs.npz")
    text = (GOLDEN / "make_official_outputs.py").read_text()
    stream, weights = np.random.Generator(np.random.Philox(key=[1, 0])), dict[str, Tensor]()
    for name, shape in json.loads(str(golden["shapes/tiny"])).items():
        drawn = name != "pos_embed"
        fixed = torch.from_numpy(stream.standard_normal(shape, np.float32)) * 0.2 if drawn else sincos(32, 4, 4)[None]
        weights[name] = fixed
    shapes = json.loads(str(golden["shapes/DiT-XL/2"]))
    official = sum(prod(shape) for name, shape in shapes.items() if name != "pos_embed")
    model = replace(presets.get("dit-xl2").model, use_inner=False, learn_variance=True)
    costs = [f"{parameters(model)['total']:,} / {official:,}", f"{macs(model)['total']:,} / not counted"]
    x, y = torch.from_numpy(golden["x"]), torch.from_numpy(golden["y"])
    for title, repository in (("DiT", "facebookresearch/DiT"), ("SiT", "willisma/SiT")):
        with TemporaryDirectory() as place, torch.no_grad():
            torch.save(weights, path := Path(place, f"{title}.pt"))
            import_run(path, Path(place, "run"), heads=4)
            net = Checkpoint.open(Path(place, "run")).model(CPU)
            if title == "DiT":
                off = difference(net(x, torch.from_numpy(golden["t"]) / 1000, y), torch.from_numpy(golden["out"]))
            else:
                out = -net(x, 1 - torch.from_numpy(golden["tau"]), y)[:, :4]
                off = difference(out, torch.from_numpy(golden["sit"]))
        commit = re.search(rf"{repository}.*?(?:commit )([0-9a-f]{{40}})", text, re.DOTALL)[1]
        yield [title, f"{repository}: models.py", commit[:8], f"{off:.1e}", "XL/2", *costs]


def rows() -> Iterator[list[str]]:
    """The cells of the table."""
    yield from plain_rows()
    for name, (family, preset, size) in LARGEST.items():
        record, model = field.record(name), published_model(preset, name)
        title = FAMILIES[family].title + {"lightningdit_qk": " with QK-norm", "repa": ", trunk"}.get(name, "")
        file = FAMILIES["pixeldit" if family == "pixeldit_post" else family].code.split(",")[0]
        counts = zip((parameters(model)["total"], macs(model)["total"]), record.counts[size], strict=True)
        costs = [f"{ours:,} / {official:,}" for ours, official in counts]
        largest = size.removesuffix(" trunk").rpartition("-")[2] if "-" in size else size
        yield [title, file, record.commit[:8], f"{largest_difference(name):.1e}", largest, *costs]


if __name__ == "__main__":
    print(HEAD)
    print("|---|---|---|---|---|---|---|")
    for cells in rows():
        print(f"| {' | '.join(cells)} |")
