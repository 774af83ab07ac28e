"""What the figure of a model shows: stages, token shapes, who sees whom, and what each part costs."""

from __future__ import annotations

from dit_in_dit.config.program import Program
from dit_in_dit.config.run import ModelConfig
from dit_in_dit.inspection.cost import macs, parameters
from dit_in_dit.inspection.diagram_svg import Box, Cost, Join, Repeat, Row, Theme, figure_svg

LEAST_REPEATS = 3  # of two stages, from which on they are drawn once
SEES = {  # mixers, in words
    "patch": "attention in each patch",
    "window": "attention in windows of {window}x{window} patches",
    "image": "attention over the whole image",
    "conv": "3x3 convolution, across patches",
    "compact": "attention over patches, one token each",
    "none": "no mixing: an MLP for each sub-patch",
}
READS = {  # conditions, in words
    "image": "adaLN from c",
    "patch": "adaLN from c + patch token",
    "sub_patch": "adaLN from a vector per sub-patch",
    "outer": "adaLN from outer tokens",
    "outer_sub_patch": "adaLN from outer tokens, per sub-patch",
    "outer_per_block": "adaLN from outer tokens, per block",
}


def draw_model(model: ModelConfig, *, theme: Theme, title: str) -> str:
    """The figure of a model, as SVG text."""
    counted, weights = macs(model), parameters(model)
    parts = [part for part in dict.fromkeys((*weights, *counted)) if part != "total"]
    costs = [Cost(part, weights.get(part, 0), counted.get(part, 0)) for part in parts]
    under = f"{_short(weights['total'])} parameters, {_short(counted['total'])} MACs per image (1 MAC = 2 FLOPs)"
    costs = [cost for cost in costs if cost.parameters or cost.macs]
    return figure_svg(model_rows(model), costs, title=title, under=under, theme=theme)


def fold_program(program: Program) -> tuple[Program, Program, int, Program]:
    """(before, unit, times, after): two stages that repeat `LEAST_REPEATS` times or more, as often as possible. Where
    nothing repeats, the unit is the whole program, once."""
    best: tuple[Program, Program, int, Program] = ((), program, 1, ())
    for start in range(len(program) - 1):
        unit, times = program[start : start + 2], 1
        while program[start + 2 * times : start + 2 * times + 2] == unit:
            times += 1
        if times >= LEAST_REPEATS and times > best[2]:
            best = (program[:start], unit, times, program[start + 2 * times :])
    return best


def model_rows(model: ModelConfig) -> list[Row]:
    """The rows of the figure from top to bottom."""
    size, inner = "x".join(map(str, model.image_size)), model.inner
    image = Box("image", f"noisy image x_t, {model.channels} x {size}", ("noise t and class: the vector c",))
    rows: list[Row] = [(image,), _embeddings(model)]
    before, unit, times, after = fold_program(model.program)
    previous = ""
    for part, repeat in ((before, 1), (unit, times), (after, 1)):
        rows += [Repeat(repeat)] if repeat > 1 else []
        for level, count in part:
            # Where a unit repeats, its first stage follows its last one too.
            follows = previous or (part[-1][0] if repeat > 1 else "")
            if (follows, level) == ("outer", "inner"):
                words = "condition only" if inner.spread == "none" else f"spread: {inner.spread}"
                rows.append(Join("inner", words if previous else f"{words}, from the second time on"))
            elif (follows, level) == ("inner", "outer"):
                rows.append(Join("outer", f"aggregate: {inner.aggregate}, fuse: {inner.fuse}"))
            rows.append((_stage(model, level, count),))
            previous = level
        rows += [Repeat(0)] if repeat > 1 else []
    heads = _heads(model)
    what = "prediction and variance" if model.learn_variance else "prediction"
    both = ("the sum of both heads",) if len(heads) > 1 else ()
    return [*rows, heads, (Box("image", f"{what}, {model.out_channels} x {size}", both),)]


def _embeddings(model: ModelConfig) -> tuple[Box, ...]:
    inner, side = model.inner, f"{model.patch_size}x{model.patch_size}"
    outer = Box("outer", "patch embedding", (f"{model.patches} x {model.outer.width}", f"patches of {side} pixels"))
    if not model.blocks("inner"):
        return (outer,)
    shape, cut = f"{model.patches} x {model.sub_patches} x {inner.width}", f"{inner.sub_patch}x{inner.sub_patch}"
    return outer, Box("inner", f"sub-patch embedding: {inner.embed}", (shape, f"sub-patches of {cut} pixels"))


def _stage(model: ModelConfig, level: str, count: int) -> Box:
    own, outer = (model.outer, True) if level == "outer" else (model.inner, False)
    parts = [own.norm, own.mlp] + [f"rope {own.rope}"] * (own.rope != "none") + ["QK-norm"] * model.qk_norm
    blocks = f"{count} {level} block{'s' if count > 1 else ''}"
    if outer:
        more = f" + {model.tokens.count} tokens" if model.tokens.count else ""
        adaln = ["adaLN from c"] * (model.outer.modulation != "none")
        lines = (f"attention over {model.patches} patches{more}", ", ".join((*parts, *adaln)))
        return Box("outer", f"{blocks}, {model.patches} x {own.width}", lines, "outer")
    mixer, condition = str(model.inner.mixer), str(model.inner.condition)
    sees = SEES.get(mixer, f"mixer: {mixer}").format(window=model.inner.window)
    reads = READS.get(condition, f"condition: {condition}")
    shape = f"{model.patches} x {model.sub_patches} x {own.width}"
    return Box("inner", f"{blocks}, {shape}", (sees, ", ".join((*parts, reads))), mixer)


def _heads(model: ModelConfig) -> tuple[Box, ...]:
    channels, side = model.out_channels, model.inner.sub_patch
    outer = Box("outer", "outer head", (f"{model.patches} x {model.patch_size**2 * channels} numbers",))
    if model.program[-1][0] == "outer":
        return (outer,)
    inner = Box("inner", "inner head", (f"{model.patches} x {model.sub_patches} x {side**2 * channels} numbers",))
    return (inner,) if model.inner.fuse == "replace" else (outer, inner)


def _short(number: float) -> str:
    """12,345,678 as 12.3 M."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:g}"
