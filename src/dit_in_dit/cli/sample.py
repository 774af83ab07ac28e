"""`sample`: from a run to numbered images, by any number of processes, which may be killed and started again."""

from __future__ import annotations

import argparse
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_in_dit.cli.options import (
    Commands,
    add_device,
    add_micro_batch,
    add_num,
    add_sampling,
    add_vae,
    make_folder,
    sampling,
    whole_number,
)
from dit_in_dit.config.errors import UserError
from dit_in_dit.runs import atomic
from dit_in_dit.runs.pretrained import find_run
from dit_in_dit.runtime.process import is_main

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

GRID_MOST = 1024
IDENTITY = "samples.json"


def add(commands: Commands) -> None:
    """Add the command."""
    sample = commands.add("sample", _sample, "draw images from a trained run; drawn already, they are not drawn again")
    sample.add_argument("run_folder", type=find_run, metavar="RUN")
    add_num(sample, 64)
    add_sampling(sample)
    add_micro_batch(sample)
    sample.add_argument(
        "--batch",
        type=whole_number,
        default=1,
        help="images that a process draws and then writes, in whole micro-batches; changes no byte (default: one)",
    )
    add_vae(sample)
    add_device(sample)
    sample.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the images (default samples/RUN, with what is given besides: samples/RUN-seed5)",
    )


def _sample(options: argparse.Namespace) -> None:
    """Numbered PNGs (latents: .npy), this process's share; process 0 then makes the grid (and samples.npz)."""
    from rich.console import Console
    from rich.progress import Progress

    from dit_in_dit.data.encode import decoder
    from dit_in_dit.runs import shards
    from dit_in_dit.runs.checkpoint import Checkpoint
    from dit_in_dit.runtime.device import pick_device
    from dit_in_dit.sampling.numbered import sample_batches, sampling_protocol

    device = pick_device(options.device)
    saved = Checkpoint.open(options.run_folder)
    model = saved.model(device, averaged=not options.raw)
    config, classes = sampling(options, saved.config, saved.classes)
    decode = decoder(replace(config.data, vae=options.vae or config.data.vae), device)
    out: Path = options.out or Path("samples", _default_name(options))
    make_folder(out)
    latents = decode is None and config.model.channels not in (1, 3)

    def path(index: int) -> Path:
        return out / f"{index:06d}.{'npy' if latents else 'png'}"

    if not (out / IDENTITY).exists():
        foreign = next((path(index) for index in range(options.num) if path(index).exists()), None)
        # Asked again: another process may have begun meanwhile, and it says what it draws before it draws.
        if foreign and not (out / IDENTITY).exists():
            raise UserError(f"{foreign} was not drawn by this command: remove it, or choose another --out")
    names = [saved.classes[c] for c in classes] or "all in turn"
    labels = names if config.model.num_classes else "none"
    identity = {
        "step": saved.step,
        "config": saved.manifest["config"],
        "checkpoint": saved.sha256(averaged=not options.raw),
        "samples": sampling_protocol(config, labels=labels, averaged=not options.raw, seed=options.seed),
        "micro_batch": config.sample.micro_batch,
        "made on": _made_on(device),
        **({"vae": decode.about()} if decode else {}),
    }
    shards.claim(out / IDENTITY, identity)

    def there(part: range) -> bool:
        return all(path(index).exists() for index in part)

    def make(part: range) -> None:
        missing = [index for index in part if not path(index).exists()]
        for indices, drawn in list(sample_batches(model, config, missing, seed=options.seed, classes=classes)):
            images = decode.numbered(indices, drawn, size) if decode else drawn
            for index, image in zip(indices, images, strict=True):
                atomic.write_atomic(path(index), _encoded(image, latents))

    size = config.sample.micro_batch
    shared = shards.share(options.num, -(-options.batch // size) * size, there, make)
    if not is_main():
        for _ in shared:
            pass
        return
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("sampling", total=options.num)
        for done in shared:
            bar.update(task, completed=done)
    there_are = options.num
    while path(there_are).exists():  # more were drawn before: the grid shows them too
        there_are += 1
    _finish(out, [path(index) for index in range(there_are)], latents)
    print(f"{options.num} samples and grid.png in {out}")


def _default_name(options: argparse.Namespace) -> str:
    """The run's name and the options that change the samples, such as `emoji-seed5`: each kind has its own folder."""
    given = {name: getattr(options, name) for name in ("classes", "steps", "sampler", "guidance", "micro_batch", "vae")}
    words = [f"seed{options.seed}"] if options.seed else []
    words += [f"{name.replace('_', '-')}{value}" for name, value in given.items() if value is not None]
    words += ["raw"] if options.raw else []
    return "-".join([options.run_folder.resolve().name, *(re.sub(r"[^\w.+]+", "_", word)[:40] for word in words)])


def _made_on(device: torch.device) -> dict[str, str]:
    """What else the last bits depend on: the number of CPU threads did not matter (docs/decisions/sampling.md)."""
    import torch

    from dit_in_dit.runtime.precision import FULL

    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
    return {"device": name, "torch": torch.__version__, **({"precision": FULL} if gpu else {})}


def _encoded(image: Tensor, latents: bool) -> bytes:
    """An image (C, H, W) as the bytes of a .png, or of a .npy."""
    import numpy as np

    from dit_in_dit.reporting.images import check_finite, image_png, picture, to_pixels

    check_finite(image[None])
    if not latents:
        return image_png(picture(to_pixels(image[None])[0]))
    np.save(content := io.BytesIO(), image.numpy())
    return content.getvalue()


def _finish(out: Path, paths: list[Path], latents: bool) -> None:
    """The grid and, of latents, all in one array; what killed processes had begun to write goes away."""
    import numpy as np
    import torch

    from dit_in_dit.reporting.images import image_grid, image_png, to_pixels

    if latents:
        images = np.stack([_read(path) for path in paths])
        with atomic.file(out / "samples.npz") as file:
            np.savez(file, images=images)
        shown = to_pixels(torch.from_numpy(images[:GRID_MOST]))
    else:
        shown = np.stack([_read(path) for path in paths[:GRID_MOST]])
    atomic.write_atomic(out / "grid.png", image_png(image_grid(shown)))
    atomic.clear_temporary(out, {path.name for path in paths})  # of no others: another process may draw more


def _read(path: Path) -> NDArray[Any]:
    """The array of a .npy, or pixels (H, W, 1 or 3) of a .png; UserError when it is damaged."""
    import numpy as np
    from PIL import Image

    try:
        if path.suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False))
        pixels = np.asarray(Image.open(path))
        return pixels if pixels.ndim == 3 else pixels[..., None]
    except (OSError, ValueError, EOFError):
        raise UserError(f"{path} is damaged: remove it and run again") from None
