"""Rules between the keys of a model (a `ModelConfig`, which imports this module), and choices without effect."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from dit_in_dit.config.choices import keeps_outer, reads_outer, reads_time
from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.program import format_stages


def check_levels(model: Any) -> None:
    """Check the keys of the inner level, and those that concern both levels. Raises UserError."""
    inner, outer, mixer = model.inner, model.outer, model.inner.mixer
    if model.has_inner_sincos and inner.width % 4:
        raise UserError(f"model.inner.width must be a multiple of 4 (position, mixer={mixer}): got {inner.width}")
    level = outer if mixer == "compact" else inner
    inner.check_rope(level.width, level.num_heads)
    equal = f"needs equal widths of both levels: got {inner.width} and {outer.width}"
    if inner.modulation == "shared" and inner.width != outer.width:
        raise UserError(f"model.inner.modulation=shared {equal}")
    if mixer == "window" and any(side % inner.window for side in model.grid):
        raise UserError(f"model.inner.window must divide the patch grid: got {inner.window} for {model.grid}")
    if inner.mlp == "hyper" and inner.condition.endswith("sub_patch") and model.sub_patches > 1:
        raise UserError(f"model.inner.mlp=hyper needs one row per patch: got condition={inner.condition}; set outer")
    if not model.carries_tokens:
        return
    refine = f"model.inner.spread=refine takes the {model.tokens.count} tokens of model.tokens along, and"
    if mixer != "image" or inner.width != outer.width:
        raise UserError(f"{refine} {equal}, and mixer=image: got mixer={mixer}")
    if inner.reads_rows and reads_outer(inner.condition):
        raise UserError(f"{refine} has no row for them: got condition={inner.condition}; set condition=image")
    before = model.program[0][1] if model.program[0][0] == "outer" else 0
    if model.tokens.start >= before:
        raise UserError(f"{refine} needs tokens.start below the {before} first outer blocks: got {model.tokens.start}")


def check_reading(model: Any) -> None:
    """Check that time, class and outer tokens reach the image: each parameter gets a gradient. Raises UserError."""
    inner, tokens, how = model.inner, model.tokens, f"got model.outer.modulation={model.outer.modulation}; set"
    if not _reads_c(model):
        if not (tokens.time or (model.row_stages and reads_time(inner.condition))):
            raise UserError(f"a model must read the time: {how} tokens.time=1 or a head_condition=image")
        if not tokens.label:
            raise UserError(f"a model must read the class: {how} tokens.label=1 or a head_condition=image")
        if tokens.adaln and tokens.rows == "own":
            raise UserError(f"model.tokens.adaln=true needs adaLN of the class: {how} tokens.adaln=false")
    left = model.inner_stages
    for before, level in pairwise(["", *(level for level, _ in model.program)]):
        is_read = inner.spread != "none" or (reads_outer(inner.condition) and left <= model.row_stages)
        if (before, level) == ("outer", "inner") and not (is_read or keeps_outer(inner.fuse)):
            raise UserError(
                f"outer tokens must reach the image: got spread=none, fuse={inner.fuse}, condition={inner.condition}, "
                f"modulation={inner.modulation}; set spread=add or fuse=add, or modulation=block with condition=outer"
            )
        left -= level == "inner"


def weak_head(model: Any) -> str:
    """The head whose predictions are weak: internal, the outer head if another is added to it, or none ("")."""
    return "internal_head" if model.internal_head else "outer_head" if len(model.heads) > 1 else ""


def check_internal_head(model: Any) -> None:
    """Check that an internal head sees fewer blocks than the last head. Raises UserError."""
    most = model.blocks("outer") - (model.program[-1][0] == "outer")
    if model.internal_head > most:
        raise UserError(
            f"model.internal_head must be at most {most}, so that blocks follow it: got {model.internal_head} in "
            f"{truncate(format_stages(model.program), 40)}"
        )


def check_internal_guidance(model: Any, predict: str, weight: float, scale: float) -> None:
    """Check that a weak head is trained where it is used, and used where it is trained. Raises UserError.

    Args:
        weight: train.terms.internal.
        scale: sample.internal_guidance.
    """
    if weight and not weak_head(model):
        raise UserError(
            "train.terms.internal needs a weak head: set model.internal_head, such as to a third of the outer blocks"
        )
    if weight and predict == "split":
        raise UserError("train.terms.internal does not work with diffusion.predict=split: set train.terms.internal=0")
    if model.internal_head and not weight:
        raise UserError(f"model.internal_head={model.internal_head} needs its loss: set train.terms.internal=0.5")
    if scale != 1 and not weight:
        raise UserError(
            f"sample.internal_guidance={scale:g} needs a weak head that was trained as one: give 1, or train with "
            "train.terms.internal=0.5"
        )


def check_augment_labels(model: Any, kind: str, labels: int, styles: int) -> None:
    """Check that a model reads the `labels` of an augmentation and of styles, `styles` of them, and that its images can
    be turned. Raises UserError."""
    also = f", styles have {styles}" if styles else ""
    if labels and model.augment_labels not in (0, labels):
        raise UserError(
            f"data.augment_kind={kind} has {labels - styles} labels{also}: got model.augment_labels="
            f"{model.augment_labels}; set 0"
        )
    if labels > styles and kind == "exact" and model.image_size[0] != model.image_size[1]:
        raise UserError(
            f"data.augment_kind=exact turns images, which must be square: got {list(model.image_size)}; set it to edm"
        )


def _reads_c(model: Any) -> bool:
    """Whether anything reads c, the embedding of time and class."""
    inner, outer = model.inner, model.outer
    shared = "shared" in (outer.modulation, model.inner_stages and inner.modulation)
    spreads = ("outer", "inner") in pairwise(level for level, _ in model.program)
    return (
        outer.reads_rows
        or shared
        or any(getattr(model, name).head_condition == "image" for name in model.heads)
        or bool(model.row_stages and not reads_time(inner.condition))
        or (spreads and inner.spread not in ("add", "none", "refine"))
    )


def unused_choices(model: Any) -> dict[str, str]:
    """Keys of a model that have no effect, with the reason; in a plain model, none of the inner group is named."""
    inner, steps = model.inner, set(pairwise(level for level, _ in model.program))
    where = f"in {truncate(format_stages(model.program), 40)}"
    no_attention = inner.mixer in ("conv", "none") and f"mixer={inner.mixer} has no attention"
    reasons: dict[str, str | bool] = {
        "inner.aggregate": ("inner", "outer") not in steps and f"no outer stage follows an inner stage {where}",
        "inner.spread": ("outer", "inner") not in steps and f"no inner stage follows an outer stage {where}",
        "inner.condition": not model.row_stages and "neither blocks nor head read conditioning rows",
        "inner.rope": no_attention,
        "inner.bias": inner.bias == "mlp" and no_attention,
        "bottleneck": not model.reads_patches and "no stage reads the embedded patches",
        "silu_twice": not _reads_c(model) and "no adaLN reads time and class",
        "tokens.start": not model.tokens.count and "there are no tokens of time and class",
        "tokens.rows": not model.tokens.label and "there are no class tokens",
    }
    for level in ("outer", "inner"):
        no_head = level not in model.heads and f"there is no {level} head {where}"
        shared = getattr(model, level).modulation == "shared" and "modulation=shared drives the head"
        reasons |= {f"{level}.head_norm": no_head, f"{level}.head_condition": no_head or shared}
    unused = {key: str(why) for key, why in reasons.items() if why}
    return unused if model.inner_stages else {key: why for key, why in unused.items() if key[:6] != "inner."}
