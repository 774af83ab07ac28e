"""A small classifier of a source's real images, trained once per source and image size. It needs no download.

Its accuracy on samples is the share whose predicted class is the one they were sampled for. (The classification
accuracy score of Ravuri & Vinyals 2019, arXiv 1905.10887, trains on samples and tests on real images. This is the
reverse, which needs no training per model; Shmelkov et al. 2018, arXiv 1807.09499, call it GAN-test.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.strict_json import has_form
from dit_in_dit.data.source import Source
from dit_in_dit.metrics.score import DRAWS
from dit_in_dit.reporting.images import Pixels, to_floats, to_pixels
from dit_in_dit.runs import atomic
from dit_in_dit.runs.integrity import file_sha256
from dit_in_dit.runs.lock import open_locked, release
from dit_in_dit.runtime.seeding import generator
from dit_in_dit.runtime.threads import use_threads
from dit_in_dit.training.batches import shuffled_index

VERSION = 1  # of the recipe below: of everything that the weights depend on
WIDTHS = (32, 64, 128)  # of the stages; the last is the number of features
GRID = 16  # rows and columns after the stem, about
STEPS, BATCH, RATE, WARM_UP, DECAY, SMOOTHING, MARGIN = 1000, 64, 3e-3, 100, 0.05, 0.1, 0.1
MOST_TRAIN, MOST_HELD_OUT = 20_000, 5_000  # images of each part that are used
LEAST_HELD_OUT = 20
BLOCK = 250  # images per forward pass
FORM = {"identity": dict, "accuracies": dict}  # of the metadata of a stored classifier


@dataclass(frozen=True)
class LabelledImages:
    """Images (N, H, W, C), uint8, and their classes (N,)."""

    images: Pixels
    labels: NDArray[np.int64]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group norm beside a projection (He et al. 2016; Wu & He 2018)."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(8, out) for _ in range(2))
        self.skip = nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.skip(x) + self.norms[1](self.second(hidden)))


class Classifier(nn.Module):
    """A residual network of three stages; images (N, C, H, W) in [-1, 1] -> features (N, 128), logits (N, classes).

    Attributes:
        identity: version, source, split and sizes that the weights depend on, and after training their SHA-256 and
            the accuracies of training and held-out images.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, identity: dict[str, Any]) -> None:
        super().__init__()
        height, width, channels = shape
        stride = max(1, round(min(height, width) / GRID))
        self.stem = nn.Conv2d(channels, WIDTHS[0], 2 * stride, stride, stride // 2)
        self.norm = nn.GroupNorm(8, WIDTHS[0])
        sizes = zip((WIDTHS[0], *WIDTHS), WIDTHS, (1, 2, 2), strict=False)
        self.blocks = nn.Sequential(*(ResidualBlock(*size) for size in sizes))
        self.head = nn.Linear(WIDTHS[-1], classes)
        self.identity = identity

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3))
        return features, self.head(features)

    @torch.inference_mode()
    def classify(self, images: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Features (N, 128) and logits (N, classes) of images (N, H, W, C), uint8."""
        x = torch.from_numpy(to_floats(images))
        parts = [self(x[start : start + BLOCK]) for start in range(0, len(x), BLOCK)]
        features, logits = (torch.cat(each).numpy() for each in zip(*parts, strict=True))
        return features, logits


def labelled_part(source: Source, most: int, *, held_out: bool, seed: int = 0) -> LabelledImages:
    """At most `most` images of a part of a source, in the order of their numbers."""
    total = source.held_out_size if held_out else source.train_size
    if total is None:
        numbers = [shuffled_index(seed, index, None) for index in range(most)]
    else:
        order = generator(seed, "evaluation", DRAWS["order"]).permutation(total)
        numbers = sorted(map(int, order[:most]))
    drawn = [(source.held_out if held_out else source.train)(number) for number in numbers]
    images = to_pixels(torch.from_numpy(np.stack([image for image, _ in drawn])))
    return LabelledImages(images, np.array([label for _, label in drawn], np.int64))


def balanced_accuracy(hits: NDArray[np.bool_], labels: NDArray[np.int64]) -> float:
    """Mean over the classes that occur of the share of hits, so that frequent classes do not count for more."""
    counts = np.bincount(labels)
    return float((np.bincount(labels, weights=hits) / np.maximum(counts, 1))[counts > 0].mean())


def find_classifier(source: Source, shape: tuple[int, int, int], *, flip: bool) -> Iterator[int | Classifier]:
    """Read the classifier of a source from the cache, or train and store it; yields steps done, then the classifier.

    The cache is `$XDG_CACHE_HOME/dit-in-dit/classifiers`, by default in `~/.cache`. Of several processes that need
    the same one, the first trains it.

    Args:
        shape: H, W, C of the images.
        flip: whether training may mirror images.

    Raises:
        UserError: the source has fewer than two classes or too few held-out images, or the stored file is damaged.
    """
    identity = _identity(source, shape, flip)
    name = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dit-in-dit", "classifiers")
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = open_locked(place / f"{name}.lock", wait=True)
    except OSError as error:
        raise UserError(
            f"cannot write the classifier to {place}: {error.strerror}; set XDG_CACHE_HOME to a folder of yours"
        ) from None
    try:
        path = place / f"{name}.safetensors"
        if not path.exists():
            with use_threads(1):  # with more, sums have other last bits
                yield from _train(source, Classifier(shape, len(source.classes), identity), path, flip)
        yield _read(path, Classifier(shape, len(source.classes), identity))
    finally:
        release(lock)


def _identity(source: Source, shape: tuple[int, int, int], flip: bool) -> dict[str, Any]:
    if len(source.classes) < 2:
        raise UserError(
            f"the classifier needs data with at least 2 classes: got {len(source.classes)}; leave out the metric "
            "classifier"
        )
    if source.held_out_size < LEAST_HELD_OUT:
        raise UserError(
            f"the classifier needs at least {LEAST_HELD_OUT} held-out images, which its training does not see: got "
            f"{source.held_out_size}; raise data.held_out"
        )
    parts = {"train": source.train_size, "held_out": source.held_out_size, "flip": flip}
    return {"version": VERSION, "source": source.digest, "classes": list(source.classes), "size": list(shape), **parts}


def _train(source: Source, model: Classifier, path: Path, flip: bool) -> Iterator[int]:
    """Train on class-balanced batches of shifted, mirrored images, and write the weights with their accuracies."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.reset_parameters()
    train, held_out = labelled_part(source, MOST_TRAIN, held_out=False), held_out_part(source)
    images = torch.from_numpy(to_floats(train.images))
    members = [rows for c in range(len(source.classes)) if len(rows := np.flatnonzero(train.labels == c))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    draw = generator(0, "evaluation", DRAWS["classifier"])
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for step in range(STEPS):
        classes = draw.integers(len(members), size=BATCH)
        rows = np.array([members[c][int(draw.integers(len(members[c])))] for c in classes])
        x = _moved(images[rows], draw, flip).contiguous(memory_format=torch.channels_last)
        rate = RATE * min(1, (step + 1) / WARM_UP) * 0.5 * (1 + np.cos(np.pi * step / STEPS))
        optimizer.param_groups[0]["lr"] = float(rate)
        loss = F.cross_entropy(model(x)[1], torch.from_numpy(train.labels[rows]), label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield step + 1
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    accuracies = {
        name: balanced_accuracy(model.classify(part.images)[1].argmax(1) == part.labels, part.labels)
        for name, part in {"accuracy of training images": train, "accuracy of held-out images": held_out}.items()
    }
    about = json.dumps({"identity": model.identity, "accuracies": accuracies}, sort_keys=True)
    atomic.write_atomic(path, save(model.state_dict(), metadata={"classifier": about}))


def held_out_part(source: Source) -> LabelledImages:
    """The held-out images that samples are compared with."""
    return labelled_part(source, MOST_HELD_OUT, held_out=True)


def _moved(images: Tensor, draw: np.random.Generator, flip: bool) -> Tensor:
    """Images (N, C, H, W), each shifted by up to a tenth of its side over a mirrored border; with `flip` half of them
    are mirrored."""
    height, width = images.shape[-2:]
    most = max(1, round(MARGIN * min(height, width)))
    padded = F.pad(images, (most,) * 4, mode="reflect")
    rows, columns = draw.integers(2 * most + 1, size=(2, len(images)))
    mirrored = draw.random(len(images)) < 0.5 * flip
    cut = [image[:, y : y + height, x : x + width] for image, y, x in zip(padded, rows, columns, strict=True)]
    return torch.stack([image.flip(-1) if mirror else image for image, mirror in zip(cut, mirrored, strict=True)])


def _read(path: Path, model: Classifier) -> Classifier:
    """The model with the weights of a file. UserError if the file is damaged, or of another source."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["classifier"])
            if not has_form(about, FORM):
                raise ValueError("its metadata has no identity and accuracies")
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot read the classifier in {path}: {str(error)[:80]}; delete the file") from None
    if about["identity"] != model.identity:
        raise UserError(f"{path} holds the classifier of other images; delete the file")
    model.identity = {**model.identity, "sha256": file_sha256(path), **about["accuracies"]}
    return model.eval()
