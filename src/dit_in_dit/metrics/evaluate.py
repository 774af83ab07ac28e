"""From a subject to `metrics.json`: numbers that carry how they were made, and work that can be killed and goes on."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dit_in_dit import __version__
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig
from dit_in_dit.data.mosaic import Mosaic
from dit_in_dit.data.sources import open_source
from dit_in_dit.diffusion.objective import Objective
from dit_in_dit.metrics import detail, feature_distances, fid_family, pixels
from dit_in_dit.metrics.feature_networks import Network
from dit_in_dit.metrics.memorization import NEAR, SIDE, Neighbours, neighbours, thumbnails
from dit_in_dit.metrics.metric import own_scores
from dit_in_dit.metrics.pixels import FloatImages, Score
from dit_in_dit.metrics.subject import Draw, RealImages, Subject
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.reporting.images import Pixels
from dit_in_dit.runs import atomic, shards
from dit_in_dit.runtime.precision import FULL, use_full_float32
from dit_in_dit.runtime.process import is_main
from dit_in_dit.runtime.seeding import generator
from dit_in_dit.training.batches import held_out_batch

PIXELS_AT_ONCE = 2**28  # numbers of a set of images that the pixel metrics hold
SHOWN = 64  # images drawn
DETAIL_IMAGES = 64
DETAIL_TIMES = (0.5, 0.8)


@dataclass(frozen=True)
class Progress:
    """How far a part of the work is, in images."""

    part: str
    done: int
    total: int


@dataclass(frozen=True)
class Evaluation:
    """The result as `metrics.json` holds it, and what the figures show beside it."""

    result: dict[str, Any]
    images: Pixels  # as many as the pixel metrics look at
    real: Pixels  # twice as many
    near: Neighbours
    nearest: Pixels  # the samples that come nearest to training images, nearest first
    nearest_real: Pixels  # those training images


def evaluate(
    subject: Subject,
    real: RealImages,
    out: Path,
    num: int,
    *,
    batch: int = 64,
    networks: tuple[Network, ...] = (),
    statistics: feature_distances.ReferenceStatistics | None = None,
) -> Iterator[Progress | Evaluation]:
    """Compute everything about the first `num` images into `out/metrics.json`: progress, then the evaluation.

    Samples are kept in `out` in chunks of the run's `sample.micro_batch`, features in chunks of `batch`, each made
    once, by any number of processes; only process 0 goes on from there and yields the evaluation.

    Args:
        networks: feature networks of the standard set; none: the pixel metrics alone.
        statistics: Inception statistics of the real images, in place of those of `real`, for FID and sFID.

    Raises:
        UserError: too few images, or `out` holds another subject's.
    """
    if subject.count is not None and subject.count < num:
        raise UserError(f"--num must be at most the {subject.count} images of {subject.about['name']}: got {num}")
    if num < 2 or real.count < 4:
        raise UserError(f"metrics need 2 images and 4 real ones: got {num} and {real.count}")
    use_full_float32()
    at_once = {"batch": batch, "micro_batch": subject.config.sample.micro_batch if subject.config else None}
    identity: dict[str, Any] = {"samples": subject.samples, "subject": subject.about, **at_once}
    gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if gpu:  # before this was named, its convolutions were in TF32
        identity["precision"] = FULL
    shards.claim(out / "identity.json", identity)
    if subject.config is not None:
        size = subject.config.sample.micro_batch
        for done in shards.fill(out / "samples", num, size, lambda part: {"images": subject.draw(part)}):
            yield Progress("samples", done, num)
    draw = images_of(subject, out, num)
    for network in networks:
        for folder, source, count, what in _features(network, draw, num, real, out):
            for done in shards.fill(folder, count, batch, partial(_extract, network, source)):
                yield Progress(f"{network.name} features of {what}", done, count)
    if not is_main():
        return
    yield Progress("pixel metrics", 0, 1)
    evaluation = _look(subject, draw, real, num)
    yield Progress("pixel metrics", 1, 1)
    result = evaluation.result
    for network in networks:
        yield Progress(f"{network.name} metrics", 0, 1)
        mine, theirs = (
            fid_family.Features(folder, count, batch)
            for folder, _, count, _ in _features(network, draw, num, real, out)
        )
        used = statistics if network.name == "inception" else None
        scores = fid_family.feature_scores(network.name, mine, theirs, used)
        result["scores"] |= {name: asdict(score) for name, score in scores.items()}
        result["protocol"]["metrics"][network.name] = network.identity
        yield Progress(f"{network.name} metrics", 1, 1)
    if statistics:
        result["protocol"]["reference"]["statistics"] = statistics.sha256
    result["made with"] |= at_once
    atomic.write_atomic(out / "metrics.json", json.dumps(result, indent=1) + "\n")
    yield evaluation


def images_of(subject: Subject, out: Path, num: int) -> Draw:
    """The images of an evaluation by number."""
    if subject.config is None:
        return subject.draw
    return shards.stored(out / "samples", num, subject.config.sample.micro_batch, "images")


def _extract(network: Network, draw: Draw, part: range) -> shards.Arrays:
    return network(draw(part))


def _features(
    network: Network, draw: Draw, num: int, real: RealImages, out: Path
) -> Iterator[tuple[Path, Draw, int, str]]:
    """Where a network's features of samples and of real images go, whence they come, how many, and what they are."""
    name = f"{network.name}-{network.identity['sha256'][:8]}"
    yield out / "features" / f"{name}-samples", draw, num, "samples"
    yield out / "features" / f"{name}-{real.about['sha256'][:8]}", real.draw, real.count, "real images"


def write_npz(path: Path, draw: Draw, num: int, block: int = 64) -> None:
    """Images as ADM's evaluator reads them: `arr_0`, uint8 (N, H, W, 3), written piece by piece."""
    shape = (num, *_rgb(draw(range(1))).shape[1:])
    with (
        atomic.file(path) as whole,
        zipfile.ZipFile(whole, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for start in range(0, num, block):
            file.write(_rgb(draw(range(start, min(start + block, num)))).tobytes())


def _rgb(images: Pixels) -> Pixels:
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def _look(subject: Subject, draw: Draw, real: RealImages, num: int) -> Evaluation:
    """Everything that needs no network."""
    count = min(num, real.count // 2, max(2, PIXELS_AT_ONCE // int(np.prod(subject.shape))))
    order = generator(0, "evaluation", pixels.DRAWS["order"]).permutation(real.count)
    images, theirs = draw(range(count)), _one_by_one(real.draw, np.sort(order[: 2 * count]))
    scores = pixels.score(floats(images), floats(theirs), subject.periods)
    mirrored = subject.config is not None and subject.config.data.flip  # what training showed
    unseen = _thumbnails(real.unseen, real.unseen_count) if real.unseen_count else None
    near = neighbours(_thumbnails(draw, num), _thumbnails(real.draw, real.count), unseen, mirrored=mirrored)
    scores |= near.scores()
    metrics: dict[str, Any] = {
        "pixels": {
            "images": count,
            "patches": pixels.POINTS,
            "projections": pixels.PROJECTIONS,
            "halvings": pixels.FLOOR_SPLITS,
            "resamples": pixels.RESAMPLES,
        },
        "nearest": {
            **{"among": real.count, "side": SIDE, "unseen": real.unseen_count, "near": NEAR},
            "mirrored": mirrored,
        },
    }
    if subject.model is not None and subject.config is not None and subject.config.data.source == "mosaic":
        scores |= _detail(subject.model, subject.config)
        metrics["detail"] = {"images": DETAIL_IMAGES, "times": list(DETAIL_TIMES)}
    own = own_scores(images, theirs)
    if taken := own.keys() & scores.keys():
        raise UserError(f"metric {min(taken)} has the name of a built-in score: register it under another")
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
        "warnings": near.warnings(guided=subject.samples.get("guidance", 1) > 1),
    }
    matches = _one_by_one(real.draw, near.number[first])
    return Evaluation(result, images, theirs, near, _one_by_one(draw, first), matches)


def _one_by_one(draw: Draw, numbers: NDArray[np.int64]) -> Pixels:
    return np.concatenate([draw(range(n, n + 1)) for n in map(int, numbers)])


def floats(images: Pixels) -> FloatImages:
    """uint8 (N, H, W, C) as (N, C, H, W) in [-1, 1]."""
    return images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1


def _thumbnails(draw: Draw, count: int, block: int = 1024) -> torch.Tensor:
    starts = range(0, count, block)
    return torch.cat([thumbnails(draw(range(start, min(start + block, count)))) for start in starts])


@torch.inference_mode()
def _detail(model: NestedDiT, config: RunConfig) -> dict[str, Score]:
    """What of the held-out mosaics' truth is in the model's image estimates, by time."""
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
        found = [detail.detail(mosaic, truth, image) for truth, image in zip(truths, estimates, strict=True)]
        scores |= {f"{name}@{t}": score for name, score in detail.detail_scores(found, true).items()}
    return scores
