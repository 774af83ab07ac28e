"""Shared pieces: small configs and small data in the formats that users have."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from PIL import Image

from compiling import Counting
from dit_in_dit.config.run import DataConfig, InnerConfig, ModelConfig, OuterConfig, RunConfig, SampleConfig
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.model import compiled
from dit_in_dit.model.nested import NestedDiT

SHARDED = pytest.param(
    "fsdp", marks=pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="on a CPU since PyTorch 2.7")
)


def only_full(*values: object) -> object:
    """A parameter of a test, or several, that only --full tries."""
    return pytest.param(*values, marks=pytest.mark.full)


def smallest_and_largest(names: Iterable[str]) -> list[object]:
    """Presets as parameters of a test; the sizes between S and XL, which have the same parts, only with --full."""
    return [only_full(name) if re.fullmatch(r"dit-(in-dit-)?[bl]\d+(-reference)?", name) else name for name in names]


SHARDED_FULL = pytest.param("fsdp", marks=[*SHARDED.marks, pytest.mark.full])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every test with every fault and choice (make test-full)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the pages of docs, unless -m names them: together they take minutes. Skip what is only for --full."""
    if "docs" not in config.getoption("-m"):
        items[:] = [item for item in items if not item.get_closest_marker("docs")]
    for item in items if not config.getoption("--full") else ():
        if item.get_closest_marker("full"):
            item.add_marker(pytest.mark.skip(reason="with --full"))


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether every fault is tried: `make test-full`. Else a few of each, as part of `make test`."""
    return bool(request.config.getoption("--full"))


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """The backend of torch.compile, which counts graphs, after none was compiled."""
    torch._dynamo.reset()
    counting = Counting()
    monkeypatch.setattr(compiled, "BACKEND", counting)
    return counting


def small_model(
    stages: str = "inner*2 outer*2", /, *, inner: dict | None = None, outer: dict | None = None, **keys
) -> ModelConfig:
    """16x8 images (not square), p=4, s=2, D=32, E=16: T=8 patches of S=4 sub-patches."""
    defaults = {"image_size": (16, 8), "channels": 3, "patch_size": 4, "num_classes": 5}
    return ModelConfig(
        **{**defaults, **keys},
        stages=stages,
        outer=OuterConfig(**{"width": 32, "num_heads": 4, **(outer or {})}),
        inner=InnerConfig(**{"sub_patch": 2, "width": 16, "num_heads": 2, **(inner or {})}),
    )


def perturbed(model: NestedDiT, seed: int = 0) -> NestedDiT:
    """The model with noise on every weight: zero-initialised parts would hide what is behind them."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return model


def inputs(model: ModelConfig, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Seeded x, t, y for a model; the first label is the null class."""
    draw = torch.Generator().manual_seed(7)
    x = torch.randn(batch, *model.image_shape, generator=draw)
    y = torch.arange(batch) % (model.num_classes + 1) if model.num_classes else None
    return x, torch.rand(batch, generator=draw), y


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty small images in three class folders, in the three formats."""
    root = tmp_path_factory.mktemp("images") / "set"
    draw = np.random.default_rng(0)
    for number in range(30):
        kind = ("png", "webp", "jpg")[number % 3]
        place = root / ("red", "green", "blue")[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"image{number}.{kind}", lossless=True)
    return root


@pytest.fixture
def run_config(folder: Path) -> RunConfig:
    """A run of a few steps on the small folder."""
    return RunConfig(
        seed=3,
        model=small_model("outer*1 inner*1", image_size=(8, 8), num_classes=3),
        data=DataConfig(source=str(folder), held_out=0.2),
        train=TrainConfig(
            steps=6,
            batch_size=4,
            learning_rate=1e-3,
            ema=0.9,
            precision="float32",
            checkpoint_every=3,
            sample_every=0,
            evaluate_every=3,
        ),
        sample=SampleConfig(steps=3, guidance=2.0),
    )


def with_train(config: RunConfig, **keys) -> RunConfig:
    """The config with other `train` values."""
    return replace(config, train=replace(config.train, **keys))
