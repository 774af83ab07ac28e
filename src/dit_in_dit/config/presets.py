"""Presets, the configs of named runs: `get(name)` returns a config, and `NAMES` lists the names.

>>> dd.presets.get("emoji").model.patch_size
8
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from dit_in_dit.config import field
from dit_in_dit.config.errors import UserError, did_you_mean
from dit_in_dit.config.field import SIZES as SIZES  # noqa: PLC0414  # shown to others
from dit_in_dit.config.files import parse_assignment, replace_keys
from dit_in_dit.config.model import InnerConfig, ModelConfig, OuterConfig
from dit_in_dit.config.run import DataConfig, DiffusionConfig, RunConfig, SampleConfig
from dit_in_dit.config.schema import PluginKeys
from dit_in_dit.config.training import LrScaleConfig, TrainConfig

# SiT's recipe (Ma et al. 2024): flow, velocity, uniform times, AdamW at 1e-4, batch 256.
LATENTS = RunConfig(data=DataConfig(source="imagenet-latents", flip=True, workers=8), sample=SampleConfig(steps=50))

# JiT's recipe (Li & He 2025): the network predicts the image, the loss is on the velocity, times favour noise.
PIXELS = RunConfig(
    diffusion=DiffusionConfig(predict="image", weight="velocity", time="logit_normal", time_mean=0.8, time_std=0.8),
    data=DataConfig(source="imagenet", flip=True, workers=8),
    sample=SampleConfig(steps=50),
)

# The best arrangement of our studies (docs/does-nesting-help.md): the inner transformer last, with three blocks over
# single pixels, 16 channels wide. A 3x3 convolution mixes each pixel with its eight neighbours, and the patch's outer
# token drives inner adaLN. Spread interpolates between a pixel's token and the message from its patch, 1/2 at first.
PIXEL_DECODER = InnerConfig(
    sub_patch=1, width=16, num_heads=2, mlp_ratio=1, embed="conv", mixer="conv", condition="patch", spread="interpolate"
)


def _official(size: str, patch: int, arrangement: str) -> RunConfig:
    """DiT-size/patch (`plain`) or a nested model around it: `reference` (inner first, mean, add, E = D, S = 4) or, for
    pixels, `decoder` (`PIXEL_DECODER`)."""
    depth, width, heads = SIZES[size]
    pixels = patch == 16
    base = PIXELS if pixels else LATENTS
    model = ModelConfig(
        image_size=(256, 256) if pixels else (32, 32),
        channels=3 if pixels else 4,
        patch_size=patch,
        num_classes=1000,
        depth=depth,
        stages="first",
        use_inner=arrangement != "plain",
        time_embed="ddt" if pixels else "dit",  # logit-normal times hardly ever reach t = 1 (docs/lab-notebook.md, 21)
        outer=OuterConfig(width=width, num_heads=heads),
        inner=InnerConfig(sub_patch=patch // 2, width=width, num_heads=heads),
    )
    if arrangement == "decoder":
        model = replace(model, depth=None, stages=f"outer*{depth} inner*3", inner=PIXEL_DECODER)
    return replace(base, model=model)


def _all_official() -> dict[str, RunConfig]:
    configs = {f"dit-{s}{p}": _official(s, p, "plain") for s in SIZES for p in (2, 4, 8, 16)}
    configs |= {f"dit-in-dit-{s}{p}": _official(s, p, "reference") for s in SIZES for p in (2, 4, 8)}
    configs |= {f"dit-in-dit-{s}16": _official(s, 16, "decoder") for s in SIZES}
    return configs | {f"dit-in-dit-{s}16-reference": _official(s, 16, "reference") for s in SIZES}


# Small models of equal MACs for the embedded emoji; each trains in a few minutes on two cores. Blocks are those of DiT.
_EMOJI_2023 = RunConfig(
    model=ModelConfig(
        image_size=(32, 32),
        channels=3,
        patch_size=8,
        num_classes=9,
        stages="outer*3 inner*3",
        outer=OuterConfig(width=160, num_heads=4, mlp_ratio=3.5),
        inner=PIXEL_DECODER,
    ),
    diffusion=DiffusionConfig(predict="image", weight="velocity", time="logit_normal", time_mean=0.4),
    data=DataConfig(source="emoji"),
    train=TrainConfig(
        steps=4800,
        batch_size=32,
        learning_rate=4e-3,
        # At 1, training of the inner level is unstable (docs/lab-notebook.md, 11, 13).
        lr_scale=LrScaleConfig(inner=0.5),
        warmup=200,
        schedule="cosine",
        ema=0.998,
        precision="float32",  # at this width bfloat16 is slower on a CPU
        checkpoint_every=1200,
        sample_every=1200,
        evaluate_every=600,
    ),
    sample=SampleConfig(sampler="dpm++", steps=25, guidance=2.0),
)
# The reference arrangement: inner first, linear embedding, mean, add.
_EMOJI_REFERENCE = replace(
    _EMOJI_2023,
    model=replace(
        _EMOJI_2023.model,
        stages="inner*2 outer*3",
        outer=OuterConfig(width=152, num_heads=4),
        inner=InnerConfig(sub_patch=2, width=32, num_heads=2),
    ),
    train=replace(_EMOJI_2023.train, lr_scale=LrScaleConfig()),
)


def _today(width: int, mlp_ratio: float) -> OuterConfig:
    """An outer level of today's blocks, as in JiT and LightningDiT: RMS norm, SwiGLU, rotary positions."""
    return OuterConfig(width=width, num_heads=4, mlp_ratio=mlp_ratio, norm="rms", mlp="swiglu", rope="grid")


# The best nested and the best plain model of the study `field`. Their time embedding is smooth up to t = 1, where
# sampling starts and logit-normal times hardly ever are (docs/lab-notebook.md, 21).
_EMOJI = replace(_EMOJI_2023, model=replace(_EMOJI_2023.model, outer=_today(160, 3.7), qk_norm=True, time_embed="ddt"))
_EMOJI_DIT = replace(
    _EMOJI,
    model=replace(_EMOJI.model, stages="outer*3", outer=_today(176, 4.6), inner=InnerConfig()),
    train=replace(_EMOJI.train, lr_scale=LrScaleConfig()),
)


def _own(
    side: int, time_mean: float, nested: tuple[int, int], plain: tuple[int, int, float], **train: Any
) -> list[RunConfig]:
    """`PIXEL_DECODER` after outer blocks, and the plain DiT of equal MACs: outer blocks, width, for plain MLP ratio."""
    recipe = {"steps": 20_000, "batch_size": 64, "learning_rate": 1.5e-3, "warmup": 500, "ema": 0.9995, **train}
    how = TrainConfig(schedule="cosine", **recipe)
    diffusion = replace(_EMOJI.diffusion, time_mean=time_mean)  # more noise for larger images; JiT at 256x256: 0.8
    base = replace(_EMOJI.model, image_size=(side, side), patch_size=side // 8)
    models = [
        replace(base, stages=f"outer*{depth}{decoder}", outer=_today(width, ratio), inner=inner)
        for (depth, width, ratio), decoder, inner in (
            ((*nested, 4.0), " inner*3", PIXEL_DECODER),
            (plain, "", InnerConfig()),
        )
    ]
    return [replace(_EMOJI, model=model, diffusion=diffusion, train=how) for model in models]


_OWN = {  # for own images; measured in docs/presets.md
    "pixels-64": _own(64, 0.5, (6, 256), (7, 240, 4.45)),
    "pixels-128": _own(128, 0.7, (6, 256), (6, 288, 4.4)),
    "small": _own(64, 0.5, (4, 160), (4, 176, 4.35), steps=4000, batch_size=32, warmup=200, ema=0.999),
}

PRESETS: dict[str, RunConfig] = {
    **_all_official(),
    "emoji": _EMOJI,
    "emoji-2023": _EMOJI_2023,
    "emoji-reference": _EMOJI_REFERENCE,
    "emoji-dit": _EMOJI_DIT,
    **{name: pair[0] for name, pair in _OWN.items()},
    **{f"{name}-dit": pair[1] for name, pair in _OWN.items()},
}
NAMES = (*PRESETS, *field.PUBLISHED)


def get(name: str) -> RunConfig:
    """The config of a named run; UserError with the nearest name if the name is unknown."""
    if not isinstance(name, str) or name not in NAMES:
        raise UserError(f"unknown preset {name!r}{did_you_mean(str(name), NAMES)}")
    return PRESETS[name] if name in PRESETS else field.published(name)


def preset(name: str, *sets: str, **keys: Any) -> RunConfig:
    """The config of a preset with changed keys, as with `--preset` and `--set`. Raises UserError.

    Args:
        sets: `KEY=VALUE` texts; the value is read as YAML.
        keys: values by key. `__` stands for `.`, groups may be left out if the rest is unique, and a dictionary sets
            several keys of a group.

    >>> config = dd.preset("emoji", "train.steps=100", mixer="window", model__outer={"width": 128})
    >>> config.model.inner.mixer, config.model.outer.width, config.train.steps
    ('window', 128, 100)
    """
    return replace_keys(get(name), {**dict(map(parse_assignment, map(str, sets))), **dict(_full_keys(keys))})


def _full_keys(keys: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted keys, with their groups, of the names that `preset` accepts."""
    known = [*RunConfig.names(), *PluginKeys.names()]
    for name, value in keys.items():
        short = name.replace("__", ".")
        full = [key for key in known if key == short] or [key for key in known if key.endswith(f".{short}")]
        if len(full) > 1:
            spelled = " or ".join(key.replace(".", "__") for key in full)
            raise UserError(f"{short} is a key of several groups: write {spelled}")
        if not full:
            raise UserError(f"unknown key {short!r}{did_you_mean(short, [*known, *(k.split('.')[-1] for k in known)])}")
        if isinstance(value, Mapping):
            yield from _full_keys({f"{full[0]}.{below}": inside for below, inside in value.items()})
        else:
            yield full[0], value
