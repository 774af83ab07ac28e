"""Numbered samples as files in a folder. Any number of processes fill the folder, and can be killed and resumed."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig
from dit_in_dit.model.compiled import is_compiled
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.reporting.images import check_finite, image_grid, image_png, side_by_side, to_image, to_pixels
from dit_in_dit.runs import atomic, shards
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.runtime.device import resolve_sample_precision
from dit_in_dit.runtime.precision import FULL
from dit_in_dit.runtime.process import is_main
from dit_in_dit.sampling.guide import Guide
from dit_in_dit.sampling.numbered import class_of, sample_batches, sampling_protocol

GRID_MOST = 1024  # images in grid.png
FRAMES, FILM_PIXELS = 40, 2**19  # most frames of a film; pixels of all images of a frame
IDENTITY = "samples.json"


class ImageDecoder(Protocol):
    """Decodes latents into images."""

    factor: int  # pixels per latent pixel, along a side

    def numbered(self, indices: Sequence[int], latents: Tensor, size: int) -> Tensor:
        """Images (n, 3, H, W) of the samples `indices`, from latents (n, C, h, w); all samples are in one
        micro-batch of `size`."""

    def about(self) -> dict[str, Any]:
        """Everything that the images depend on, as JSON holds it."""


@dataclass(frozen=True)
class SampleFolder:
    """A folder of a run's samples: `000000.png` and on (.npy for latents without a decoder), and `grid.png`."""

    out: Path
    saved: Checkpoint  # the checkpoint whose weights `model` has
    model: NestedDiT
    config: RunConfig  # how to sample; its `diffusion` and `sample` are used
    classes: Sequence[int] = ()  # class numbers, used cyclically; empty: all classes
    seed: int = 0
    averaged: bool | str = True  # the model has the averaged weights, or the average of this name
    decode: ImageDecoder | None = None
    scale: int | None = None  # of the images in grid.png, as for `image_grid`
    guide: Guide | None = None

    def _names(self, count: int) -> list[str]:
        """Class names of the first samples; empty without labels."""
        turns = self.classes or range(self.config.model.num_classes)
        return [self.saved.classes[class_of(index, turns)] for index in range(count)] if turns else []

    @property
    def latents(self) -> bool:
        """Whether the files hold latents."""
        return self.decode is None and self.config.model.channels not in (1, 3)

    def path(self, index: int) -> Path:
        """The file of sample `index`."""
        return self.out / f"{index:06d}.{'npy' if self.latents else 'png'}"

    def fill(self, num: int, batch: int = 1) -> Iterator[int]:
        """Check the folder, then write this process's share of the missing samples among the first `num`. Yields the
        number of existing samples until all exist.

        Process 0 then writes a grid of all samples in the folder and, if the samples are latents, `samples.npz`.

        Args:
            batch: images to generate between writes, rounded up to whole micro-batches.

        Raises:
            UserError: the folder holds other images, a file in it is damaged, another process stopped, or the guide
                does not fit the model.
        """
        if self.guide:
            self.guide.checked(self.config, self.saved.classes)
        self._claim(num)
        return self._fill(num, batch)

    def _fill(self, num: int, batch: int) -> Iterator[int]:
        size = self.config.sample.micro_batch
        yield from shards.share_work(num, -(-batch // size) * size, self._exists, self._draw)
        if is_main():
            count = num
            while self.path(count).exists():  # an earlier call drew more: the grid shows them too
                count += 1
            self._finish([self.path(index) for index in range(count)])

    def frames(self, num: int) -> list[Image.Image]:
        """The way from noise to the first `num` samples, or fewer if they are large, as at most FRAMES + 1 pictures.

        A picture shows x_t and the image estimate, the last one the samples, which are drawn again in one batch.
        """
        scale, model = self.decode.factor if self.decode else 1, self.config.model
        count = min(num, 64, max(4, FILM_PIXELS // (model.image_size[0] * model.image_size[1] * scale**2)))
        config = replace(self.config, sample=replace(self.config.sample, micro_batch=count))
        frames: list[Image.Image] = []

        def add_frame(t: float, *shown: Tensor) -> None:
            if t > 1 - len(frames) / FRAMES:  # the sampler has more steps than the film has frames
                return
            grids = []
            for x in (each.cpu() for each in shown):
                pixels = to_pixels(self.decode.numbered(range(count), x, count) if self.decode else x)
                grids.append(image_grid(pixels, scale=self.scale, names=self._names(count)))
            frames.append(side_by_side(dict(zip((f"x, t = {t:.2f}", "estimate"), grids, strict=True))))

        batches = sample_batches(
            self.model, config, range(count), seed=self.seed, classes=self.classes, watch=add_frame, guide=self.guide
        )
        _, images = next(batches)
        add_frame(0.0, images, images)
        return frames

    def _claim(self, num: int) -> None:
        """Record what the samples depend on; UserError if images in the folder depend on something else."""
        if not (self.out / IDENTITY).exists():
            foreign = next((self.path(index) for index in range(num) if self.path(index).exists()), None)
            # Looked for again: another process may have begun meanwhile, and it writes the identity first.
            if foreign and not (self.out / IDENTITY).exists():
                raise UserError(f"{foreign} was not written by this command: remove it, or choose another --out")
        names = [self.saved.classes[c] for c in self.classes] or "all in turn"
        labels = names if self.config.model.num_classes else "none"
        device = next(self.model.parameters()).device
        config = resolve_sample_precision(self.config, device)
        identity = {
            "step": self.saved.step,
            "config": self.saved.manifest["config"],
            "checkpoint": self.saved.sha256(averaged=self.averaged),
            "samples": sampling_protocol(
                config, labels=labels, averaged=self.averaged, seed=self.seed, guide=self.guide
            ),
            "micro_batch": self.config.sample.micro_batch,
            "made on": _machine(device) | ({"compiled": True} if is_compiled(self.model) else {}),
            **({"vae": self.decode.about()} if self.decode else {}),
        }
        shards.claim_folder(self.out / IDENTITY, identity)

    def _exists(self, part: range) -> bool:
        return all(self.path(index).exists() for index in part)

    def _draw(self, part: range) -> None:
        missing = [index for index in part if not self.path(index).exists()]
        own: dict[str, Any] = {"seed": self.seed, "classes": self.classes, "guide": self.guide}
        batches = sample_batches(self.model, self.config, missing, **own)
        for indices, drawn in list(batches):
            size = self.config.sample.micro_batch
            images = self.decode.numbered(indices, drawn, size) if self.decode else drawn
            for index, image in zip(indices, images, strict=True):
                atomic.write_atomic(self.path(index), _encoded(image, self.latents))

    def _finish(self, paths: list[Path]) -> None:
        """Write the grid, and all latents as one array; delete incomplete copies that killed processes left."""
        out = self.out
        if self.latents:
            images = np.stack([_read(path) for path in paths])
            with atomic.file(out / "samples.npz") as file:
                np.savez(file, images=images)
            shown = to_pixels(torch.from_numpy(images[:GRID_MOST]))
        else:
            shown = np.stack([_read(path) for path in paths[:GRID_MOST]])
        grid = image_grid(shown, scale=self.scale, names=self._names(len(shown)))
        atomic.write_atomic(out / "grid.png", image_png(grid))
        atomic.clear_temporary(out, {path.name for path in paths})  # of these only: others may still be drawn


def film(frames: Sequence[Image.Image], kind: str, **options: Any) -> bytes:
    """Pictures of one size as the bytes of an animated gif or webp (`kind`); the last is held for 2.5 s.

    Args:
        options: of Pillow's writer, such as `quality` of a webp.
    """
    durations = [*[80] * (len(frames) - 1), 2500]  # milliseconds
    first, *others = frames
    written = io.BytesIO()
    first.save(written, kind, save_all=True, append_images=others, duration=durations, loop=0, **options)
    return written.getvalue()


def _machine(device: torch.device) -> dict[str, Any]:
    """The machine: the last bits depend on it, but not on the number of CPU threads (docs/decisions/sampling.md)."""
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
    return {"device": name, "torch": torch.__version__, **({"precision": FULL} if gpu else {})}


def _encoded(image: Tensor, latents: bool) -> bytes:
    """An image (C, H, W) in [-1, 1] as the bytes of a .png; latents as the bytes of a .npy."""
    check_finite(image[None])
    if not latents:
        return image_png(to_image(to_pixels(image[None])[0]))
    np.save(content := io.BytesIO(), image.numpy())
    return content.getvalue()


def _read(path: Path) -> NDArray[Any]:
    """The array of a .npy, or pixels (H, W, 1 or 3) of a .png; UserError if the file is damaged."""
    try:
        array = np.asarray(np.load(path, allow_pickle=False) if path.suffix == ".npy" else Image.open(path))
    except (OSError, ValueError, EOFError):
        raise UserError(f"{path} is damaged: remove it and run again") from None
    return array[..., None] if array.ndim == 2 else array
