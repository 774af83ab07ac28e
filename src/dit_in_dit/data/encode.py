"""Encode images to latents before training, and decode samples, with a VAE of the `diffusers` library.

Latents are stored in files of `shard` images, each written to a temporary name and renamed. Existing files are kept.
File k belongs to process k modulo the number of processes (`RANK`, `WORLD_SIZE`). The last bit of a latent can depend
on which images share its batch. The batch of an image depends only on the image's number, so interruptions and the
number of processes change nothing.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.run import DataConfig, ModelConfig
from dit_in_dit.data.formats.latents import FORMAT, LATENTS_INDEX, LOG_VARIANCE, load_index, open_shard
from dit_in_dit.data.groups import family_number
from dit_in_dit.data.source import Source
from dit_in_dit.data.sources import count_classes, fill_latent_keys, open_source
from dit_in_dit.data.vae import downsampling_factor, latent_constants, load_vae, posterior_moments, weights_sha256
from dit_in_dit.runs import atomic, shards
from dit_in_dit.runs.integrity import file_sha256
from dit_in_dit.runtime import process

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DATA = "data_sha256"  # key of the images' digest (data/digest.py); earlier versions wrote none
PATIENCE = 3600  # seconds to wait for a new file of another process


@dataclass(frozen=True)
class Encoding:
    """Settings of an encoding. All settings except `workers` determine the bytes of the files.

    data: the images; its held_out, flip and latent keys have no effect.
    size: height and width to which images are resized and cropped.
    shard: images per file, a multiple of `batch`.
    """

    data: DataConfig
    vae: str
    size: tuple[int, int]
    dtype: str = "float16"
    flips: bool = True
    batch: int = 32
    shard: int = 2048
    workers: int = 0


# ------------------------------------------------------------------------------------------ encode


def encode(how: Encoding, out: Path, device: torch.device) -> Iterator[tuple[int, int]]:
    """Write latents into the folder `out` until its index is complete; yields (images done, all images).

    Raises:
        UserError: the images or the VAE cannot be used, or the folder holds other latents or a damaged file.
    """
    vae = load_vae(how.vae, device)
    source, families = all_images(how)
    index = {"format": FORMAT, "made": _made(how, vae, source, len(families)), "classes": list(source.classes)}
    mean, scale = latent_constants(vae)
    index |= {"vae": {"name": how.vae, "mean": mean, "scale": scale}, "measured": {}, "shards": []}
    done = _begin(out, index)

    def make(parts: list[range]) -> Iterator[dict[str, Tensor]]:
        encoded = encode_parts(source, how, parts, lambda images, numbers: _stored(vae, images, numbers, how.dtype))
        for part, tensors in zip(parts, encoded, strict=True):
            families_of = np.array([family_number(families[n]) for n in part], np.uint64)
            yield {**tensors, "family": torch.from_numpy(families_of)}

    paths = part_paths(out, len(families), how.shard)
    yield from write_parts(paths, make)
    if process.rank() == 0:
        _finish(out, index, [*paths.values()], done)


def part_paths(out: Path, count: int, size: int, prefix: str = "") -> dict[range, Path]:
    """The file of each `size` of `count` images."""
    parts = [range(count)[start : start + size] for start in range(0, count, size)]
    return {part: out / f"{prefix}{number:06d}.safetensors" for number, part in enumerate(parts)}


def write_parts(
    paths: dict[range, Path], make: Callable[[list[range]], Iterator[dict[str, Tensor]]]
) -> Iterator[tuple[int, int]]:
    """Write this process's share of the missing files, then wait for those of other processes; yields (images done, all
    images). `make` gives the tensors of each part's file, in order."""
    parts, total = list(paths), sum(map(len, paths))
    mine = [part for part in parts[process.rank() :: process.world_size()] if not paths[part].exists()]
    count = sum(len(part) for part in parts if paths[part].exists())
    yield count, total
    for part, tensors in zip(mine, make(mine), strict=True):
        atomic.write_atomic(paths[part], save(tensors))
        count += len(part)
        yield count, total
    where = next(iter(paths.values())).parent
    for left in shards.wait_for_missing(
        parts, lambda part: paths[part].exists(), PATIENCE, lambda left: f"{len(left)} files of {where}"
    ):
        yield total - sum(map(len, left)), total


def all_images(how: Encoding) -> tuple[Source, list[str]]:
    """All images, as training images, and their families."""
    data = replace(how.data, held_out=0.0, flip=False)
    model = ModelConfig(image_size=how.size, channels=3, patch_size=1, num_classes=count_classes(how.data))
    source = open_source(data, model)
    if source.train_size is None:
        raise UserError(f"data: {how.data.source} is endless: its images cannot all be encoded; name a finite source")
    families = getattr(source, "families", None) or [str(number) for number in range(source.train_size)]
    return source, families


def _made(how: Encoding, vae: Any, source: Source, count: int) -> dict[str, Any]:
    """The source of the images, and the settings that decide the bytes of the files."""
    side_of = downsampling_factor(vae)
    only = getattr(vae, "decoder_image_size", 0)  # of an AutoencoderRAE
    if any(side % side_of or side != (only or side) for side in how.size):
        wanted = only or f"a multiple of {side_of}"
        raise UserError(f"--size must be {wanted} for this VAE: got {how.size[0]}x{how.size[1]}")
    if how.shard % how.batch:
        raise UserError(f"--shard must be a multiple of --batch: got {how.shard} and {how.batch}")
    data = how.data
    return {
        **{"source": data.source, "split": data.split, "size": list(how.size), "count": count, "corrupt": data.corrupt},
        **{"vae_sha256": weights_sha256(vae), "dtype": how.dtype, "flips": how.flips},
        **{"batch": how.batch, "shard": how.shard, DATA: source.digest},
        "shape": [vae.config.latent_channels, *(side // side_of for side in how.size)],
    }


def _begin(out: Path, index: dict[str, Any]) -> list[dict[str, Any]]:
    """Write an unfinished index unless an index exists; return the files that a finished index lists.

    An index of an earlier version has no digest. Images are then compared only by name and count, and the digest is
    removed from `index`, because some files may have been made from other images.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        atomic.write_atomic(out / LATENTS_INDEX, json.dumps(index, indent=1), once=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error}") from None
    stored = load_index(out)
    made, before = index["made"], stored["made"]
    if DATA not in before:
        del made[DATA]
    elif before[DATA] != made[DATA]:
        raise UserError(
            f"{truncate(out, 60)} holds latents of images that {truncate(made['source'], 60)} no longer has: "
            "put the former images back, choose another --out, or delete it"
        )
    for name, value in made.items():
        if name == "source" and DATA in made:  # the same images may have moved
            continue
        if before.get(name) != value:
            raise UserError(
                f"{out} holds other latents: {name} is {before.get(name)}, not {value}; choose another --out"
            )
    return list(stored["shards"])


class _Batches(Dataset["tuple[Tensor, Tensor] | str"]):
    """Images (n, 3, H, W) and labels by batch number. A worker returns the message of a UserError as a value."""

    def __init__(self, source: Source, batches: list[range]) -> None:
        self.source, self.batches = source, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | str:
        try:
            drawn = [self.source.train(index) for index in self.batches[number]]
        except UserError as error:
            return str(error)
        return torch.from_numpy(np.stack([image for image, _ in drawn])), torch.tensor([label for _, label in drawn])


def encode_parts(
    source: Source, how: Encoding, parts: list[range], encode_batch: Callable[[Tensor, range], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Encode the images of each part, by a function of images (n, 3, H, W) and their numbers; yields `moments`, `label`
    and, with `how.flips`, `flipped` of each part, in order."""
    cut = [[part[i : i + how.batch] for i in range(0, len(part), how.batch)] for part in parts]
    batches = _Batches(source, [batch for part in cut for batch in part])
    loader = iter(DataLoader(batches, batch_size=None, num_workers=how.workers, generator=torch.Generator()))
    for part in cut:
        rows = defaultdict[str, list[Tensor]](list)
        for numbers in part:
            batch = next(loader)
            if isinstance(batch, str):
                raise UserError(batch)
            images, labels = batch
            rows["label"].append(labels)
            rows["moments"].append(encode_batch(images, numbers))
            if how.flips:
                rows["flipped"].append(encode_batch(images.flip(-1), numbers))
        yield {name: torch.cat(rows.pop(name)).contiguous() for name in list(rows)}  # each freed once it is joined


def _stored(vae: Any, images: Tensor, numbers: range, dtype: str) -> Tensor:
    """Moments of images in the stored dtype; a UserError names images whose moments are not finite in it."""
    exact = posterior_moments(vae, images)
    for tensor, of in ((exact, "the VAE gives no finite latents"), (exact.to(DTYPES[dtype]), None)):
        finite = tensor.isfinite().flatten(1).all(1)
        if finite.all():
            continue
        bad = [str(number) for number, fine in zip(numbers, finite.tolist(), strict=True) if not fine]
        which = f"image {', '.join(bad[:3])}{' and more' if bad[3:] else ''} (counted from 0)"
        if of:
            raise UserError(f"{of} for {which}: use another VAE, or float32 weights of this VAE")
        raise UserError(f"the VAE's latents of {which} do not fit {dtype}: use --dtype float32 or bfloat16")
    return tensor


def _finish(out: Path, index: dict[str, Any], paths: list[Path], done: list[dict[str, Any]]) -> None:
    """Complete the index with the files' SHA-256 and the measured mean and deviation.

    Raises:
        UserError: a file differs from its entry in `done`, the files of an index that was complete already.
    """
    entries: list[dict[str, Any]] = []
    counts, sums = 0, np.zeros((3, index["made"]["shape"][0]))
    for path in paths:
        arrays = open_shard(path)
        entries.append({"file": path.name, "count": len(arrays["label"]), "sha256": file_sha256(path)})
        for name in ("moments", "flipped")[: 1 + index["made"]["flips"]]:
            moments = torch.tensor(arrays[name]).view(DTYPES[index["made"]["dtype"]])  # bfloat16 is given as uint16
            mean, log_variance = np.split(moments.double().numpy(), 2, axis=1)
            variance = np.exp(np.clip(log_variance, *LOG_VARIANCE))
            sums += [part.sum((0, 2, 3)) for part in (mean, mean**2, variance)]
            counts += mean[:, 0].size
    for was, entry, path in zip(done, entries, paths, strict=False):
        if was != entry:
            raise UserError(f"{path} is damaged: its SHA-256 differs from the index; remove the file and run again")
    first, second, spread = sums / counts
    deviation = np.sqrt(second - first**2 + spread)  # of latents drawn from their posteriors
    index |= {"measured": {"mean": first.tolist(), "deviation": deviation.tolist()}, "shards": entries}
    atomic.clear_temporary(out, {LATENTS_INDEX, *(path.name for path in paths)})
    atomic.write_atomic(out / LATENTS_INDEX, json.dumps(index, indent=1))


# ------------------------------------------------------------------------------------------ decode


class LatentDecoder:
    """A decoder with the VAE of a run, from normalised latents to images."""

    def __init__(self, data: DataConfig, device: torch.device) -> None:
        assert data.vae is not None
        self.vae = load_vae(data.vae, device)
        self.factor = downsampling_factor(self.vae)
        mean, scale = latent_constants(self.vae)
        self.constants = {"mean": list(data.latent_mean or mean), "scale": list(data.latent_scale or scale)}
        self.mean, self.scale = (torch.tensor(c, device=device).view(1, -1, 1, 1) for c in self.constants.values())

    def about(self) -> dict[str, Any]:
        """SHA-256 of the VAE, mean and scale: all that decides the decoded images."""
        return {"sha256": weights_sha256(self.vae), **self.constants}

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> Tensor:
        """Images (N, 3, H, W) on the CPU, roughly in [-1, 1], from normalised latents (N, C, h, w)."""
        images: Tensor = self.vae.decode(latents.to(self.mean.device) / self.scale + self.mean).sample
        return images.cpu()

    def numbered(self, indices: Sequence[int], latents: Tensor, size: int) -> Tensor:
        """Images of the samples in one micro-batch. Each sample is decoded at its own position in a batch of `size`, so
        the bits of its image do not depend on which other samples are decoded.
        """
        whole = latents.new_zeros(size, *latents.shape[1:])
        places = [index % size for index in indices]
        whole[places] = latents
        return self(whole)[places]


@lru_cache(maxsize=1)
def open_decoder(data: DataConfig, device: torch.device) -> LatentDecoder | None:
    """The decoder of a run, cached; None for a run on pixels, or on latents without a known VAE."""
    data = fill_latent_keys(data)
    return LatentDecoder(data, device) if data.vae is not None else None
