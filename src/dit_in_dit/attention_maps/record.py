"""What `maps` computes: attention, aggregation, contribution and pictures of a trained model, as arrays.

Held-out images with their fixed noise, at chosen times t, under their own label and without guidance. Letters:
N images, K times, T patches, S sub-patches of a patch; a *token* is a sub-patch at the inner level and a patch at the
outer one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, zip_longest
from math import log

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from dit_in_dit.attention_maps.tokens import LevelPlan, MapsPlan, evenly, plan_maps
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import ModelConfig, RunConfig
from dit_in_dit.data.picture import Array
from dit_in_dit.data.source import Source
from dit_in_dit.diffusion.objective import Objective
from dit_in_dit.diffusion.samplers import guided, trajectory
from dit_in_dit.inspection.hooks import (
    attentions,
    can_run_without_inner,
    watch_aggregation,
    watch_contribution,
    watch_heads,
    without_inner,
)
from dit_in_dit.model.layers import attention_weights
from dit_in_dit.model.mixers import PatchMixer
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runtime.seeding import generator
from dit_in_dit.sampling.numbered import class_of, numbered_noise

SEARCHED = 512  # held-out images looked at to find some of each class
MOST_WEIGHTS = 2**22  # attention weights at a time; more leave the cache and are slower
STRIPS = 4  # samples whose way from noise is kept


@dataclass(frozen=True)
class Tokens:
    """Who can see whom at one level.

    Attributes:
        grid: tokens down and across the image.
        per_patch: tokens of one patch, S or 1.
        places: for every group, the tokens in it by their number in the image, row by row, (groups, L);
            those of one patch are neighbours.
        patches: for every group, the patches in it, (groups, L / per_patch).
    """

    grid: tuple[int, int]
    per_patch: int
    places: NDArray[np.int64]
    patches: NDArray[np.int64]

    @property
    def seen(self) -> int:
        """L, tokens that one token sees, itself among them."""
        return self.places.shape[1]

    def distances(self, rows: slice) -> Tensor:
        """Distance in tokens from some of a group's tokens to all of it, (rows, L); the same in every group."""
        y, x = (torch.from_numpy(part).float() for part in np.divmod(self.places[0], self.grid[1]))
        return torch.hypot(y[rows, None] - y, x[rows, None] - x)

    @property
    def even_distance(self) -> float:
        """Mean distance where every token weighs alike."""
        return float(np.mean([self.distances(slice(i, i + 1)).mean() for i in range(self.seen)]))


def outer_tokens(model: ModelConfig) -> Tokens:
    """Every patch sees every patch."""
    numbers = np.arange(model.patches)[None]
    return Tokens(model.grid, 1, numbers, numbers)


def inner_tokens(model: ModelConfig, mixer: PatchMixer) -> Tokens:
    """Groups as the mixer makes them."""
    (h, w), i = model.grid, model.sub_grid
    numbers = rearrange(torch.arange(h * i * w * i), "(h i w j) -> 1 (h w) (i j) 1", h=h, i=i, w=w, j=i)
    patches = torch.arange(h * w)[None, :, None, None].expand(-1, -1, i * i, -1)
    places, owners = (mixer.group(x)[..., 0].numpy() for x in (numbers, patches))
    return Tokens((h * i, w * i), i * i, places, owners[:, :: i * i])


@dataclass(frozen=True)
class LevelAttention:
    """The attention of one level.

    Attributes:
        blocks: names of its blocks.
        entropy: of a query's weights over log(L), mean over the queries of a patch: 1 is all alike, 0 one token;
            (N, K, layers, heads, T).
        own: weight of a query on itself, likewise.
        distance: mean distance to what it sees, in tokens, likewise.
        average: weights among the tokens of one patch, mean over images and patches, (K, layers, heads, S, S).
        squares: mean square of those weights, over times too, (layers, heads).
        plan: which layers and heads the rest holds, for the plan's images and times (n, k, layers, heads or 1, ...).
        received: weights that a token gets from all that see it; the mean is 1; (..., tokens of the image).
        inside: weights among the tokens of each patch, (..., T, S, S); empty where S is 1.
        reach: mean weights of a patch's queries on the tokens of their group, (..., T, L); empty where L is S.
    """

    blocks: tuple[str, ...]
    tokens: Tokens
    entropy: Array
    own: Array
    distance: Array
    average: Array
    squares: Array
    plan: LevelPlan
    received: Array
    inside: Array
    reach: Array

    def variance(self) -> dict[str, float]:
        """What the variance of the weights inside a patch is made of, shares that sum to one, all layers and heads.

        position: between pairs of sub-patches; time: between times, for the same pair; content: between patches and
        images, for the same pair and time. All zero where all weights are alike.
        """
        mean = self.average.mean(0)  # layers heads S S
        total = (self.squares - mean.mean((-2, -1)) ** 2).sum()
        position, time = mean.var((-2, -1)).sum(), self.average.var(0).mean((-2, -1)).sum()
        parts = {"position": position, "time": time, "content": total - position - time}
        return {name: float(part / max(total, 1e-12)) for name, part in parts.items()}


@dataclass(frozen=True)
class Aggregation:
    """What the sub-patches weigh when a patch's token is made of them.

    Attributes:
        position: by position in the patch, mean over images and patches, (K, heads, S).
        maps: per patch, mean over the heads, (N, K, T, S).
    """

    position: Array
    maps: Array


@dataclass(frozen=True)
class Draws:
    """Samples with the inner path on and off, and how some came about.

    Attributes:
        labels: (M,).
        on, off: samples (M, C, H, W) of the same noise; `off` is None where nothing is left without the inner path.
        times: of the calls of the network, (calls,).
        noisy, estimate: x_t and the image that the prediction amounts to, (calls, STRIPS, C, H, W).
    """

    labels: tuple[int, ...]
    on: Array
    off: Array | None
    times: tuple[float, ...]
    noisy: Array
    estimate: Array


@dataclass(frozen=True)
class Views:
    """What is looked at: images (N, C, H, W) with their noise, labels and numbers, and times."""

    split: str
    numbers: tuple[int, ...]
    labels: tuple[int, ...]
    images: Array
    noise: Array
    times: tuple[float, ...]


@dataclass(frozen=True)
class Maps:
    """All that was seen.

    Attributes:
        noisy, estimate: x_t and the model's image estimate, (N, K, C, H, W).
        without: the estimate at the same x_t when the inner path adds nothing; None where nothing is left.
        inner: None where inner tokens do not attend.
        aggregation: by place in the model; empty where inner tokens never join the outer ones.
        contribution: the inner path's share of each patch, by place, (N, K, T); see `watch_contribution`.
    """

    config: RunConfig
    views: Views
    plan: MapsPlan
    noisy: Array
    estimate: Array
    without: Array | None
    inner: LevelAttention | None
    outer: LevelAttention
    aggregation: dict[str, Aggregation]
    contribution: dict[str, Array]
    draws: Draws


def choose(source: Source, config: RunConfig, num: int, times: Sequence[float], classes: Sequence[int] = ()) -> Views:
    """`num` held-out images (training images where none is held out) of classes that take turns.

    Args:
        classes: class numbers; empty: all, evenly picked where there are more than images.
    """
    split, size = ("held-out", source.held_out_size) if source.held_out_size else ("training", source.train_size or 0)
    get = source.held_out if split == "held-out" else source.train
    by_class: dict[int, list[int]] = {}
    for i in evenly(tuple(range(size)), SEARCHED):
        by_class.setdefault(get(i)[1] if config.model.num_classes else 0, []).append(i)
    present = tuple(c for c in sorted(by_class) if not classes or c in classes)
    if not present:
        raise UserError(f"--classes: no {split} image of them in {config.data.source}; choose others")
    turns = zip_longest(*(by_class[c] for c in evenly(present, num)))
    numbers = tuple(i for i in chain.from_iterable(turns) if i is not None)[:num]
    drawn = [get(i) for i in numbers]
    # Noise i of the held-out error that training logs.
    noise = [generator(0, "held_out", i).standard_normal(drawn[0][0].shape, np.float32) for i in numbers]
    labels = tuple(y if config.model.num_classes else 0 for _, y in drawn)
    return Views(split, numbers, labels, np.stack([x for x, _ in drawn]), np.stack(noise), tuple(times))


@torch.inference_mode()
def record_maps(
    model: NestedDiT,
    config: RunConfig,
    views: Views,
    *,
    samples: int,
    seed: int = 0,
    classes: Sequence[int] = (),
    advance: Callable[[], None] = lambda: None,
) -> Maps:
    """Look at the model, one image at one time after another, so that memory holds one block's weights of one image.

    Args:
        samples: how many are drawn with the inner path on and off; numbered and seeded as by `sample_batches`.
        advance: called after each image at each time, and after each call of the network while sampling.

    Raises:
        UserError: the model gives numbers that are not finite.
    """
    objective, device = Objective(config.diffusion), next(model.parameters()).device
    plan = plan_maps(config.model, len(views.images), len(views.times))
    levels = _Levels(model, plan, len(views.images), len(views.times))
    shape = (len(views.images), len(views.times))
    pictures = {name: np.zeros((*shape, *views.images.shape[1:]), np.float32) for name in ("noisy", "on", "off")}
    shares: dict[str, Array] = {}
    pooled: dict[str, Aggregation] = {}
    off = can_run_without_inner(model)
    for n, k in np.ndindex(shape):
        x, noise = (torch.from_numpy(part[n : n + 1]).to(device) for part in (views.images, views.noise))
        t = objective.path.snap(torch.full((1,), views.times[k], device=device))
        y = torch.tensor(views.labels[n : n + 1], device=device)
        levels.at = n, k
        with (
            watch_heads(model, levels.look),
            watch_aggregation(model) as weights,
            watch_contribution(model) as contribution,
        ):
            x_t, estimate = objective.estimate(model, x, noise, t, y)
        if not estimate.isfinite().all():
            raise UserError(
                f"the model's output is not finite at t={views.times[k]:g}: run `dit-in-dit doctor` on the run"
            )
        pictures["noisy"][n, k], pictures["on"][n, k] = x_t[0].cpu().numpy(), estimate[0].cpu().numpy()
        if off:
            with without_inner(model):
                pictures["off"][n, k] = objective.estimate(model, x, noise, t, y)[1][0].cpu().numpy()
        for name, share in contribution.items():
            shares.setdefault(name, np.zeros((*shape, config.model.patches), np.float32))[n, k] = share[0].cpu().numpy()
        for name, weight in weights.items():
            _pool(pooled, name, weight[0].float().cpu().numpy(), shape, (n, k))
        advance()
    inner, outer = levels.finish()
    return Maps(
        config=config,
        views=views,
        plan=plan,
        noisy=pictures["noisy"],
        estimate=pictures["on"],
        without=pictures["off"] if off else None,
        inner=inner,
        outer=outer,
        aggregation=pooled,
        contribution=shares,
        draws=draw_on_and_off(model, config, samples, seed=seed, classes=classes, advance=advance),
    )


def _pool(
    pooled: dict[str, Aggregation], name: str, weights: Array, shape: tuple[int, int], at: tuple[int, int]
) -> None:
    """Take in one image's aggregation weights (T, heads, S)."""
    patches, heads, sub = weights.shape
    if name not in pooled:
        empty = np.zeros((shape[1], heads, sub), np.float32)
        pooled[name] = Aggregation(empty, np.zeros((*shape, patches, sub), np.float32))
    pooled[name].position[at[1]] += weights.mean(0) / shape[0]
    pooled[name].maps[at] = weights.mean(1)


# --------------------------------------------------------------------------------------- attention


class _Levels:
    """Takes in the attention of one block, image and time after another."""

    def __init__(self, model: NestedDiT, plan: MapsPlan, images: int, times: int) -> None:
        self.plan, self.at = plan, (0, 0)
        self.levels: dict[str, LevelAttention] = {}
        modules = attentions(model)
        for name, kept in (("inner", plan.inner), ("outer", plan.outer)):
            blocks = tuple(block for block in modules if block.startswith(name))
            if not blocks:
                continue
            first = modules[blocks[0]]
            config = model.config
            tokens = inner_tokens(config, first) if isinstance(first, PatchMixer) else outer_tokens(config)
            self.levels[name] = _empty(blocks, first.num_heads, tokens, config.patches, kept, plan, (images, times))

    def look(self, block: str, q: Tensor, k: Tensor) -> None:
        """Queries and keys (1, groups, heads, L, d) of one block."""
        level, (n, t) = self.levels[block[: len("inner")]], self.at
        layer = level.blocks.index(block)
        images, times, layers = self.plan.images, self.plan.times, level.plan.layers
        kept = n in images and t in times and layer in layers
        seen = measure_attention(q[0], k[0], level.tokens, matrices=kept and level.plan.matrices)
        here = n, t, layer
        level.entropy[here], level.own[here], level.distance[here] = seen.entropy, seen.own, seen.distance
        level.average[t, layer] += seen.average / len(level.entropy)
        level.squares[layer] += seen.squares / level.entropy[..., 0, 0, 0].size
        if kept:
            place = images.index(n), times.index(t), layers.index(layer)
            for held, part in ((level.received, seen.received), (level.inside, seen.inside), (level.reach, seen.reach)):
                if held.size:
                    held[place] = part if level.plan.heads else part.mean(0, keepdims=True)

    def finish(self) -> tuple[LevelAttention | None, LevelAttention]:
        """Both levels."""
        return self.levels.get("inner"), self.levels["outer"]


def _empty(
    blocks: tuple[str, ...],
    heads: int,
    tokens: Tokens,
    patches: int,
    kept: LevelPlan,
    plan: MapsPlan,
    shape: tuple[int, int],
) -> LevelAttention:
    layers, s = len(blocks), tokens.per_patch
    all_ = (*shape, layers, heads, patches)
    few = (len(plan.images), len(plan.times), len(kept.layers), heads if kept.heads else 1)

    def zeros(*shape: int) -> Array:
        return np.zeros(shape, np.float32)

    return LevelAttention(
        blocks=blocks,
        tokens=tokens,
        entropy=zeros(*all_),
        own=zeros(*all_),
        distance=zeros(*all_),
        average=zeros(shape[1], layers, heads, s, s),
        squares=zeros(layers, heads),
        plan=kept,
        received=zeros(*few, tokens.grid[0] * tokens.grid[1]),
        inside=zeros(*few, patches, s, s) if kept.matrices and s > 1 else zeros(0),
        reach=zeros(*few, patches, tokens.seen) if kept.matrices and tokens.seen > s else zeros(0),
    )


@dataclass(frozen=True)
class AttentionMeasures:
    """One block's attention in one image.

    `entropy`, `own`, `distance` (heads, T), `received` (heads, tokens of the image), `average` (heads, S, S) over
    patches and `squares` (heads,), then, where asked for, `inside` (heads, T, S, S) and `reach` (heads, T, L);
    see `LevelAttention`.
    """

    entropy: Array
    own: Array
    distance: Array
    received: Array
    average: Array
    squares: Array
    inside: Array
    reach: Array


def measure_attention(q: Tensor, k: Tensor, tokens: Tokens, *, matrices: bool = True) -> AttentionMeasures:
    """From queries and keys (groups, heads, L, d), with `MOST_WEIGHTS` weights in memory at a time."""
    groups, heads, length, _ = q.shape
    s, patches = tokens.per_patch, tokens.patches.size

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=q.device)

    entropy, own, distance = (zeros(groups, heads, length // s) for _ in range(3))
    received, average, squares = zeros(groups, heads, length), zeros(heads, s, s), zeros(heads)
    inside, reach = (zeros(groups, heads, length // s, *rest) if matrices else zeros(0) for rest in ((s, s), (length,)))
    for at, rows in _chunks(groups, heads, length, s):
        weights = attention_weights(q[at, :, rows].float(), k[at].float())  # groups heads rows L
        received[at] += weights.sum(-2)
        here = at, slice(None), slice(rows.start // s, rows.stop // s)
        of_patch = rearrange(weights, "g h (b s) l -> g h b s l", s=s)
        entropy[here] = torch.special.entr(of_patch).sum(-1).mean(-1) / log(max(length, 2))
        own[here] = rearrange(weights.diagonal(rows.start, 2, 3), "g h (b s) -> g h b s", s=s).mean(-1)
        away = tokens.distances(rows).to(weights)
        distance[here] = torch.einsum("ghbsl,bsl->ghb", of_patch, away.view(-1, s, length)) / s
        keys = rearrange(of_patch, "g h b s (c u) -> g h b s c u", u=s)
        blocks = keys.diagonal(rows.start // s, 2, 4)  # groups heads S S patches: weights within each patch
        average += blocks.sum((0, -1)) / patches
        squares += blocks.square().sum((0, 2, 3, 4)) / (patches * s * s)
        if matrices:
            inside[here], reach[here] = blocks.movedim(-1, 2), of_patch.mean(3)

    def in_order(found: Tensor, numbers: NDArray[np.int64]) -> Array:
        """(groups, heads, L or L / S, ...) -> (heads, tokens or patches of the image, ...)."""
        return found.transpose(0, 1).flatten(1, 2)[:, np.argsort(numbers.ravel())].cpu().numpy()

    return AttentionMeasures(
        entropy=in_order(entropy, tokens.patches),
        own=in_order(own, tokens.patches),
        distance=in_order(distance, tokens.patches),
        received=in_order(received, tokens.places),
        average=average.cpu().numpy(),
        squares=squares.cpu().numpy(),
        inside=in_order(inside, tokens.patches) if matrices else inside.numpy(force=True),
        reach=in_order(reach, tokens.patches) if matrices else reach.numpy(force=True),
    )


def _chunks(groups: int, heads: int, length: int, per_patch: int) -> Iterator[tuple[slice, slice]]:
    """Groups and whole patches of queries whose weights fit into `MOST_WEIGHTS`, where one patch's do."""
    fit = max(1, MOST_WEIGHTS // (heads * length**2))
    rows = (
        length
        if heads * length**2 <= MOST_WEIGHTS
        else max(1, MOST_WEIGHTS // (heads * length * per_patch)) * per_patch
    )
    for group in range(0, groups, fit):
        for row in range(0, length, rows):
            yield slice(group, min(group + fit, groups)), slice(row, min(row + rows, length))


# ---------------------------------------------------------------------------------------- sampling


@torch.inference_mode()
def draw_on_and_off(
    model: NestedDiT,
    config: RunConfig,
    num: int,
    *,
    seed: int = 0,
    classes: Sequence[int] = (),
    advance: Callable[[], None] = lambda: None,
) -> Draws:
    """Samples 0 to num - 1, those of `sample_batches`, with the inner path on and off."""
    device, classified = next(model.parameters()).device, config.model.num_classes
    shape = config.model.image_shape
    labels = tuple(class_of(i, classes or range(classified or 1)) for i in range(num))
    y = torch.tensor(labels, device=device) if classified else None
    predict = guided(model, classified, config.sample)
    way = []
    off = None
    for inner_is_on in (True, False) if can_run_without_inner(model) else (True,):
        with nullcontext() if inner_is_on else without_inner(model):
            noise = numbered_noise(seed, range(num), shape, device)
            for call in trajectory(predict, config.diffusion, config.sample, noise, y):
                t, x_t, estimate, after = call
                if inner_is_on:
                    way.append((t, x_t[:STRIPS].cpu().numpy(), estimate[:STRIPS].cpu().numpy()))
                advance()
        if inner_is_on:
            on = after.cpu().numpy()
        else:
            off = after.cpu().numpy()
    times, noisy, estimates = zip(*way, strict=True)
    return Draws(labels, on, off, times, np.stack(noisy), np.stack(estimates))
