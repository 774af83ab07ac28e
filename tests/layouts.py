"""Small data in the layouts of other projects, written as their official scripts write them."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

SHAPE = (4, 32, 32)
COUNT = 24


def drawn(count: int = COUNT, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def labels_of(count: int = COUNT, classes: int = 3) -> list[int]:
    return [(7 * number) % classes for number in range(count)]


def write_fast_dit(folder: Path, latents: np.ndarray, labels: list[int]) -> Path:
    """fast-DiT's extract_features.py: `np.save` of a scaled sample (1, 4, 32, 32) and of its label (1,), by step."""
    for name in ("imagenet256_features", "imagenet256_labels"):
        (folder / name).mkdir(parents=True)
    for step, (latent, label) in enumerate(zip(latents, labels, strict=True)):
        np.save(folder / f"imagenet256_features/{step}.npy", latent[None])
        np.save(folder / f"imagenet256_labels/{step}.npy", np.array([label], np.int64))
    return folder


def write_edm2(place: Path, moments: np.ndarray, labels: list[int] | None) -> Path:
    """`dataset_tool.py encode` of EDM2 and REPA: float32 (2C, h, w) by name, then dataset.json; a folder or a .zip."""
    files, rows = {}, []
    for number, array in enumerate(moments):
        name = f"{number:08d}"[:5] + f"/img-mean-std-{number:08d}.npy"
        file = io.BytesIO()
        np.save(file, torch.from_numpy(array))
        files[name] = file.getvalue()
        rows.append([name, labels[number]] if labels is not None else None)
    files["dataset.json"] = json.dumps({"labels": rows if labels is not None else None}).encode()
    if place.suffix == ".zip":
        with zipfile.ZipFile(place, mode="w", compression=zipfile.ZIP_STORED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return place
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


def write_lightning(
    folder: Path, latents: np.ndarray, flipped: np.ndarray, labels: list[int], shard: int = 10, dtype=torch.float32
) -> Path:
    """LightningDiT's extract_features.py on two processes (rank r has images r, r + 2, ...), and its statistics."""
    folder.mkdir(parents=True)
    for rank in range(2):
        mine = range(rank, len(latents), 2)
        for number, start in enumerate(range(0, len(mine), shard)):
            rows = [*mine[start : start + shard]]
            arrays = {
                "latents": torch.from_numpy(latents[rows]).to(dtype),
                "latents_flip": torch.from_numpy(flipped[rows]).to(dtype),
                "labels": torch.tensor([labels[row] for row in rows]),
            }
            about = {"total_size": f"{len(rows)}", "dtype": f"{dtype}", "device": "cpu"}
            save_file(arrays, folder / f"latents_rank{rank:02d}_shard{number:03d}.safetensors", metadata=about)
    whole = torch.from_numpy(latents)
    statistics = {name: getattr(whole, name)(dim=[0, 2, 3], keepdim=True) for name in ("mean", "std")}
    torch.save(statistics, folder / "latents_stats.pt")
    return folder


def write_idx(folder: Path, part: str, images: np.ndarray, labels: list[int], *, packed: bool = True) -> Path:
    """MNIST's idx files: a magic number, big-endian sizes, bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("images-idx3", images), ("labels-idx1", np.array(labels, np.uint8))):
        content = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()
        place = folder / f"{part}-{name}-ubyte"
        if packed:
            place.with_name(f"{place.name}.gz").write_bytes(gzip.compress(content))
        else:
            place.write_bytes(content)
    return folder


def pixels(count: int = COUNT, side: int = 32) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def write_cifar(folder: Path, *, fine: bool = False) -> Path:
    """The Hub's uoft-cs/cifar10 (img, label) or cifar100 (img, fine_label, coarse_label): parquet of each split."""
    names = [f"class {number}" for number in range(100 if fine else 10)]
    kinds = {"img": datasets.Image(), ("fine_label" if fine else "label"): datasets.ClassLabel(names=names)}
    if fine:
        kinds["coarse_label"] = datasets.ClassLabel(names=names[:20])
    inside = folder / ("cifar100" if fine else "plain_text")
    inside.mkdir(parents=True)
    for split, count in (("train", COUNT), ("test", 4)):
        rows = {
            "img": [{"bytes": png(image), "path": None} for image in pixels(count)],
            **{name: labels_of(count, 10) for name in list(kinds)[1:]},
        }
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
        table.to_parquet(inside / f"{split}-00000-of-00001.parquet")
    return folder


def write_folder(folder: Path, classes: int = 3, *, captions: bool = False) -> Path:
    for number, image in enumerate(pixels()):
        place = folder / f"class {number % classes}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(png(image))
        if captions:
            place.with_suffix(".txt").write_text("a picture")
    return folder


def write_numbered(place: Path) -> Path:
    """`dataset_tool.py convert` of EDM2 and REPA."""
    with zipfile.ZipFile(place, "w") as archive:
        rows = []
        for number, image in enumerate(pixels()):
            rows.append([f"00000/img{number:08d}.png", number % 3])
            archive.writestr(rows[-1][0], png(image))
        archive.writestr("dataset.json", json.dumps({"labels": rows}))
    return place


LAYOUTS: dict[str, Callable[[Path], object]] = {  # a data.source of docs/data.md -> what writes it
    "photos": write_folder,
    "photos-and-captions": lambda path: write_folder(path, captions=True),
    "images.zip": write_numbered,
    "set.npz": lambda path: np.savez(path, images=pixels(), labels=labels_of()),
    "mnist": lambda path: write_idx(path, "train", pixels(side=28)[..., 0], labels_of(classes=10)),
    "hf:cifar10": write_cifar,
    "hf:cifar100": lambda path: write_cifar(path, fine=True),
    "features": lambda path: write_fast_dit(path, drawn(), labels_of()),
    "edm2-latents.zip": lambda path: write_edm2(path, drawn(shape=(8, 32, 32)), labels_of()),
    "repa/vae-sd": lambda path: write_edm2(path, drawn(shape=(8, 32, 32)), labels_of()),
    "vavae/imagenet_train_256": lambda path: write_lightning(
        path, *(drawn(shape=(32, 16, 16), seed=seed) for seed in (0, 1)), labels_of()
    ),
}
