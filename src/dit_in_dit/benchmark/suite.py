"""Configs and limits of the speed goals, for a CPU and for CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import override
from dit_in_dit.config.run import InnerConfig, OuterConfig, RunConfig


@dataclass(frozen=True)
class Suite:
    """The configs at which goals are measured, with the limits of the ratios."""

    plain: RunConfig  # beside other DiT code
    compiled: RunConfig | None  # the same, compiled
    reference: RunConfig  # inner blocks first and E = D, beside its plainly written version
    paths: Mapping[str, tuple[RunConfig, float]]  # inner and outer path in time per MAC; the limit
    last: Mapping[str, tuple[RunConfig, RunConfig, float]]  # inner blocks last; the plain config of its twin; the limit
    sampled: RunConfig  # its sampling and training loop are timed
    growth: RunConfig  # swept over `sub_patches` (S) and `images` (side in pixels)
    images: tuple[int, ...]
    groups: tuple[int, int, int]  # (tokens, width, heads) for attention within groups
    seconds: float  # measuring time for each comparison
    sub_patches: tuple[int, ...] = (4, 16, 64)
    rates: Mapping[str, tuple[RunConfig, float]] = field(default_factory=dict)  # as a share of the best product; least
    on_cuda: bool = False  # whether the goals that hold only for CUDA apply


def _of(preset: str, *sets: str, **keys: Any) -> RunConfig:
    return presets.preset(preset, "train.precision=float32", *sets, **keys)


# A decoder of small patches of pixels, and its plain twin: the models that were optimised.
_LAST_128 = _of(
    "emoji-reference",
    stages="outer*4 inner*2",
    model__outer={"width": 128},
    model__inner={"sub_patch": 2, "width": 32, "num_heads": 2, "mlp_ratio": 2, "embed": "conv"},
)
_PLAIN_128 = _of("emoji-reference", "model.stages=outer*6", "model.outer.width=128")
_LAST_384 = replace(
    _of("dit-s8", "train.batch_size=4"),
    model=replace(
        _LAST_128.model,
        image_size=(64, 64),
        stages="outer*10 inner*2",
        outer=OuterConfig(width=384, num_heads=6),
        inner=InnerConfig(sub_patch=2, width=64, num_heads=2),
    ),
)
_CPU = Suite(
    plain=_of("dit-s2", "train.batch_size=2"),
    compiled=_of("dit-s2", "train.batch_size=2", "model.depth=2", "train.compile=true"),  # all blocks are equal
    reference=_of("dit-in-dit-s2", "train.batch_size=2"),
    paths={
        "E=D=384, S=4": (_of("dit-in-dit-s2", "train.batch_size=2"), 1.0),
        "E=32, S=16": (_LAST_128, 1.5),
        "E=64, S=16": (override(_LAST_128, ["model.inner.width=64"]), 1.5),
    },
    last={
        "D=128, E=32": (_LAST_128, _PLAIN_128, 1.15),
        "D=384, E=64": (_LAST_384, override(_LAST_384, ["model.stages=outer*11"]), 1.03),
    },
    sampled=override(_LAST_128, ["train.batch_size=16"]),
    growth=override(_LAST_128, ["train.batch_size=4", "model.inner.width=64", "model.inner.embed=linear"]),
    images=(32, 64, 128),
    groups=(2 * 1024, 384, 6),
    seconds=20.0,
)


def _on_cuda(preset: str, batch: int, *sets: str, **keys: Any) -> RunConfig:
    fast = ("train.precision=bfloat16", "train.compile=true", f"train.batch_size={batch}")
    return presets.preset(preset, *fast, *sets, **keys)


_INNER_B16 = {"sub_patch": 4, "width": 128, "num_heads": 2}  # two blocks cost as much as an outer block
_LAST_B16 = _on_cuda("dit-in-dit-b16-reference", 32, depth=None, stages="outer*11 inner*2", model__inner=_INNER_B16)
_CUDA = Suite(
    plain=_on_cuda("dit-xl2", 16, "train.compile=false"),
    compiled=_on_cuda("dit-xl2", 16),
    reference=_on_cuda("dit-in-dit-xl2", 16),
    paths={
        "E=D=1152, S=4": (_on_cuda("dit-in-dit-xl2", 16), 1.0),
        "E=32, S=16": (override(_LAST_B16, ["model.inner.width=32"]), 1.5),
        "E=64, S=16": (override(_LAST_B16, ["model.inner.width=64"]), 1.5),
    },
    last={"p=16, B, E=128": (_LAST_B16, _on_cuda("dit-b16", 32), 1.05)},
    sampled=_on_cuda("dit-in-dit-xl2", 16),
    growth=override(_LAST_B16, ["train.batch_size=8", "model.inner.width=64"]),
    images=(128, 256, 512),
    groups=(2**17, 1152, 16),
    rates={"plain XL/2": (_on_cuda("dit-xl2", 32), 0.5), "nested XL/2": (_on_cuda("dit-in-dit-xl2", 32), 0.45)},
    seconds=10.0,
    on_cuda=True,
)

_TINY = ("model.image_size=16", "model.patch_size=4", "model.outer.width=32", "train.batch_size=2")
_TINY_LAST = override(_LAST_128, [*_TINY, "model.stages=outer*2 inner"])
_TINY_FIRST = _of("emoji-reference", *_TINY, "model.stages=inner outer*2")
_TINY_PLAIN = _of("emoji-reference", *_TINY, "model.stages=outer*2")
_QUICK = Suite(
    plain=_TINY_PLAIN,
    compiled=None,
    reference=_TINY_FIRST,
    paths={"E=D=32": (_TINY_FIRST, 1.0), "E=16": (override(_TINY_LAST, ["model.inner.width=16"]), 1.5)},
    last={"tiny": (_TINY_LAST, _TINY_PLAIN, 1.15)},
    sampled=_TINY_LAST,
    growth=_TINY_LAST,
    sub_patches=(4, 16),
    images=(16, 32),
    groups=(64, 32, 4),
    seconds=0.1,
)
SUITES = {"cpu": _CPU, "cuda": _CUDA, "quick": _QUICK}


def check_suite(suite: str, device: torch.device) -> None:
    """Raise UserError if the suite cannot run on the device."""
    if suite not in ("quick", device.type):
        raise UserError(f"--suite {suite} needs a {suite.upper()} device: got --device {device}")
