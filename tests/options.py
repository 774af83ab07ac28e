"""Option sets of the model drawn at random, as a user might try them: many are refused, the others must work."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from conftest import small_model
from dit_in_dit.config.field import FAMILIES, PUBLISHED, resize
from dit_in_dit.config.model import ModelConfig, TokensConfig

# One published size of each family.
FIRST = tuple(next(name for name, size in PUBLISHED.items() if size[0] == family) for family in FAMILIES)
PROGRAMS = (
    "outer*2",
    "inner outer*2",
    "outer*2 inner*2",
    "inner outer inner",
    "outer inner outer inner",
    "inner*2 outer",
)
SHARED = {
    "norm": ("layer", "layer_affine", "rms"),
    "mlp": ("gelu", "gelu_erf", "silu", "swiglu"),
    "bias": ("all", "mlp", "none"),
    "rope": ("none", "grid", "extent"),
    "modulation": ("block", "block", "post", "shared", "none"),
    "head_norm": (None, "layer", "layer_affine", "rms"),
}
OUTER = SHARED | {"position": ("sincos", "none"), "head_condition": ("image", "none")}
INNER = SHARED | {
    "mlp": (*SHARED["mlp"], "hyper"),
    "position": ("learned", "sincos", "none"),
    "head_condition": ("image", "rows", "none"),
    "embed": ("linear", "conv", "dct"),
    "embed_layers": (1, 2),
    "aggregate": ("mean", "weighted", "attention", "concat"),
    "mixer": ("patch", "window", "image", "image", "conv", "compact", "none"),
    "condition": ("image", "patch", "sub_patch", "outer", "outer_sub_patch", "outer_per_block"),
    "spread": ("add", "interpolate", "none", "refine"),
    "fuse": ("add", "gate", "replace"),
    "sub_patch": (1, 2, 4),
    "width": (16, 32),
}
TOKENS = {
    "label": (0, 0, 2),
    "time": (0, 0, 1),
    "start": (0, 1),
    "rows": ("offset", "own"),
    "adaln": (True, True, False),
}
MODEL = {
    "image_size": ((16, 8), (8, 24)),
    "num_classes": (0, 5, 5),
    "learn_variance": (False, True),
    "qk_norm": (False, True),
    "time_embed": ("dit", "diffusers", "sit", "ddt", "gauss", "repa"),
    "bottleneck": (0, 5),
    "silu_twice": (False, True),
}


def draw(seed: int) -> dict[str, Any]:
    """Keyword arguments of `small_model`, with the program as `stages`; tokens are those of `TokensConfig`."""
    stream = random.Random(seed)
    share = stream.choice((0.2, 0.5, 1.0))  # of the keys that are set

    def some(table: dict[str, tuple]) -> dict[str, Any]:
        return {key: stream.choice(values) for key, values in table.items() if stream.random() < share}

    groups = {"outer": some(OUTER), "inner": some(INNER), "tokens": some(TOKENS)}
    return {"stages": stream.choice(PROGRAMS), **some(MODEL), **groups}


def built(seed: int, *, small: bool = False) -> ModelConfig:
    """The model of `draw(seed)`; small: with one block a stage. Raises UserError for a set that is refused."""
    keys = draw(seed)
    stages = keys.pop("stages").replace("*2", "") if small else keys.pop("stages")
    return small_model(stages, **keys | {"tokens": TokensConfig(**keys["tokens"])})


def toy(family: str, **keys: Any) -> ModelConfig:
    """A published model at a toy size, on images that are not square, with one inner block or none."""
    model = FAMILIES[family].build().model
    patch = min(model.patch_size, 4)
    inner = replace(model.inner, width=min(model.inner.width, 32), num_heads=min(model.inner.num_heads, 4))
    tokens = replace(model.tokens, label=min(model.tokens.label, 3), start=min(model.tokens.start, 1))
    small = {
        "image_size": (4 * patch, 2 * patch),
        "patch_size": patch,
        "channels": 3,
        "num_classes": 3,
        "tokens": tokens,
    }
    if model.bottleneck:
        small["bottleneck"] = 6
    nested = next(inner_blocks for name, _, inner_blocks, _ in PUBLISHED.values() if name == family)
    return resize(replace(model, inner=inner), (2, 32, 4), min(nested, 1), **small | keys)
