"""Published diffusion transformers as literals of the one model's options, with their recipes as far as keys exist.

Each function gives what the sizes of a model share; `PUBLISHED` has the sizes. docs/field.md names the sources, and
shows costs and how equality with the official code was tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from dit_in_dit.config.model import InnerConfig, ModelConfig, OuterConfig, TokensConfig
from dit_in_dit.config.run import DataConfig, DiffusionConfig, RunConfig, SampleConfig
from dit_in_dit.config.training import TrainConfig


@dataclass(frozen=True)
class Family:
    """A published model: title, first author and year, repository and file of the official code, and shared keys."""

    title: str
    paper: str
    code: str
    build: Callable[[], RunConfig]


FAMILIES: dict[str, Family] = {}


def _family(title: str, paper: str, code: str) -> Callable[[Callable[[], RunConfig]], Callable[[], RunConfig]]:
    def add(build: Callable[[], RunConfig]) -> Callable[[], RunConfig]:
        FAMILIES[build.__name__.removeprefix("_")] = Family(title, paper, code, build)
        return build

    return add


def _images(size: int, channels: int, patch: int, **keys: Any) -> ModelConfig:
    """The model of an ImageNet preset; `keys` are further keys of the model."""
    return ModelConfig(image_size=(size, size), channels=channels, patch_size=patch, num_classes=1000, **keys)


def _recipe(model: ModelConfig, train: TrainConfig, sample: SampleConfig, **diffusion: Any) -> RunConfig:
    """A flow with logit-normal times, unless `diffusion` has others."""
    source = "imagenet" if model.channels == 3 else "imagenet-latents"
    return RunConfig(
        model=model,
        diffusion=DiffusionConfig(**({"time": "logit_normal"} | diffusion)),
        data=DataConfig(source=source, flip=True, workers=8),
        train=train,
        sample=sample,
    )


MODERN = OuterConfig(norm="rms", mlp="swiglu", rope="grid")  # blocks of LightningDiT and JiT
BARE = replace(MODERN, rope="extent", bias="none", position="none")  # of DDT, DeCo, PixNerd and PixelDiT
LAST = InnerConfig(spread="none", fuse="replace", position="none")  # the inner head is the only head
PIXELS = replace(LAST, sub_patch=1, num_heads=1, head_condition="none")
SMALL_BATCH = TrainConfig(clip=0.0)  # AdamW at 1e-4, batch 256
LARGE_BATCH = replace(SMALL_BATCH, batch_size=1024, learning_rate=2e-4, beta2=0.95)


@_family("SiT", "Ma et al. 2024", "willisma/SiT: models.py")
def _sit() -> RunConfig:
    model = _images(32, 4, 2, time_embed="sit")
    return _recipe(model, SMALL_BATCH, SampleConfig(sampler="heun", steps=125, guidance=1.5), time="uniform")


@_family("SiT with REPA", "Yu et al. 2024", "sihyun-yu/REPA: models/sit.py, without the projectors of training")
def _repa() -> RunConfig:
    train, sample = replace(SMALL_BATCH, clip=1.0), SampleConfig(sampler="heun", steps=125, guidance=1.8)
    return _recipe(_images(32, 4, 2, time_embed="repa"), train, replace(sample, interval=(0.0, 0.7)), time="uniform")


@_family("LightningDiT", "Yao et al. 2025", "hustvl/LightningDiT: models/lightningdit.py")
def _lightningdit() -> RunConfig:
    sample = SampleConfig(sampler="euler", steps=250, guidance=10.0, guidance_channels=3, interval=(0.0, 0.89))
    # 0.3 at t = 1 for the image: configs/lightningdit_xl_vavae_f16d32.yaml, transport/integrators.py
    sample = replace(sample, time_shift=1 / 0.3)
    return _recipe(_images(16, 32, 1, time_embed="sit", outer=MODERN), replace(LARGE_BATCH, steps=80_000), sample)


@_family("JiT", "Li & He 2025", "undefined443/JiT (a fork of LTH14/JiT): model_jit.py")
def _jit() -> RunConfig:
    tokens = TokensConfig(label=32, start=4)
    model = _images(256, 3, 16, time_embed="sit", qk_norm=True, tokens=tokens, bottleneck=128, outer=MODERN)
    train = replace(LARGE_BATCH, steps=750_000, warmup=6255)  # 600 epochs, and 5
    sample = SampleConfig(sampler="heun", steps=50, guidance=2.9, interval=(0.0, 0.9))
    return _recipe(model, train, sample, predict="image", weight="velocity", time_mean=0.8, time_std=0.8)


@_family(
    "AsymFlow",
    "Chen et al. 2026",
    "Lakonik/LakonLab: lakonlab/models/architectures/asymflow/asymjit.py; its trunk is JiT",
)
def _asymflow() -> RunConfig:
    config = _jit()
    sample = replace(config.sample, guidance=2.2)
    return replace(config, diffusion=replace(config.diffusion, predict="split"), sample=sample)


@_family("DDT", "Wang et al. 2025", "MCG-NJU/DDT: src/models/denoiser/decoupled_improved_dit.py")
def _ddt() -> RunConfig:
    blocks = replace(LAST, norm="rms", mlp="swiglu", rope="extent", bias="none")
    inner = replace(blocks, sub_patch=2, mixer="image", condition="outer", head_condition="rows", head_norm="layer")
    model = _images(32, 4, 2, time_embed="ddt", qk_norm=True, outer=BARE, inner=inner)
    sample = SampleConfig(sampler="euler", steps=250, guidance=2.0, interval=(0.0, 0.7))
    return _recipe(model, replace(SMALL_BATCH, beta2=0.95), sample)


@_family("DeCo", "Ma et al. 2025", "Zehong-Ma/DeCo: src/models/transformer/dit_c2i_DeCo.py")
def _deco() -> RunConfig:
    blocks = replace(PIXELS, width=32, mixer="none", mlp="silu", mlp_ratio=1.0, norm="layer_affine", head_norm="layer")
    inner = replace(blocks, embed="dct", embed_layers=2, condition="outer_sub_patch")
    model = _images(256, 3, 16, time_embed="ddt", qk_norm=True, outer=BARE, inner=inner)
    sample = SampleConfig(sampler="euler", steps=100, guidance=3.2, interval=(0.0, 0.9))
    return _recipe(model, replace(SMALL_BATCH, label_drop=0.2), sample, frequency_weight=1.0)


@_family("PixNerd", "Wang et al. 2025", "MCG-NJU/PixNerd: src/models/transformer/pixnerd_c2i.py")
def _pixnerd() -> RunConfig:
    blocks = replace(PIXELS, width=64, mixer="none", mlp="hyper", mlp_ratio=2.0, norm="rms", modulation="none")
    inner = replace(blocks, embed="dct", condition="outer")
    model = _images(256, 3, 16, time_embed="ddt", qk_norm=True, outer=BARE, inner=inner)
    sample = SampleConfig(sampler="euler", steps=100, guidance=3.5, interval=(0.0, 0.9))
    return _recipe(model, SMALL_BATCH, sample)


@_family("PixelDiT", "Yu et al. 2025", "gcy-hub/PixelDiT (a fork): pixdit_core/pixeldit_c2i.py")
def _pixeldit() -> RunConfig:
    blocks = replace(PIXELS, width=16, mixer="compact", mlp="gelu_erf", norm="rms", bias="mlp", rope="extent")
    inner = replace(blocks, position="sincos", condition="outer_per_block")
    model = _images(256, 3, 16, time_embed="ddt", qk_norm=True, outer=BARE, inner=inner)
    sample = SampleConfig(sampler="dpm++", steps=100, guidance=3.25, interval=(0.0, 0.9))
    return _recipe(model, replace(SMALL_BATCH, clip=1.0, steps=1_600_000), sample)


@_family("PixelDiT, post-modulation", "Yu et al. 2025", "as PixelDiT, pit_adaln_post_modulation")
def _pixeldit_post() -> RunConfig:
    config = _pixeldit()
    return replace(config, model=replace(config.model, inner=replace(config.model.inner, modulation="post")))


@_family("RAE DiT-DH", "Zheng et al. 2025", "bytetriper/RAE: src/stage2/models/DDT.py")
def _rae() -> RunConfig:
    blocks = replace(LAST, width=2048, num_heads=16, norm="rms", mlp="swiglu", rope="grid")
    inner = replace(blocks, sub_patch=1, mixer="image", condition="outer_sub_patch", head_condition="rows")
    model = _images(16, 768, 1, time_embed="gauss", silu_twice=True, outer=MODERN, inner=inner)
    train = replace(LARGE_BATCH, ema=0.9995, clip=1.0)
    # configs/training/ImageNet256/DiTDH-XL_DINOv2-B.yaml: time_dist_shift_dim 196608, time_dist_shift_base 4096
    return _recipe(model, train, SampleConfig(sampler="euler", steps=50), time_shift="dimension")


@_family("RAEv2 DiT-DH", "Singh et al. 2026", "nanovisionx/RAEv2: src/stage2/models/DDT.py, without the guidance head")
def _raev2() -> RunConfig:
    base = _rae()
    outer = replace(MODERN, modulation="none", position="none")
    tokens = TokensConfig(label=8, time=4, adaln=False)
    model = replace(base.model, channels=1024, silu_twice=False, qk_norm=True, tokens=tokens, outer=outer)
    return replace(base, model=model, diffusion=replace(base.diffusion, predict="image", weight="velocity"))


@_family("MPDiT", "Dao & Metaxas 2026", "quandao10/MPDiT: models/mpdit.py with time_emb=mlp")
def _mpdit() -> RunConfig:
    blocks = InnerConfig(sub_patch=2, mixer="image", spread="refine", fuse="replace", embed_layers=2)
    inner, outer = replace(blocks, modulation="shared", position="sincos"), OuterConfig(modulation="shared")
    tokens = TokensConfig(label=16, rows="own", adaln=False)
    model = _images(32, 4, 4, time_embed="repa", tokens=tokens, outer=outer, inner=inner)
    sample = SampleConfig(sampler="euler", steps=250, guidance=1.4)
    return _recipe(model, replace(LARGE_BATCH, beta2=0.999), sample)


# name: depth, width, heads of DiT (Peebles & Xie 2023, table 1)
SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}
Size = tuple[str, tuple[int, int, int], int, dict[str, Any]]


def _sizes(family: str, name: str, **depths: tuple[int, int]) -> dict[str, Size]:
    """Sizes with the widths and heads of DiT's; `depths`: outer and inner blocks by size, which `name` has as `{}`."""
    rows = ((size, outer, inner, *SIZES[size][1:]) for size, (outer, inner) in depths.items())
    return {name.format(size): (family, (outer, width, heads), inner, {}) for size, outer, inner, width, heads in rows}


# name: family, (outer blocks, width, heads), inner blocks, further keys of the model
PUBLISHED: dict[str, Size] = {
    **_sizes("sit", "sit-{}2", s=(12, 0), b=(12, 0), l=(24, 0), xl=(28, 0)),
    **_sizes("repa", "repa-{}2", xl=(28, 0)),
    **_sizes("lightningdit", "lightningdit-{}1", xl=(28, 0)),
    "jit-b16": ("jit", (12, 768, 12), 0, {}),
    "jit-l16": ("jit", (24, 1024, 16), 0, {"tokens": TokensConfig(label=32, start=8)}),
    "jit-h16": ("jit", (32, 1280, 16), 0, {"tokens": TokensConfig(label=32, start=10), "bottleneck": 256}),
    "jit-g16": ("jit", (40, 1664, 16), 0, {"tokens": TokensConfig(label=32, start=10), "bottleneck": 256}),
    "asymflow-h16": ("asymflow", (32, 1280, 16), 0, {"tokens": TokensConfig(label=32, start=10), "bottleneck": 256}),
    **_sizes("ddt", "ddt-{}2", b=(8, 4), l=(20, 4), xl=(22, 6)),
    **_sizes("deco", "deco-{}16", l=(22, 3), xl=(28, 3)),
    **_sizes("pixnerd", "pixnerd-{}16", l=(22, 2), xl=(26, 4)),
    **_sizes("pixeldit", "pixeldit-{}16", b=(12, 2), l=(22, 4), xl=(26, 4)),
    **_sizes("pixeldit_post", "pixeldit-post-{}16", b=(12, 2), l=(22, 4), xl=(26, 4)),
    **_sizes("rae", "rae-{}", s=(12, 2), b=(12, 2), l=(24, 2), xl=(28, 2)),
    "raev2": ("raev2", (28, 1440, 20), 2, {}),
    **_sizes("mpdit", "mpdit-{}", b=(6, 6), l=(18, 6), xl=(22, 6)),
}


def published(name: str) -> RunConfig:
    """The config of a published size."""
    family, (depth, width, heads), inner_depth, keys = PUBLISHED[name]
    config = FAMILIES[family].build()
    return replace(config, model=resize(config.model, (depth, width, heads), inner_depth, **keys))


def resize(model: ModelConfig, outer: tuple[int, int, int], inner_depth: int, **keys: Any) -> ModelConfig:
    """A model of a family with another size: `outer` blocks, width and heads, then `inner_depth` inner blocks.

    An inner level that has no width of its own takes width and heads of the outer level. `keys`: further keys.
    """
    depth, width, heads = outer
    inner = model.inner
    if inner.width == InnerConfig.width:
        inner = replace(inner, width=width, num_heads=heads)
    stages = f"outer*{depth}" + (f" inner*{inner_depth}" if inner_depth else "")
    level = replace(model.outer, width=width, num_heads=heads)
    return replace(model, **{"stages": stages, "outer": level, "inner": inner, **keys})
