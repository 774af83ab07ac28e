"""What is evaluated and what against: numbered images of a run, a folder or arrays, and of real data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DataConfig, ModelConfig, RunConfig
from dit_in_dit.data import latents
from dit_in_dit.data.run_data import locate, open_source_of
from dit_in_dit.data.source import Source
from dit_in_dit.data.sources import open_source, size_of
from dit_in_dit.metrics.score import DRAWS
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.reporting.images import Pixels, to_pixels
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.runtime.seeding import generator
from dit_in_dit.sampling.folder import ImageDecoder
from dit_in_dit.sampling.numbered import sample_batches, sampling_protocol
from dit_in_dit.training.batches import image_number

Draw = Callable[[range], Pixels]  # numbers -> images (N, H, W, C)

NAMED = ("emoji", "mosaic")  # sources that come with a held-out part
MOST_REAL = 50_000  # real images used of a larger set, drawn at random


@dataclass(frozen=True)
class Subject:
    """Images that are evaluated, how they are made (part of the protocol) and what they are of (not part of it)."""

    draw: Draw
    shape: tuple[int, int, int]  # H, W, C
    samples: dict[str, Any]
    about: dict[str, Any]
    count: int | None = None  # how many there are; None: as many as wanted
    model: NestedDiT | None = None
    config: RunConfig | None = None

    @property
    def periods(self) -> tuple[int, ...]:
        """Patch and, if there is an inner path, sub-patch size."""
        if self.config is None:
            return ()
        model, scale = self.config.model, self.shape[0] // self.config.model.image_size[0]  # of latents, when decoded
        periods = (model.patch_size, model.inner.sub_patch) if model.blocks("inner") else (model.patch_size,)
        return tuple(period * scale for period in periods)


@dataclass(frozen=True)
class RealImages:
    """Real images: those that samples are compared with, and unseen ones, if there are any."""

    draw: Draw
    count: int
    unseen: Draw
    unseen_count: int
    about: dict[str, Any]


def run_subject(
    run: Path,
    device: torch.device,
    configure: Callable[[RunConfig, Sequence[str]], tuple[RunConfig, list[int]]],
    *,
    seed: int,
    averaged: bool,
    decoder: Callable[[DataConfig], ImageDecoder | None] = lambda data: None,
) -> Subject:
    """Samples of a run's newest checkpoint.

    Args:
        configure: from the run's config and class names, the config to sample with and the classes that take turns.
        decoder: what makes images of latents, if there is something.
    """
    saved = Checkpoint.open(run)
    model, config = saved.model(device, averaged=averaged), saved.config
    config = replace(config, data=locate(config.data, saved.manifest.get("data")))
    decode = decoder(config.data)
    if decode is None and config.model.channels not in (1, 3):
        raise UserError(
            f"evaluation needs images of 1 or 3 channels: {run} draws latents of {config.model.channels}; "
            "name the VAE that decodes them with --vae"
        )
    config, classes = configure(config, saved.classes)
    names: str | list[str] = [saved.classes[c] for c in classes]
    if config.model.num_classes and not classes:
        classes, names = _common_labels(run, config), "as often as in the training data"

    def draw(numbers: range) -> Pixels:
        batches = sample_batches(model, config, numbers, seed=seed, classes=classes)
        size = config.sample.micro_batch
        images = (decode.numbered(part, drawn, size) if decode else drawn for part, drawn in batches)
        return np.concatenate([to_pixels(some) for some in images])

    labels = names if config.model.num_classes else "none"
    samples = sampling_protocol(config, labels=labels, averaged=averaged, seed=seed)
    about = {"name": str(run), "step": saved.step, "config": saved.manifest["config"]}
    about["checkpoint"] = saved.sha256(averaged=averaged)
    shape = (*config.model.image_size, config.model.channels)
    if decode:
        samples["vae"] = decode.about()
        shape = (shape[0] * decode.factor, shape[1] * decode.factor, 3)
    return Subject(draw, shape, samples, about, model=model, config=config)


def _common_labels(run: Path, config: RunConfig) -> list[int]:
    """The training images' labels in a fixed random order: a set of samples then has the data's mix of classes."""
    source = open_source_of(run, config)
    return [int(c) for c in generator(0, "evaluation", DRAWS["order"]).permutation(source.labels)]


def files_subject(path: Path) -> Subject:
    """The images of a folder, .zip, .npz or .npy, in the order of their names, as they are."""
    if not path.exists():
        raise UserError(f"no such run, folder or file: {path}")
    if path.is_file() and path.suffix not in (".zip", ".npz", ".npy"):
        raise UserError(f"cannot evaluate {path}: give a run, a folder, a .zip, a .npz or a .npy of images")
    shape = size_of(path)
    source = _open(DataConfig(source=str(path), held_out=0), shape)
    draw, count = _pixels(source.train), source.train_size or 0
    # Of all images, though fewer may be measured: chunks of features are kept, and the next evaluation may want more.
    about = {"name": str(path), "sha256": _sha256(draw, count)}
    return Subject(draw, shape, {"made by": "files, as they are"}, about, count=count)


def reference(against: str | None, subject: Subject, wanted: int) -> RealImages:
    """Real images for a subject.

    `against` None means the data that the run was trained on. That, and the embedded sources, have a held-out
    part, which is kept apart; other data is used whole.

    Args:
        wanted: images needed of an endless source.
    """
    if against is None and subject.config is None:
        raise UserError(
            "say what the images are compared with: --against DATA (emoji, mosaic, a folder, .zip or arrays)"
        )
    data = subject.config.data if subject.config else DataConfig()
    if against is None and latents.is_index(data.source):
        raise UserError(f"the run was trained on latents: name the images that {data.source} was made of by --against")
    seed = subject.config.seed if subject.config else 0
    if against is not None and against != data.source:
        data = replace(data, source=against, held_out=0.1 if against in NAMED else 0)
    source = _open(data, subject.shape)
    total = source.train_size
    if total is None:
        count = wanted
        numbers = [image_number(seed, i, None) for i in range(count)]
    else:
        count = min(total, MOST_REAL)
        order = generator(0, "evaluation", DRAWS["order"]).permutation(total)
        numbers = sorted(map(int, order[:count]))
    train = _pixels(lambda i: source.train(numbers[i]))
    whole = "all images" if not source.held_out_size else "the training part"
    about = {
        "data": data.source,
        "part": whole if total == count else f"{count} of {whole}",
        "images": count,
        "resize": "box halving, bicubic, centre crop",
        "sha256": _sha256(train, count),
    }
    return RealImages(train, count, _pixels(source.held_out), source.held_out_size, about)


def _open(data: DataConfig, shape: tuple[int, int, int]) -> Source:
    """The source at a size, whatever its classes."""
    size = replace(ModelConfig(image_size=shape[:2], channels=shape[2], patch_size=1), num_classes=0)
    return open_source(data, size)


def _pixels(image: Callable[[int], tuple[NDArray[np.float32], int]]) -> Draw:
    """Images as uint8, from a function that gives one in [-1, 1]."""

    def draw(numbers: range) -> Pixels:
        return to_pixels(torch.from_numpy(np.stack([image(i)[0] for i in numbers])))

    return draw


def _sha256(draw: Draw, count: int, block: int = 256) -> str:
    found = hashlib.sha256()
    for start in range(0, count, block):
        found.update(draw(range(start, min(start + block, count))).tobytes())
    return found.hexdigest()
