"""Images to evaluate, from a run, a folder or arrays, and real images to compare them with. All images are numbered."""

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
from dit_in_dit.data.run_data import find_moved_data, open_source_of, qualified_name
from dit_in_dit.data.source import Source
from dit_in_dit.data.sources import fill_latent_keys, open_source, size_of
from dit_in_dit.metrics.score import DRAWS
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.reporting.images import Pixels, to_pixels
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.runs.pretrained import shown_name
from dit_in_dit.runtime.seeding import generator
from dit_in_dit.sampling.fit import fit_to_device
from dit_in_dit.sampling.folder import ImageDecoder
from dit_in_dit.sampling.guide import Guide
from dit_in_dit.sampling.numbered import sample_batches, sampling_protocol
from dit_in_dit.training.batches import shuffled_index

Draw = Callable[[range], Pixels]  # numbers -> images (N, H, W, C)

NAMED = ("emoji", "mosaic")  # sources with a held-out part of their own
MOST_REAL = 50_000  # most real images; drawn at random from a larger set


@dataclass(frozen=True)
class Subject:
    """Images to evaluate."""

    draw: Draw
    shape: tuple[int, int, int]  # H, W, C
    samples: dict[str, Any]  # how images are drawn: part of the protocol
    about: dict[str, Any]  # which checkpoint or files: not part of the protocol
    count: int | None = None  # number of images; None: unlimited
    model: NestedDiT | None = None
    config: RunConfig | None = None
    classes: tuple[str, ...] = ()  # of the model
    labels: Sequence[int] = ()  # classes of the samples, used cyclically; empty: unknown

    @property
    def periods(self) -> tuple[int, ...]:
        """Patch size in pixels and, with an inner path, sub-patch size."""
        if self.config is None:
            return ()
        model = self.config.model
        scale = self.shape[0] // model.image_size[0]  # 1 unless latents are decoded
        sides = (model.patch_size, model.inner.sub_patch) if model.blocks("inner") else (model.patch_size,)
        return tuple(side * scale for side in sides)


@dataclass(frozen=True)
class RealImages:
    """Real images."""

    draw: Draw  # the images that samples are compared with
    count: int
    unseen: Draw  # held out
    unseen_count: int
    about: dict[str, Any]
    source: Source


def run_subject(
    run: Path,
    device: torch.device,
    configure: Callable[[RunConfig, Sequence[str]], tuple[RunConfig, list[int]]],
    *,
    seed: int,
    averaged: bool | str,
    decoder: Callable[[DataConfig], ImageDecoder | None] = lambda data: None,
    source: Source | None = None,
    fit: Callable[[NestedDiT, RunConfig, Guide | None], RunConfig] = fit_to_device,
    guide: Guide | None = None,
) -> Subject:
    """Samples of a run's newest checkpoint.

    Args:
        configure: function from the run's config and class names to the config for sampling, and to the class numbers
            that alternate (empty: as frequent as in the training data).
        decoder: function from the run's data to the decoder of the latents; None: samples are images.
        source: the training images, if the config does not name them.
        guide: weak model of autoguidance.

    Raises:
        UserError: the run cannot be loaded, its samples are no images of 1 or 3 channels, or the guide does not fit.
    """
    saved = Checkpoint.open(run)
    model, config = saved.model(device, averaged=averaged), saved.config
    config = replace(config, data=find_moved_data(config.data, saved.manifest.get("data")))
    decode = decoder(config.data)
    _check_images(run, config.model.channels, decode)
    config, classes = configure(config, saved.classes)
    config = fit(model, guide.checked(config, saved.classes) if guide else config, guide)
    names: str | list[str] = [saved.classes[c] for c in classes] if config.model.num_classes else "none"
    if config.model.num_classes and not classes:
        classes = _labels_in_random_order(source or open_source_of(run, config))
        names = "as often as in the training data"

    def draw(numbers: range) -> Pixels:
        batches = sample_batches(model, config, numbers, seed=seed, classes=classes, guide=guide)
        images = (decode.numbered(part, x, config.sample.micro_batch) if decode else x for part, x in batches)
        return np.concatenate([to_pixels(batch) for batch in images])

    samples = sampling_protocol(config, labels=names, averaged=averaged, seed=seed, guide=guide)
    about = {"name": shown_name(run), "step": saved.step, "config": saved.manifest["config"]}
    about |= {"checkpoint": saved.sha256(averaged=averaged)}
    shape = (*config.model.image_size, config.model.channels)
    if decode:
        samples["vae"], shape = decode.about(), (shape[0] * decode.factor, shape[1] * decode.factor, 3)
    labels = classes or range(config.model.num_classes)
    return Subject(draw, shape, samples, about, model=model, config=config, classes=saved.classes, labels=labels)


def _check_images(run: Path, channels: int, decode: ImageDecoder | None) -> None:
    if decode is None and channels not in (1, 3):
        raise UserError(
            f"evaluation needs images of 1 or 3 channels: {run} generates latents of {channels}; "
            "name the VAE that decodes them with --vae"
        )


def _labels_in_random_order(source: Source) -> list[int]:
    """The labels of all images, so that samples get the class frequencies of the data."""
    labels = source.labels[_in_the_style_of_samples(source, len(source.labels))]
    return [int(c) for c in generator(0, "evaluation", DRAWS["order"]).permutation(labels)]


def _in_the_style_of_samples(source: Source, count: int) -> NDArray[np.int64]:
    """Numbers of the training images that samples are like: all `count`, or those of the first of several styles."""
    styles = source.styles
    return np.arange(count, dtype=np.int64) if styles is None else np.flatnonzero(np.asarray(styles) == 0)


def files_subject(path: Path) -> Subject:
    """The images of a folder, .zip, .npz or .npy, in the order of their names, unchanged."""
    if not path.exists():
        raise UserError(f"no such run, folder or file: {path}")
    if path.is_file() and path.suffix not in (".zip", ".npz", ".npy"):
        raise UserError(f"cannot evaluate {path}: give a run, a folder, a .zip, a .npz or a .npy of images")
    shape = size_of(path)
    source = _open(DataConfig(source=str(path), held_out=0), shape)
    draw, count = _pixels(source.train), source.train_size or 0
    # Of all images, even if fewer are measured: features are stored, and the next evaluation may measure more.
    about = {"name": str(path), "sha256": _sha256(draw, count)}
    return Subject(draw, shape, {"made by": "files, as they are"}, about, count=count)


def reference(against: str | Source | None, subject: Subject, wanted: int) -> RealImages:
    """Real images for a subject.

    Args:
        against: a source; None: the data that the run was trained on. That data, NAMED sources and objects have a
            held-out part, which is left out. Other sources are used as a whole.
        wanted: number of images of an endless source.

    Raises:
        UserError: the data does not exist, or `against` is None but the images have no run or the run has latents.
    """
    if against is None and subject.config is None:
        raise UserError(
            "metrics need real images to compare with: give --against DATA (emoji, mosaic, a folder, .zip or arrays)"
        )
    data = subject.config.data if subject.config else DataConfig()
    if against is None and fill_latent_keys(replace(data, latent_scale=None)).latent_scale:
        raise UserError(f"the run was trained on latents: give --against IMAGES, from which {data.source} was encoded")
    seed = subject.config.seed if subject.config else 0
    if isinstance(against, Source):
        data = replace(data, source=qualified_name(against))
    elif against is not None and against != data.source:
        data = replace(data, source=against, held_out=0.1 if against.partition(":")[0] in NAMED else 0)
    source = against if isinstance(against, Source) else _open(data, subject.shape)
    everything = "all images" if not source.held_out_size else "the training part"
    if source.train_size is None:
        total, count = None, wanted
        numbers = [shuffled_index(seed, i, None) for i in range(count)]
    else:
        usable = _in_the_style_of_samples(source, source.train_size)
        everything += " in the first style" if source.styles is not None else ""
        total, count = len(usable), min(len(usable), MOST_REAL)
        order = generator(0, "evaluation", DRAWS["order"]).permutation(total)
        numbers = sorted(map(int, usable[order[:count]]))
    train = _pixels(lambda i: source.train(numbers[i]))
    about = {
        "data": data.source,
        "part": everything if total == count else f"{count} of {everything}",
        "images": count,
        "resize": "box halving, bicubic, centre crop",
        "sha256": _sha256(train, count),
    }
    return RealImages(train, count, _pixels(source.held_out), source.held_out_size, about, source)


def _open(data: DataConfig, shape: tuple[int, int, int]) -> Source:
    """The source at an image size (H, W, C), without its classes."""
    size = replace(ModelConfig(image_size=shape[:2], channels=shape[2], patch_size=1), num_classes=0)
    return open_source(data, size)


def _pixels(image: Callable[[int], tuple[NDArray[np.float32], int]]) -> Draw:
    """Function from numbers to uint8 images, made from a function that returns an image in [-1, 1]."""

    def draw(numbers: range) -> Pixels:
        return to_pixels(torch.from_numpy(np.stack([image(i)[0] for i in numbers])))

    return draw


def _sha256(draw: Draw, count: int, block: int = 256) -> str:
    sha256 = hashlib.sha256()
    for start in range(0, count, block):
        sha256.update(draw(range(start, min(start + block, count))).tobytes())
    return sha256.hexdigest()
