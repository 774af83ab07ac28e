"""What the figure of a model shows: stages, token shapes, who sees whom, and what each part costs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from dit_in_dit.config.model import InnerConfig, ModelConfig, OuterConfig
from dit_in_dit.config.program import Program
from dit_in_dit.config.token_drop import TokenDrop
from dit_in_dit.inspection.cost import macs, parameters, stage_macs
from dit_in_dit.inspection.diagram_svg import (
    TEXT_ROOM,
    Box,
    Cost,
    Join,
    Lane,
    Repeat,
    Row,
    Theme,
    figure_svg,
    format_share,
    text_width,
)

LEAST_REPEATS = 3  # of a group of stages, from which on it is drawn once
SEES = {  # mixers, in words
    "patch": "attention in each patch",
    "window": "attention in {window}x{window} patches",
    "image": "attention over the whole image",
    "conv": "3x3 convolution, across patches",
    "compact": "attention over patches, one token each",
    "none": "no mixing: an MLP per sub-patch",
}
READS = {  # conditions, in words
    "image": "c",
    "patch": "c + patch token",
    "sub_patch": "c + patch token, per sub-patch",
    "outer": "t + patch token",
    "outer_sub_patch": "t + patch token, per sub-patch",
    "outer_per_block": "t + patch token, per block",
}
NORMS = {"layer": "LayerNorm", "layer_affine": "affine LayerNorm", "rms": "RMSNorm"}
MLPS = {"gelu": "GELU", "gelu_erf": "exact GELU", "silu": "SiLU", "swiglu": "SwiGLU", "hyper": "MLP made from rows"}
ROPES = {"grid": "RoPE", "extent": "RoPE (extent)"}
MODULATIONS = {"block": "adaLN-Zero", "post": "adaLN after branches", "shared": "shared adaLN"}
POSITIONS = {"sincos": "sin-cos position", "learned": "learned position"}


def draw_model(model: ModelConfig, *, theme: Theme, title: str, drop: TokenDrop | None = None) -> str:
    """Draw a model as SVG text; `drop` is token dropping in training, which outer stages mention."""
    outline = Outline(model, drop)
    counted, weights = outline.macs["total"], outline.parameters["total"]
    under = f"{_short(weights)} parameters, {_short(counted)} MACs per image (1 MAC = 2 FLOPs)"
    return figure_svg(outline.rows, outline.costs, title=title, under=under, theme=theme)


def fold_program(program: Program) -> tuple[Program, Program, int, Program]:
    """(before, unit, times, after): the shortest group of stages whose repeats, `LEAST_REPEATS` or more, cover most of
    the program. Where nothing repeats, the unit is the whole program, once."""
    best: tuple[Program, Program, int, Program] = ((), program, 1, ())
    most = 0
    for size in range(2, len(program) // LEAST_REPEATS + 1, 2):  # levels alternate, so that sizes are even
        for start in range(len(program) - size):
            unit, times = program[start : start + size], 1
            while program[start + size * times : start + size * (times + 1)] == unit:
                times += 1
            if times >= LEAST_REPEATS and times * size > most:
                most, best = times * size, (program[:start], unit, times, program[start + size * times :])
    return best


class Outline:
    """Rows of a model's figure from top to bottom, and the cost of each part.

    Raises:
        UserError: the model cannot be built, as with an uncounted number of classes.
    """

    def __init__(self, model: ModelConfig, drop: TokenDrop | None = None) -> None:
        self.model, self.drop = model, drop
        self.macs, self.parameters, self._stage_macs = macs(model), parameters(model), stage_macs(model)
        levels = [level for level, _ in model.program]
        self._changes = list(pairwise(levels))
        self.rows: list[Row] = [(self._image(),), self._embeddings(), *self._stages(), self._heads()]
        self.rows.append((self._prediction(),))

    @property
    def costs(self) -> list[Cost]:
        """Parameters and MACs of each part that has any: embeddings, the parts between, heads."""
        parts = [part for part in dict.fromkeys((*self.macs, *self.parameters)) if part != "total"]
        parts.sort(key=lambda part: 0 if part.endswith(("embed", "token")) else 2 if part.endswith("head") else 1)
        costs = [Cost(part, self.parameters.get(part, 0), self.macs.get(part, 0)) for part in parts]
        return [cost for cost in costs if cost.parameters or cost.macs]

    def _cost(self, weights: float, count: int) -> str:
        share = format_share(count / self.macs["total"])
        return f"{_short(weights)} parameters, {_short(count)} MACs ({share})"

    def _part(self, part: str) -> str:
        return self._cost(self.parameters.get(part, 0), self.macs.get(part, 0))

    def _image(self) -> Box:
        model = self.model
        condition = [f"t ({model.time_embed} embedding)"] + ["class y"] * bool(model.num_classes and model.tokens.adaln)
        condition += [f"{model.augment_labels} augmentation labels"] * bool(model.augment_labels)
        size = ", ".join(map(str, model.image_shape))
        return Box("image", "noisy image x_t", (f"(N, C, H, W) = (N, {size})", f"c = {' + '.join(condition)}"))

    def _embeddings(self) -> tuple[Box, ...]:
        model, inner, side = self.model, self.model.inner, f"{self.model.patch_size}x{self.model.patch_size}"
        notes = [f"patches of {side}", *_named(POSITIONS, model.outer.position)]
        notes += [f"bottleneck {model.bottleneck}"] * bool(model.bottleneck)
        notes += ["replaced before a stage reads them"] * (not model.reads_patches)
        lines = (f"(N, T, D) = (N, {model.patches}, {model.outer.width})", ", ".join(notes))
        outer = Box("outer", "patch embedding", lines, cost=self._part("outer_embed"))
        if not model.blocks("inner"):
            return (outer,)
        shape = f"(N, T, S, E) = (N, {model.patches}, {model.sub_patches}, {inner.width})"
        position = _named(POSITIONS, inner.position)
        if inner.position == "learned" and model.has_inner_sincos:
            position = ["learned + sin-cos position"]
        lines = (shape, ", ".join([f"sub-patches of {inner.sub_patch}x{inner.sub_patch}", *position]))
        return outer, Box("inner", f"sub-patch embedding: {inner.embed}", lines, cost=self._part("inner_embed"))

    def _stages(self) -> Iterator[Row]:
        before, unit, times, after = fold_program(self.model.program)
        place, previous = 0, ""
        for part, repeat in ((before, 1), (unit, times), (after, 1)):
            if repeat > 1:
                yield Repeat(repeat)
            for number, (level, count) in enumerate(part):
                # Where a unit repeats, its first stage also follows its last one.
                follows = previous or (part[-1][0] if repeat > 1 else "")
                if follows and follows != level:
                    yield self._join(follows, level, repeat - (not previous), late=not previous)
                places = range(place + number, place + number + len(part) * repeat, len(part))
                yield (self._stage(level, count, places),)
                previous = level
            place += len(part) * repeat
            if repeat > 1:
                yield Repeat(0)

    def _join(self, start: str, end: str, times: int, *, late: bool) -> Join:
        """The arrow between two levels, which stands for `times` of them; `late`: the first time has none."""
        inner = self.model.inner
        if end == "inner":
            part, words = "spread", "condition only" if inner.spread == "none" else f"spread: {inner.spread}"
        else:
            part, words = "aggregate", f"aggregate: {inner.aggregate}, fuse: {inner.fuse}"
        share = self.macs[part] * times / self._changes.count((start, end)) / self.macs["total"]  # type: ignore[arg-type]
        words += f" ({format_share(share)})" * (share >= 0.0005)
        return Join("inner" if end == "inner" else "outer", words + ", not the first time" * late)

    def _stage(self, level: str, count: int, places: range) -> Box:
        """A run of blocks, at these places of the program."""
        model, outer = self.model, level == "outer"
        config: OuterConfig = model.outer if outer else model.inner
        blocks = f"{count} {level} block{'s' if count > 1 else ''}"
        weights = self.parameters[f"{level}_blocks"] / model.blocks(level) * count * len(places)
        cost = self._cost(weights, sum(self._stage_macs[place] for place in places))
        cost = f"all {len(places)}: {cost}" if len(places) > 1 else cost
        if outer:
            numbers = [self._outer_before(place) for place in places]
            notes = tuple(self._notes(numbers[0], numbers[-1] + count))
            lines = (f"(N, {model.patches}, {config.width})", self._sees_outer(numbers[0], numbers[-1] + count))
            return Box("outer", blocks, (*lines, *_inside(model, config, "c"), *notes), "outer", cost)
        mixer, condition = str(model.inner.mixer), str(model.inner.condition)
        sees = SEES.get(mixer, f"mixer: {mixer}").format(window=model.inner.window)
        sees += f", + {model.tokens.count} tokens" * model.carries_tokens
        inside = _inside(model, config, READS.get(condition, f"condition {condition}"))
        shape = f"(N, {model.patches}, {model.sub_patches}, {config.width})"
        return Box("inner", blocks, (shape, sees, *inside), mixer, cost)

    def _outer_before(self, place: int) -> int:
        """Outer blocks before a place of the program."""
        return sum(count for level, count in self.model.program[:place] if level == "outer")

    def _sees_outer(self, first: int, end: int) -> str:
        """What outer blocks from `first` to before `end` attend to."""
        tokens, words = self.model.tokens, f"attention over {self.model.patches} patches"
        if not tokens.count or tokens.start >= end:
            return words
        kinds = [
            f"{number} {kind} tokens" for kind, number in (("class", tokens.label), ("time", tokens.time)) if number
        ]
        since = f" from outer block {tokens.start + 1} on" if tokens.start > first else ""
        return " + ".join((words, *kinds)) + since

    def _notes(self, first: int, end: int) -> Iterator[str]:
        """Special parts of the outer blocks from `first` to before `end`, as numbered from 0."""
        if (drop := self.drop) and drop.first < end and first <= drop.last:
            low, high = max(first, drop.first) + 1, min(end - 1, drop.last) + 1
            yield f"training: {drop.kept} of {self.model.patches} patches in blocks {low} to {high}"
        if first < self.model.internal_head <= end:
            yield f"internal head after outer block {self.model.internal_head}"

    def _heads(self) -> tuple[Box, ...]:
        model, channels = self.model, self.model.out_channels
        heads: dict[str, tuple[Lane, str]] = {
            "outer": ("outer", f"(N, {model.patches}, {model.patch_size**2 * channels})"),
            "inner": ("inner", f"(N, {model.patches}, {model.sub_patches}, {model.inner.sub_patch**2 * channels})"),
        }
        made = [(name, *heads[name]) for name in model.heads]
        return tuple(Box(lane, f"{name} head", (shape,), cost=self._part(f"{name}_head")) for name, lane, shape in made)

    def _prediction(self) -> Box:
        model, height, width = self.model, *self.model.image_size
        title = "prediction and variance" if model.learn_variance else "prediction"
        notes = ["the sum of both heads"] * (len(model.heads) > 1)
        notes += [f"velocity in a subspace of rank {model.split[0]}, else image"] if model.split else []
        return Box("image", title, (f"(N, {model.out_channels}, {height}, {width})", *notes))


def _inside(model: ModelConfig, level: OuterConfig, reads: str) -> list[str]:
    """Norm, MLP, rotary positions and adaLN of a level's blocks, on one line if they fit."""
    words = [NORMS.get(level.norm, f"norm {level.norm}"), MLPS.get(level.mlp, f"MLP {level.mlp}")]
    if not isinstance(level, InnerConfig) or level.mixer not in ("conv", "none"):  # these have no attention
        words += _named(ROPES, level.rope) + ["QK-norm"] * model.qk_norm
    modulation = MODULATIONS.get(level.modulation, f"modulation {level.modulation}")
    if level.modulation == "none":
        adaln = f"rows: {reads}" if level.reads_rows else "no adaLN"
    else:
        adaln = f"{modulation} from {'c' if level.modulation == 'shared' else reads}"
    line = ", ".join((*words, adaln))
    return [line] if text_width(line) <= TEXT_ROOM else [", ".join(words), adaln]


def _named(words: dict[str, str], name: str) -> list[str]:
    """The words for a choice, its name if it is a user's own, nothing for `none`."""
    return [] if name == "none" else [words.get(name, name)]


def _short(number: float) -> str:
    """12,345,678 as 12.3 M."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:g}"
