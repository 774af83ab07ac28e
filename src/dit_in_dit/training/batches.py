"""Training examples: image, flip, noise, time and dropped label of example i are functions of (seed, i)."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import ModelConfig, RunConfig
from dit_in_dit.data.augment import augment, check_augmentation, draw_augmentation
from dit_in_dit.data.features import open_features
from dit_in_dit.data.picture import Array, as_float
from dit_in_dit.data.source import Source
from dit_in_dit.data.source_checks import check_example
from dit_in_dit.diffusion.objective import draw_time
from dit_in_dit.diffusion.path import make_path
from dit_in_dit.runtime.philox import normal
from dit_in_dit.runtime.seeding import generator
from dit_in_dit.training.balance import balanced_order

PCA_IMAGES = 10_000  # most training images from which `principal_patches` computes, as in AsymFlow's code


class Batch(NamedTuple):
    """Consecutive examples: images and noise (N, C, H, W), then times, labels, image numbers and example numbers, each
    (N,), and features (N, F, g, g) of the images: (N, 0) if no term of the loss needs them."""

    x: Tensor
    noise: Tensor
    t: Tensor
    y: Tensor
    image: Tensor
    example: Tensor
    features: Tensor = torch.empty(0)

    def unpack(self, seed: int, device: torch.device) -> Batch:
        """The batch on `device`."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))


class Packed(NamedTuple):
    """A batch as it crosses to the device: images as they are stored, and no noise with train.noise=device."""

    x: Tensor  # uint8 pixels, float16 or float32
    noise: Tensor | None
    t: Tensor
    y: Tensor
    image: Tensor
    example: Tensor  # numbers of the examples (N,)
    features: Tensor | None = None  # float16

    def unpack(self, seed: int, device: torch.device) -> Batch:
        """The batch on `device`: the run's `seed` and the examples' numbers give the noise that is not here."""

        def move(part: Tensor) -> Tensor:
            return part.to(device, non_blocking=True)

        x = move(self.x)
        if x.dtype == torch.uint8:
            # CUDA multiplies by the inverse of a number that is on the host: other bits than a division.
            x = x.float().div_(torch.full((), 127.5, device=device)).sub_(1)
        example = move(self.example)
        noise = normal(seed, "noise", example, x.shape[1:]) if self.noise is None else move(self.noise)
        features = x.new_empty(len(x), 0) if self.features is None else move(self.features)
        return Batch(x.float(), noise, move(self.t), move(self.y), move(self.image), example, features)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    return generator(seed, "order", epoch).permutation(size)


def shuffled_index(seed: int, index: int, size: int | None) -> int:
    """Number of the training image that example `index` shows: each image once per epoch, or any image of an endless
    source (`size` None)."""
    if size is None:
        return int(generator(seed, "order", index).integers(2**62))
    epoch, position = divmod(index, size)
    return int(_order(seed, epoch, size)[position])


class Examples(Dataset[Batch]):
    """Micro-batches of process `rank` of `world`, by number. In a single process, micro-batch k
    starts with example k * batch_size.

    Every process has an equal share of a step's examples: with train.reduction=fast some rows of each micro-batch, with
    train.reduction=fixed whole micro-batches.
    """

    def __init__(self, source: Source, config: RunConfig, rank: int = 0, world: int = 1) -> None:
        self.source, self.config = source, config
        self.rank, self.world = rank, world
        self.path = make_path(config.diffusion)
        self.balanced, self.features = balanced_order(config, source), open_features(config, source)
        self.augments = check_augmentation(config, source)

    @property
    def per_step(self) -> int:
        """Number of micro-batches of this process per optimizer step."""
        train = self.config.train
        return train.accumulate // self.world if train.reduction == "fixed" else train.accumulate

    def indices(self, number: int) -> range:
        """Numbers of the training examples in this process's micro-batch `number`."""
        train = self.config.train
        if train.reduction == "fixed":
            step, turn = divmod(number, self.per_step)
            first = (step * train.accumulate + self.rank * self.per_step + turn) * train.batch_size
            return range(first, first + train.batch_size)
        rows = train.batch_size // self.world
        first = number * train.batch_size + self.rank * rows
        return range(first, first + rows)

    def image_of(self, index: int) -> int:
        """Number of the training image that example `index` shows."""
        return (self.balanced or partial(shuffled_index, self.config.seed, size=self.source.train_size))(index)

    def __getitem__(self, number: int) -> Batch:
        """Micro-batch `number`; UserError if an image cannot be read or does not fit the model."""
        return self.packed(number).unpack(self.config.seed, torch.device("cpu"))

    def packed(self, number: int) -> Packed:
        """Micro-batch `number` in as few bytes as possible; errors as for `__getitem__`."""
        config = self.config
        drop, flip = config.train.label_drop, config.data.flip
        images, noises, uniforms, labels, numbers, features = [], [], [], [], [], []
        changes = draw_augmentation(config, torch.tensor(self.indices(number))).tolist() if self.augments else []
        for place, index in enumerate(self.indices(number)):
            chosen = self.image_of(index)
            u_flip, u_drop, u_time = generator(config.seed, "example", index).random(3)
            stream = partial(generator, config.seed, "source", index)
            drawn = self.source.stored_example(chosen, stream, flip=flip and u_flip < 0.5)
            image, label = check_example(self.source, drawn, config.model, stored=True)
            images.append(augment(image, config.data.augment_kind, changes[place]) if changes else image)
            labels.append(config.model.num_classes if u_drop < drop or not config.model.num_classes else label)
            uniforms.append(u_time)
            if config.train.noise == "host":
                noises.append(generator(config.seed, "noise", index).standard_normal(image.shape, np.float32))
            numbers.append(chosen)
            if self.features:
                features.append(self.features(chosen, flip=flip and u_flip < 0.5))
        if len({image.dtype for image in images}) > 1:  # a user's dataset may hold pixels and floats
            images = [as_float(image) for image in images]
        stacked = np.empty((len(images), *config.model.image_shape), images[0].dtype)  # contiguous: images may not be
        return Packed(
            torch.from_numpy(np.stack(images, out=stacked)),
            torch.from_numpy(np.stack(noises)) if noises else None,
            draw_time(self.path, torch.tensor(uniforms, dtype=torch.float64), config.diffusion),
            torch.tensor(labels),
            torch.tensor(numbers),
            torch.tensor(self.indices(number)),
            torch.from_numpy(np.stack(features)) if features else None,
        )


class _Messages(Dataset["Packed | str"]):
    """Like `Examples`, but returns the message of a UserError: an error that a worker raises would be altered."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __getitem__(self, number: int) -> Packed | str:
        try:
            return self.examples.packed(number)
        except UserError as error:
            return str(error)


def _begin_worker(_: int) -> None:
    """Ignore signals in a loader worker: the trainer answers them, and needs its workers until the step ends.

    When the trainer ends, it closes the connection to its workers. The error that this causes in the thread that sends
    batches is not printed. (Other errors of a worker go to the trainer, and never to this hook.)
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def complain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = complain


def load_batches(examples: Examples, first: int, last: int, workers: int, *, pin: bool) -> DataLoader[Packed | str]:
    """Micro-batches `first` to `last` - 1 in order, prepared by `workers` processes. If a
    micro-batch cannot be read, the error message takes its place."""
    return DataLoader(
        _Messages(examples),
        batch_size=None,
        sampler=range(first, last),
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # its own generator: iterating must not draw from the global one
        persistent_workers=False,
    )


def end_workers(batches: Iterator[Packed | str]) -> None:
    """End the workers of an iterator over `load_batches`.

    Python ends its child processes by SIGTERM, which these workers ignore: Python would wait for them forever.
    """
    if shutdown := getattr(batches, "_shutdown_workers", None):
        shutdown()
    for worker in getattr(batches, "_workers", ()):
        worker.kill()  # a worker may still wait for its data


class Unpacker:
    """Brings batches to the device. On CUDA this runs on a stream of its own: while the device computes a step, the
    next batch is copied from pinned memory, and its noise is made."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.device = seed, device
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, given: Packed | Batch) -> Batch:
        """The batch, which the device's current stream can use."""
        if self.stream is None:
            return given.unpack(self.seed, self.device)
        with torch.cuda.stream(self.stream):
            batch = given.unpack(self.seed, self.device)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for part in batch:
            part.record_stream(current)  # its memory is not used again before the current stream has read it
        return batch


def held_out_batch(source: Source, model: ModelConfig, most: int) -> Batch:
    """The first `most` held-out images, with the same noise in every run; the evaluation sets the times."""
    numbers = range(min(most, source.held_out_size))
    return with_held_out_noise([check_example(source, source.held_out(i), model) for i in numbers], numbers, model)


def with_held_out_noise(drawn: Sequence[tuple[Array, int]], numbers: Sequence[int], model: ModelConfig) -> Batch:
    """Images and labels with the noise that these numbers have in every held-out evaluation, at t = 0."""
    noises = [generator(0, "held_out", n).standard_normal(drawn[0][0].shape, np.float32) for n in numbers]
    return Batch(
        torch.from_numpy(np.stack([image for image, _ in drawn])),
        torch.from_numpy(np.stack(noises)),
        torch.zeros(len(drawn)),
        torch.tensor([label if model.num_classes else 0 for _, label in drawn]),
        torch.tensor(numbers),
        torch.tensor(numbers),
        torch.empty(len(drawn), 0),
    )


def principal_patches(source: Source, model: ModelConfig, rank: int) -> Tensor:
    """Orthonormal rows (rank, C*p*p) that hold most of the mean square of patches of evenly spaced training images."""
    size, p = source.train_size or PCA_IMAGES, model.patch_size
    gram = torch.zeros([model.channels * p * p] * 2, dtype=torch.float64)
    for number in range(count := min(size, PCA_IMAGES)):
        image, _ = check_example(source, source.train(number * size // count), model)
        patches = rearrange(torch.from_numpy(image).double(), "c (h p) (w q) -> (h w) (c p q)", p=p, q=p)
        gram.addmm_(patches.T, patches)
    return torch.linalg.eigh(gram)[1][:, -rank:].T.contiguous().float()
