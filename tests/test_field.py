"""Models of the field: official weights are imported, compute the official outputs, and come back bit for bit.

`field.record` has what the official code computes. The largest differences are in docs/field.md (`scripts/field_table.py`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import field
from dit_in_dit.config.run import ModelConfig
from dit_in_dit.interop.field_names import BESIDE, OfficialKind
from dit_in_dit.interop.import_run import export_official, import_run
from dit_in_dit.interop.official import kind_of
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.runs.folder import read_config

CPU = torch.device("cpu")
NAMES = field.names()
# What the weights of the record's toy sizes do not show.
OPTIONS = {
    "repa": {"heads": 4},
    "mpdit": {"heads": 4},
    "jit": {"settings": ["model.tokens.start=2"]},
    "ddt": {"settings": ["model.stages=outer*2 inner*2"]},
}


def options(name: str) -> dict:
    """Options of the import of a record's weights."""
    size = tuple(field.record(name).x.shape[2:])
    shown = any(table.startswith(("pos_embed", "dec_rope")) for table in field.record(name).kept)
    return OPTIONS.get(name, {}) | ({} if shown else {"size": size})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The imported run of a record's weights."""

    @cache
    def run(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        torch.save(field.record(name).weights(), folder / "weights.pt")
        import_run(folder / "weights.pt", folder / "run", **options(name))
        return folder / "run"

    return run


def outputs(record: field.Record, model: NestedDiT, x: Tensor) -> Tensor:
    """The model's output for official times, with the official sign."""
    t = 1 - record.t if record.noise_at == 0 else record.t
    with torch.no_grad():
        out = model(x, t, record.y)
    return -out if record.predicts == "image - noise" else out


def difference(out: Tensor, official: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((out - official).abs().max() / official.abs().max()).item()


@pytest.mark.parametrize("name", NAMES)
def test_forward_equals_the_official_code(runs, name):
    record, saved = field.record(name), Checkpoint.open(runs(name))
    model = saved.model(CPU)
    assert kind_of(saved.config.model) == OFFICIAL.get(name, name)
    assert saved.config.diffusion.predict == ("image" if record.predicts == "image" else "velocity")
    assert difference(outputs(record, model, record.x), record.out) < 1e-5
    if "wide/x" in record.more:
        x = record.more["wide/x"]
        wide = NestedDiT(replace(saved.config.model, image_size=tuple(x.shape[2:])))
        wide.load_state_dict(model.state_dict())
        assert difference(outputs(record, wide, x), record.more["wide/out"]) < 1e-5


OFFICIAL = {"lightningdit_qk": "lightningdit", "pixeldit_pre": "pixeldit", "raev2_ig": "raev2"}
