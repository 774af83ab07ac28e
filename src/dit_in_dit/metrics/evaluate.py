"""Evaluation of images: `metrics.json` gets every score with its protocol. A killed evaluation can be resumed."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dit_in_dit import __version__
from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.run import RunConfig
from dit_in_dit.data.formats.mosaic import Mosaic
from dit_in_dit.data.sources import open_source
from dit_in_dit.data.summary import SIDE, thumbnails
from dit_in_dit.diffusion.objective import Objective
from dit_in_dit.metrics import detail, pixels
from dit_in_dit.metrics.classifier import STEPS, LabelledImages, find_classifier, held_out_part
from dit_in_dit.metrics.classifier_scores import classifier_scores
from dit_in_dit.metrics.feature_distances import ReferenceStatistics
from dit_in_dit.metrics.feature_networks import Network, to_rgb
from dit_in_dit.metrics.fid_family import Features, feature_scores
from dit_in_dit.metrics.memorization import NEAR, Neighbours, neighbours
from dit_in_dit.metrics.metric import plugin_scores
from dit_in_dit.metrics.score import DRAWS, FLOOR_SPLITS, RESAMPLES, Score
from dit_in_dit.metrics.subject import Draw, RealImages, Subject
from dit_in_dit.metrics.wasserstein import POINTS, PROJECTIONS
from dit_in_dit.model.compiled import is_compiled
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.reporting.images import Pixels, to_floats
from dit_in_dit.runs import atomic, shards
from dit_in_dit.runtime.precision import FULL, use_full_float32
from dit_in_dit.runtime.process import is_main
from dit_in_dit.runtime.seeding import generator
from dit_in_dit.training.batches import held_out_batch

PIXELS_AT_ONCE = 2**28  # most values per set of images that the pixel metrics hold in memory
SHOWN = 64  # images in a figure
SCALES = ("guidance", "guide_scale", "internal_guidance")  # of guidance, in the protocol
DETAIL_IMAGES = 64
DETAIL_TIMES = (0.5, 0.8)

Stored = tuple[Network, Features, Features]  # a network, and its features of samples and of real images


@dataclass(frozen=True)
class Progress:
    """Progress of a part of an evaluation, in images."""

    part: str
    done: int
    total: int


@dataclass(frozen=True)
class Evaluation:
    """The content of `metrics.json`, and the images that figures show."""

    result: dict[str, Any]
    images: Pixels  # the images that the pixel metrics compare
    real: Pixels  # real images, twice as many
    near: Neighbours
    nearest: Pixels  # the samples nearest to training images, nearest first
    nearest_real: Pixels  # the training image nearest to each


def evaluate(
    subject: Subject,
    real: RealImages,
    out: Path,
    num: int,
    *,
    batch: int = 64,
    networks: tuple[Network, ...] = (),
    statistics: ReferenceStatistics | None = None,
    real_features: Path | None = None,
    classify: bool = False,
) -> Iterator[Progress | Evaluation]:
    """Evaluate the first `num` images into `out/metrics.json`; yields the progress, then the evaluation.

    `out` also stores samples, in chunks of the run's `sample.micro_batch`, and features, in chunks of `batch`. Each
    chunk is computed once, by any number of processes. Only process 0 computes scores and yields the evaluation.

    Args:
        networks: feature networks of the standard metrics; empty: no standard metric.
        statistics: Inception statistics that replace those of `real` in FID and sFID.
        real_features: `features` of another evaluation with the same `batch`, to share those of real images.
        classify: also score samples by a classifier of the real images, which is trained if none is stored.

    UserError if there are too few images, `out` holds another evaluation, or a user's metric fails.
    """
    _check_subject(subject, real, num, classify=classify)
    use_full_float32()
    at_once = _at_once(subject, batch)
    shards.claim_folder(out / "identity.json", _identity(subject, at_once))
    if subject.config is not None:
        size = subject.config.sample.micro_batch
        for done in shards.fill_shards(out / "samples", num, size, lambda part: {"images": subject.draw(part)}):
            yield Progress("samples", done, num)
    draw = images_of(subject, out, num)
    stored = [_stored(network, num, real, out / "features", real_features, batch) for network in networks]
    for network, own, reals in stored:
        yield from _extract(network, draw, own, "samples")
        yield from _extract(network, real.draw, reals, "real images")
    if not is_main():
        return
    yield Progress("pixel metrics", 0, 1)
    result = (evaluation := _measure_pixels(subject, draw, real, num)).result
    yield Progress("pixel metrics", 1, 1)
    yield from _add_scores(result, stored, statistics)
    if classify:
        yield from _classify(result, subject, draw, real, num)
    result["made with"] |= at_once
    atomic.write_atomic(out / "metrics.json", json.dumps(result, indent=1) + "\n")
    yield evaluation


def _at_once(subject: Subject, batch: int) -> dict[str, int | None]:
    """Sizes of batches, and compilation, on which last bits depend."""
    sizes = {"batch": batch, "micro_batch": subject.config.sample.micro_batch if subject.config else None}
    compiled = subject.model is not None and is_compiled(subject.model)
    return {**sizes, "compiled": True} if compiled else sizes


def _check_subject(subject: Subject, real: RealImages, num: int, *, classify: bool) -> None:
    if subject.count is not None and subject.count < num:
        raise UserError(f"--num must be at most the {subject.count} images of {subject.about['name']}: got {num}")
    if num < 2 or real.count < 4:
        raise UserError(f"metrics need at least 2 generated and 4 real images: got {num} and {real.count}")
    if classify:
        _check_classes(subject, real)


def _identity(subject: Subject, at_once: dict[str, int | None]) -> dict[str, Any]:
    """Everything that the chunks in a folder depend on."""
    gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    precision = {"precision": FULL} if gpu else {}  # GPU chunks without it were convolved in TF32
    return {"samples": subject.samples, "subject": subject.about, **at_once, **precision}


def _stored(network: Network, num: int, real: RealImages, folder: Path, real_folder: Path | None, batch: int) -> Stored:
    """The features of `num` samples and of all real images, in chunks below `folder`."""
    name = f"{network.name}-{network.identity['sha256'][:8]}"
    reals = Features((real_folder or folder) / f"{name}-{real.about['sha256'][:8]}", real.count, batch)
    return network, Features(folder / f"{name}-samples", num, batch), reals


def _extract(network: Network, draw: Draw, features: Features, what: str) -> Iterator[Progress]:
    """Compute the missing chunks."""
    for done in shards.fill_shards(features.folder, features.count, features.batch, lambda part: network(draw(part))):
        yield Progress(f"{network.name} features of {what}", done, features.count)


def _add_scores(
    result: dict[str, Any], stored: list[Stored], statistics: ReferenceStatistics | None
) -> Iterator[Progress]:
    """Add the scores and the identity of every network, and the digest of the statistics, to the result."""
    for network, samples, real in stored:
        name = network.name
        yield Progress(f"{name} metrics", 0, 1)
        scores = feature_scores(name, samples, real, statistics if name == "inception" else None)
        result["scores"] |= {score: asdict(value) for score, value in scores.items()}
        result["protocol"]["metrics"][name] = network.identity
        yield Progress(f"{name} metrics", 1, 1)
    if statistics:
        result["protocol"]["reference"]["statistics"] = statistics.sha256


def _check_classes(subject: Subject, real: RealImages) -> None:
    """Raise UserError unless the samples have the classes of the real images."""
    if not subject.labels:
        raise UserError("metrics classifier needs samples of known classes: give a run that was trained with labels")
    if tuple(real.source.classes) != subject.classes:
        raise UserError(
            f"metrics classifier needs real images of the model's classes: {real.about['data']} has "
            f"{truncate(', '.join(real.source.classes), 40)}, the model {truncate(', '.join(subject.classes), 40)}"
        )


def _classify(
    result: dict[str, Any], subject: Subject, draw: Draw, real: RealImages, num: int
) -> Iterator[Progress | Evaluation]:
    """Add the scores and the identity of the classifier to the result."""
    flip = bool(subject.config and subject.config.data.flip)
    for event in find_classifier(real.source, subject.shape, flip=flip):
        if isinstance(event, int):
            yield Progress("classifier, in steps", event, STEPS)
            continue
        labels = np.resize(np.array(subject.labels, np.int64), num)
        scores = classifier_scores(event, LabelledImages(draw(range(num)), labels), held_out_part(real.source))
        result["scores"] |= {name: asdict(score) for name, score in scores.items()}
        result["protocol"]["metrics"]["classifier"] = event.identity


def images_of(subject: Subject, out: Path, num: int) -> Draw:
    """The images of an evaluation by number."""
    if subject.config is None:
        return subject.draw
    return shards.lazy_rows(out / "samples", num, subject.config.sample.micro_batch, "images")


def write_npz(path: Path, draw: Draw, num: int, block: int = 64) -> None:
    """Write images as ADM's evaluator reads them: `arr_0`, uint8 (N, H, W, 3). Memory holds `block` images."""
    shape = (num, *to_rgb(draw(range(1))).shape[1:])
    with (
        atomic.file(path) as whole,
        zipfile.ZipFile(whole, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for start in range(0, num, block):
            file.write(to_rgb(draw(range(start, min(start + block, num)))).tobytes())


def _measure_pixels(subject: Subject, draw: Draw, real: RealImages, num: int) -> Evaluation:
    """All scores without a feature network: distances of pixels, neighbours, detail of mosaics, the user's metrics."""
    count = min(num, real.count // 2, max(2, PIXELS_AT_ONCE // int(np.prod(subject.shape))))
    order = generator(0, "evaluation", DRAWS["order"]).permutation(real.count)
    images, real_images = draw(range(count)), _one_by_one(real.draw, np.sort(order[: 2 * count]))
    scores = pixels.score(to_floats(images), to_floats(real_images), subject.periods)
    data = subject.config.data if subject.config is not None else None
    mirrored = data is not None and bool(data.flip or data.augment)  # training showed mirror images
    unseen = _thumbnails(real.unseen, real.unseen_count) if real.unseen_count else None
    near = neighbours(_thumbnails(draw, num), _thumbnails(real.draw, real.count), unseen, mirrored=mirrored)
    scores |= near.scores()
    resampling = {"halvings": FLOOR_SPLITS, "resamples": RESAMPLES}
    metrics: dict[str, Any] = {
        "pixels": {"images": count, "patches": POINTS, "projections": PROJECTIONS, **resampling},
        "nearest": {"among": real.count, "side": SIDE, "unseen": real.unseen_count, "near": NEAR, "mirrored": mirrored},
    }
    if subject.model is not None and subject.config is not None and subject.config.data.source == "mosaic":
        scores |= _detail(subject.model, subject.config)
        metrics["detail"] = {"images": DETAIL_IMAGES, "times": list(DETAIL_TIMES)}
    own = plugin_scores(images, real_images)
    if taken_names := own.keys() & scores.keys():
        raise UserError(f"metric {min(taken_names)} has the name of a built-in score: choose another name")
    scores |= own
    metrics |= {name: {"images": count} for name in own}
    first = np.argsort(near.train, kind="stable")[:SHOWN]
    protocol = {
        "images": num,
        "size": list(subject.shape),
        "precision": FULL,
        "samples": subject.samples,
        "reference": real.about,
        "metrics": metrics,
    }
    result = {
        "subject": subject.about,
        "protocol": protocol,
        "made with": {"dit-in-dit": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "scores": {name: asdict(score) for name, score in scores.items()},
        "warnings": near.warnings(guided=any(subject.samples.get(scale, 1) > 1 for scale in SCALES)),
    }
    matches = _one_by_one(real.draw, near.number[first])
    return Evaluation(result, images, real_images, near, _one_by_one(draw, first), matches)


def _one_by_one(draw: Draw, numbers: NDArray[np.int64]) -> Pixels:
    return np.concatenate([draw(range(n, n + 1)) for n in map(int, numbers)])


def _thumbnails(draw: Draw, count: int, block: int = 1024) -> torch.Tensor:
    starts = range(0, count, block)
    return torch.cat([thumbnails(draw(range(start, min(start + block, count)))) for start in starts])


@torch.inference_mode()
def _detail(model: NestedDiT, config: RunConfig) -> dict[str, Score]:
    """Scores of the model's estimates of held-out mosaics against their truth, at each of DETAIL_TIMES."""
    objective, mosaic = Objective(config.diffusion), Mosaic(config.model.image_size)
    batch = held_out_batch(open_source(config.data, config.model), config.model, DETAIL_IMAGES)
    truths = [mosaic.truth(i) for i in range(DETAIL_IMAGES)]
    true = [detail.detail(mosaic, truth, x) for truth, x in zip(truths, batch.x.numpy(), strict=True)]
    device = next(model.parameters()).device
    x, noise, y = (part.to(device) for part in (batch.x, batch.noise, batch.y))
    scores: dict[str, Score] = {}
    for t in DETAIL_TIMES:
        times = objective.path.snap(torch.full((len(x),), t, device=device))
        estimates = objective.estimate(model, x, noise, times, y)[1].cpu().numpy()
        estimated = [detail.detail(mosaic, truth, image) for truth, image in zip(truths, estimates, strict=True)]
        scores |= {f"{name}@{t}": score for name, score in detail.detail_scores(estimated, true).items()}
    return scores
