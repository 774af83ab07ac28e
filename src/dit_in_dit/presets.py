"""Named runs, each a literal. `get(name)` gives the config; `NAMES` lists them."""

from __future__ import annotations

from dataclasses import replace

from dit_in_dit.config import (
    DataConfig,
    DiffusionConfig,
    InnerConfig,
    ModelConfig,
    OuterConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
    UserError,
    nearest,
)

# name: depth, width, heads (Peebles & Xie 2023, table 1)
SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}

# SiT's recipe (Ma et al. 2024): flow, velocity, uniform times, AdamW at 1e-4, batch 256.
LATENTS = RunConfig(data=DataConfig(source="imagenet-latents", flip=True, workers=8), sample=SampleConfig(steps=50))

# JiT's recipe (Li & He 2025): the network gives the image, the loss is on the velocity, times lean to noise.
PIXELS = RunConfig(
    diffusion=DiffusionConfig(predict="image", weight="velocity", time="logit_normal", time_mean=0.8, time_std=0.8),
    data=DataConfig(source="imagenet", flip=True, workers=8),
    sample=SampleConfig(steps=50),
)


def _official(size: str, patch: int, *, nested: bool) -> RunConfig:
    """DiT-size/patch, or the arrangement first asked for around it: inner first, mean, add, E = D, S = 4."""
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
        use_inner=nested,
        outer=OuterConfig(width=width, num_heads=heads),
        inner=InnerConfig(sub_patch=patch // 2, width=width, num_heads=heads),
    )
    return replace(base, model=model)


# Three small models of equal MACs (20.7 to 21.1 M an image) for the embedded emoji: a few minutes each on two cores.
# `emoji`: outer stages first, the inner ones decode detail from the noisy sub-patches. The convolutional embedding
# shows a sub-patch its neighbours across the patch border; the narrower MLP pays for it.
_EMOJI = RunConfig(
    model=ModelConfig(
        image_size=(32, 32),
        channels=3,
        patch_size=8,
        num_classes=9,
        stages="outer*4 inner*2",
        outer=OuterConfig(width=128, num_heads=4),
        inner=InnerConfig(sub_patch=2, width=32, num_heads=2, mlp_ratio=2, embed="conv"),
    ),
    diffusion=DiffusionConfig(predict="image", weight="velocity", time="logit_normal", time_mean=0.4),
    data=DataConfig(source="emoji"),
    train=TrainConfig(
        steps=4800,
        batch_size=32,
        learning_rate=2e-3,
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
# The arrangement first asked for: inner first, linear embedding, mean, add.
_EMOJI_REFERENCE = replace(
    _EMOJI,
    model=replace(_EMOJI.model, stages="inner*2 outer*4", inner=InnerConfig(sub_patch=2, width=32, num_heads=2)),
)
_EMOJI_DIT = replace(_EMOJI, model=replace(_EMOJI.model, stages="outer*6", inner=InnerConfig()))

PRESETS: dict[str, RunConfig] = {
    **{f"dit-{s}{p}": _official(s, p, nested=False) for s in SIZES for p in (2, 4, 8, 16)},
    **{f"dit-in-dit-{s}{p}": _official(s, p, nested=True) for s in SIZES for p in (2, 4, 8, 16)},
    "emoji": _EMOJI,
    "emoji-reference": _EMOJI_REFERENCE,
    "emoji-dit": _EMOJI_DIT,
}
NAMES = tuple(PRESETS)


def get(name: str) -> RunConfig:
    """The named run's config; UserError with the nearest name when there is none."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}{nearest(name, PRESETS)}")
    return PRESETS[name]
