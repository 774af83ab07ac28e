"""Trained models: load, sample, save."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from operator import index
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dit_in_dit.config.averages import average_name
from dit_in_dit.config.errors import UserError, check_whole
from dit_in_dit.config.program import format_stages
from dit_in_dit.config.run import RunConfig
from dit_in_dit.data.encode import open_decoder
from dit_in_dit.data.labels import class_numbers
from dit_in_dit.inspection.trace import inspect
from dit_in_dit.interop.hub import push_folder
from dit_in_dit.interop.resolve import open_guide, resolve_run
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.reporting.images import Pixels, image_grid, image_png, to_image, to_pixels
from dit_in_dit.runs import atomic
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.runtime.device import pick_device
from dit_in_dit.sampling.fit import fit_to_device
from dit_in_dit.sampling.guide import Guide
from dit_in_dit.sampling.numbered import sample_batches


@dataclass(frozen=True, eq=False, repr=False)
class Pictures(Sequence[Image.Image]):
    """Samples as PIL images by number, of pixels (N, H, W, 1 or 3). A notebook shows them as a grid.

    >>> pictures = dd.load("emoji").sample(["country-flag", "face-smiling"], steps=2)
    >>> pictures[0].size, pictures.grid().size, len(pictures.trajectory())
    ((32, 32), (134, 68), 3)
    >>> pictures.save("two")
    """

    pixels: Pixels
    _steps: Callable[[], list[Pixels]] = list

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return Pictures(self.pixels[number], lambda: [step[number] for step in self._steps()])
        return to_image(self.pixels[index(number)])

    def grid(self, columns: int | None = None) -> Image.Image:
        """All in one image, about square by default."""
        return image_grid(self.pixels, columns)

    def save(self, folder: str | Path) -> None:
        """Write 000000.png and on, the files of the command `sample`, and grid.png."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, image in (("grid", self.grid()), *((f"{i:06d}", image) for i, image in enumerate(self))):
            atomic.write_atomic(Path(folder, f"{name}.png"), image_png(image))

    def trajectory(self) -> list[Pictures]:
        """The way from noise, sampled again: x_t before each step, then the samples."""
        return [Pictures(pixels) for pixels in self._steps()] or [self]

    def __repr__(self) -> str:
        return f"{len(self)} pictures, {self.pixels.shape[2]}x{self.pixels.shape[1]}"

    def _repr_png_(self) -> bytes:
        return image_png(self.grid())


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A trained model in evaluation mode: the network, its run's config, class names, folder and step.

    >>> model = dd.load("emoji")
    >>> model(torch.zeros(2, 3, 32, 32), 0.5).shape
    torch.Size([2, 3, 32, 32])
    >>> model.save_pretrained("pipeline")  # for diffusers too
    >>> dd.Model.from_pretrained("pipeline")
    pipeline: 32x32x3, 99 classes, outer*4 inner*3, 4.26 M parameters, 48.99 M MACs per image
    """

    net: NestedDiT
    config: RunConfig
    classes: tuple[str, ...]
    folder: Path
    step: int
    _kept: TemporaryDirectory[str] | None = None  # of weights that were imported
    average: str | None = None  # name of the average; None: the run's first

    def __call__(self, x: Tensor, t: Tensor | float, y: Tensor | None = None) -> Tensor:
        return self.net(x, t, y)

    def sample(
        self,
        classes: str | int | Iterable[str | int] = (),
        num: int | None = None,
        *,
        seed: int = 0,
        guidance: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        guide: Model | str | Path | None = None,
        guide_scale: float | None = None,
        internal_guidance: float | None = None,
    ) -> Pictures:
        """Samples 0 to num - 1, those of the command `sample`; latents without a VAE show their first channels.
        UserError for an unknown class, or a value that does not fit.

        Args:
            classes: names or numbers, used in rotation; empty: all.
            num: number of samples; None: one for each of `classes`, or 16.
            guidance: scale of classifier-free guidance; None: the run's.
            steps: sampler steps; None: the run's.
            sampler: name of the sampler; None: the run's.
            internal_guidance: scale of guidance by the model's own weak head; None: the run's.
            guide: weak model of the same images for autoguidance (`RUN@STEP`: an older checkpoint of a run).
            guide_scale: scale of autoguidance. None: the run's, by default 2.
        """
        keys: dict[str, Any] = {"guidance": guidance, "steps": steps, "sampler": sampler}
        keys |= {"guide_scale": guide_scale, "internal_guidance": internal_guidance}
        how = replace(self.config.sample, **{name: value for name, value in keys.items() if value is not None})
        several = isinstance(classes, Iterable) and not isinstance(classes, str) and getattr(classes, "ndim", 1) > 0
        listed: Any = () if classes is None else classes if several else [classes]
        texts = [each if isinstance(each, str) else str(check_whole(each, "a class", 0, 10**9)) for each in listed]
        numbers = [number for text in texts for number in class_numbers(text, self.classes)]
        if numbers and not self.config.model.num_classes:
            raise UserError("classes: this model was trained without labels; leave them out")
        count = len(numbers) or 16 if num is None else check_whole(num, "num", 1, 10**6)
        seed = check_whole(seed, "seed", 0, 2**63 - 1)
        config, weak = replace(self.config, sample=how), self._opened(guide)
        config = weak.checked(config, self.classes) if weak else config
        draw = partial(self._draw, config, count, seed, numbers, weak)
        return Pictures(draw(way=False)[-1], partial(draw, way=True))

    def _opened(self, guide: Model | str | Path | None) -> Guide | None:
        """The weak model of autoguidance, on this model's device."""
        if isinstance(guide, Model):
            return Guide(str(guide.folder), guide.net, guide.config, guide.classes)
        return None if guide is None else open_guide(str(guide), next(self.net.parameters()).device)

    def _draw(
        self, config: RunConfig, num: int, seed: int, classes: list[int], guide: Guide | None, *, way: bool
    ) -> list[Pixels]:
        """Pixels of the samples, with `way` after those of each step."""
        decode = open_decoder(config.data, next(self.net.parameters()).device)
        config = fit_to_device(self.net, config, guide, num=num, compiled=False)
        size, seen, drawn = config.sample.micro_batch, list[Tensor](), list[list[Pixels]]()
        watch = (lambda t, x, image: seen.append(x.cpu())) if way else None
        own: dict[str, Any] = {"seed": seed, "classes": classes, "watch": watch, "guide": guide}
        for part, x in sample_batches(self.net, config, range(num), **own):
            every = [*(each[[i % size for i in part]] for each in seen), x]
            drawn.append([to_pixels(decode.numbered(part, each, size) if decode else each) for each in every])
            seen.clear()
        return [np.concatenate(parts) for parts in zip(*drawn, strict=True)]

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Model:
        """As `load`."""
        return load(name)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a pipeline of `diffusers`, as `export --format pipeline`. Raises UserError."""
        from dit_in_dit.interop.export_pipeline import export

        export(self.folder, Path(folder), averaged=self.average or True)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload the pipeline as USER/NAME; returns its URL. Raises UserError."""
        with TemporaryDirectory() as folder:
            self.save_pretrained(pipeline := Path(folder, repo_id.rpartition("/")[2]))
            return push_folder(pipeline, repo_id, private=private)

    def __repr__(self) -> str:
        model, counts = self.config.model, inspect(self)
        size, name = "x".join(map(str, (*model.image_size, model.channels))), self.folder.resolve().name
        costs = [f"{counts[kind]['total'] / 1e6:.2f} M {what}" for kind, what in COSTS.items()]
        return f"{name}: {size}, {model.num_classes} classes, {format_stages(model.program)}, {', '.join(costs)}"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}<br>{escape(repr(inspect(self)))}</pre>"


COSTS = {"parameters": "parameters", "macs": "MACs per image"}


def load(name: str | Path, device: str = "auto", average: str | float | None = None) -> Model:
    """A trained model with its averaged weights. No code of a file is run. UserError if there is no such model.

    Args:
        name: a shipped model, a run, a folder that `export` wrote or of diffusers' DiT, a file of the official DiT or
            SiT, or a repository USER/NAME of the Hub.
        average: another average of the weights, by its decay (0.9996) or length ("length=0.1"); None: the first of
            train.ema.

    >>> dd.load("emoji").classes[:2]
    ('alphanum', 'animal-amphibian')
    """
    scratch = TemporaryDirectory()
    folder = resolve_run(str(name), Path(scratch.name))
    imported = folder.is_relative_to(scratch.name)
    if not imported:
        scratch.cleanup()
    saved = Checkpoint.open(folder)
    averaged = average is None or average_name(saved.config.train.decays[0], str(average))
    net, kept = saved.model(pick_device(device), averaged=averaged), scratch if imported else None
    return Model(
        net, saved.config, saved.classes, folder, saved.step, kept, averaged if isinstance(averaged, str) else None
    )
