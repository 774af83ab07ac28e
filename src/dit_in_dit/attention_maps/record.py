"""The recording pass of `maps`: attention, aggregation, contribution and image estimates of a trained model.

The model runs on held-out images with fixed noise, at given times t, with the images' own labels and without guidance.
Letters: N images, K times, T patches, S sub-patches per patch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
import torch
from torch import Tensor

from dit_in_dit.attention_maps.attention import LevelAttention, LevelRecorder, level_recorders
from dit_in_dit.attention_maps.plan import MapsPlan, evenly_chosen, plan_maps
from dit_in_dit.attention_maps.samples import OnOffSamples, draw_on_and_off
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig
from dit_in_dit.data.picture import Array
from dit_in_dit.data.source import Source
from dit_in_dit.diffusion.objective import Objective
from dit_in_dit.inspection import hooks
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runtime.seeding import generator

SEARCHED = 512  # most held-out images that are read to find some of each class


@dataclass(frozen=True)
class Aggregation:
    """Weights of the sub-patches in the aggregation of their patch."""

    position: Array  # by position in the patch, mean over images and patches, (K, heads, S)
    maps: Array  # per patch, mean over heads, (N, K, T, S)


@dataclass(frozen=True)
class Views:
    """Inputs of the recording pass: images (N, C, H, W) with their noise, labels and numbers, and K times."""

    split: str
    numbers: tuple[int, ...]
    labels: tuple[int, ...]
    images: Array
    noise: Array
    times: tuple[float, ...]


@dataclass(frozen=True)
class Maps:
    """All recordings of one model.

    Attributes:
        noisy, estimate: x_t and the model's image estimate, (N, K, C, H, W).
        without: the estimate at the same x_t without the inner path; None if the model cannot run without it.
        inner: None if inner tokens do not attend to each other.
        aggregation: by name of the aggregate; empty if inner tokens never join the outer tokens.
        contribution: the inner path's share of each patch, by name, (N, K, T); see `watch_contribution`.
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
    draws: OnOffSamples

    def __repr__(self) -> str:
        entropies = [f"{level.blocks[0]} {level.entropy.mean():.3f}" for level in (self.inner, self.outer) if level]
        return f"maps of {len(self.views.images)} images, t={self.views.times}; attention entropy of {entropies}"


def choose(source: Source, config: RunConfig, num: int, times: Sequence[float], classes: Sequence[int] = ()) -> Views:
    """Choose `num` held-out images, or training images if none is held out; the classes alternate.

    Without `classes`: all, or evenly spaced classes if there are more than images. UserError if none has an image.
    """
    split, size = ("held-out", source.held_out_size) if source.held_out_size else ("training", source.train_size or 0)
    get = source.held_out if split == "held-out" else source.train
    by_class: dict[int, list[int]] = {}
    for i in evenly_chosen(range(size), SEARCHED):
        by_class.setdefault(get(i)[1] if config.model.num_classes else 0, []).append(i)
    present = tuple(c for c in sorted(by_class) if not classes or c in classes)
    if not present:
        raise UserError(f"--classes: {config.data.source} has no {split} image of these classes; choose others")
    turns = zip_longest(*(by_class[c] for c in evenly_chosen(present, num)))
    numbers = tuple(i for i in chain.from_iterable(turns) if i is not None)[:num]
    examples = [get(i) for i in numbers]
    # The noise of image i is that of the held-out error in the training log.
    noise = [generator(0, "held_out", i).standard_normal(examples[0][0].shape, np.float32) for i in numbers]
    labels = tuple(y if config.model.num_classes else 0 for _, y in examples)
    return Views(split, numbers, labels, np.stack([x for x, _ in examples]), np.stack(noise), tuple(times))


@dataclass(frozen=True)
class _Pass:
    """Recordings of one image at one time: as in `Maps`, without N and K."""

    noisy: Array
    estimate: Array
    without: Array | None
    contribution: dict[str, Array]
    aggregation: dict[str, Aggregation]


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
    """Run the model on one image and one t per pass, so that memory holds the weights of one block and image.

    `samples` is the number of samples to generate with the inner path on, then off, seeded as by `sample_batches`;
    `advance` is called after each image at each time, and after each sampler step. UserError if the model's output is
    not finite.
    """
    shape = len(views.images), len(views.times)
    plan = plan_maps(config.model, *shape)
    recorders, passes = level_recorders(model, plan, shape), []
    for n, k in np.ndindex(shape):
        passes.append(_record(model, Objective(config.diffusion), views, n, k, recorders))
        advance()

    def stack(arrays: Sequence[Array]) -> Array:
        return np.stack(arrays).reshape(*shape, *arrays[0].shape)

    def aggregation(name: str) -> Aggregation:
        position = stack([one.aggregation[name].position for one in passes])
        return Aggregation((position / shape[0]).sum(0), stack([one.aggregation[name].maps for one in passes]))

    without = [one.without for one in passes if one.without is not None]
    return Maps(
        config=config,
        views=views,
        plan=plan,
        noisy=stack([one.noisy for one in passes]),
        estimate=stack([one.estimate for one in passes]),
        without=stack(without) if without else None,
        inner=recorders["inner"].result() if "inner" in recorders else None,
        outer=recorders["outer"].result(),
        aggregation={name: aggregation(name) for name in passes[0].aggregation},
        contribution={name: stack([one.contribution[name] for one in passes]) for name in passes[0].contribution},
        draws=draw_on_and_off(model, config, samples, seed=seed, classes=classes, advance=advance),
    )


def _record(
    model: NestedDiT, objective: Objective, views: Views, n: int, k: int, recorders: dict[str, LevelRecorder]
) -> _Pass:
    """Run the model on image n at time k under hooks; the recorders measure each block's attention."""

    def look(block: str, queries: Tensor, keys: Tensor) -> None:
        if recorder := recorders.get(block[: len("inner")]):
            recorder.add(block, queries, keys, n, k)

    device = next(model.parameters()).device
    x, noise = (torch.from_numpy(part[n : n + 1]).to(device) for part in (views.images, views.noise))
    t = objective.path.snap(torch.full((1,), views.times[k], device=device))
    y = torch.tensor(views.labels[n : n + 1], device=device)
    aggregated, contributed = hooks.watch_aggregation(model), hooks.watch_contribution(model)
    with hooks.watch_heads(model, look), aggregated as weights, contributed as contribution:
        x_t, estimate = objective.estimate(model, x, noise, t, y)
    if not estimate.isfinite().all():
        raise UserError(f"the model's output is not finite at t={views.times[k]:g}: run `dit-in-dit doctor` on the run")
    without = None
    if hooks.can_run_without_inner(model):
        with hooks.without_inner(model):
            without = objective.estimate(model, x, noise, t, y)[1][0].cpu().numpy()
    arrays = {name: weight[0].float().cpu().numpy() for name, weight in weights.items()}  # T heads S
    return _Pass(
        noisy=x_t[0].cpu().numpy(),
        estimate=estimate[0].cpu().numpy(),
        without=without,
        contribution={name: share[0].cpu().numpy() for name, share in contribution.items()},
        aggregation={name: Aggregation(array.mean(0), array.mean(1)) for name, array in arrays.items()},
    )
