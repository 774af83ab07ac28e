"""Data in the layouts of other projects: values as written, one-line errors for damage, each row of docs/data.md."""

from __future__ import annotations

import gzip
import json
import pickle
import re
import shlex
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from conftest import small_model
from dit_in_dit.cli import main
from dit_in_dit.config.errors import LeftOutWarning, UserError
from dit_in_dit.config.run import DataConfig, RunConfig
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.data.encode import Encoding, encode, open_decoder
from dit_in_dit.data.source import Source
from dit_in_dit.data.sources import count_classes, fill_latent_keys, open_source, size_of, source_kind
from dit_in_dit.metrics.subject import Subject, reference
from dit_in_dit.runs.folder import read_config
from dit_in_dit.training.loop import train
from layouts import (
    COUNT,
    LAYOUTS,
    SHAPE,
    drawn,
    labels_of,
    pixels,
    png,
    write_cifar,
    write_edm2,
    write_fast_dit,
    write_folder,
    write_idx,
    write_lightning,
    write_numbered,
)
from test_cli import lines_of
from test_tars import pack

ROOT = Path(__file__).parents[1]
ROWS = re.findall(r"`(dit-in-dit [^`]+)`", (ROOT / "docs/data.md").read_text())
MODEL = small_model("outer*1 inner*1", image_size=SHAPE[1:], channels=4, num_classes=3)
FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def opened(place: object, model=MODEL, **keys) -> Source:
    return open_source(DataConfig(**{"source": str(place), "held_out": 0.0, **keys}), model)


def everything(source: Source) -> list[tuple[np.ndarray, int]]:
    return [source.train(index) for index in range(source.train_size)]


# ------------------------------------------------------------------------------------------- values


def test_fast_dit_latents_are_read_unchanged(tmp_path):
    latents, labels = drawn(), labels_of()
    source = opened(write_fast_dit(tmp_path / "features", latents, labels))
    order = sorted(range(COUNT), key=str)  # of the files' names
    for (latent, label), number in zip(everything(source), order, strict=True):
        assert latent.dtype == np.float32
        assert np.array_equal(latent, latents[number])
        assert label == labels[number]
    example, _ = source.example(0, np.random.default_rng, flip=False)  # a sample already: posterior=sample adds nothing
    assert np.array_equal(example, latents[0])
    raw = opened(tmp_path / "features", latent_mean=0.5, latent_scale=2.0)
    np.testing.assert_allclose(raw.train(0)[0], (latents[0] / 0.18215 - 0.5) * 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["folder", "set.zip"])
def test_edm2_latents_are_means_and_deviations(tmp_path, name):
    moments = drawn(shape=(8, 32, 32))
    moments[:, 4:] = np.abs(moments[:, 4:])
    source = opened(write_edm2(tmp_path / name, moments, labels_of()))
    assert source.labels.tolist() == labels_of()
    noise = np.random.default_rng(5).standard_normal(SHAPE, np.float32)
    for index, (latent, _) in enumerate(everything(source)):
        np.testing.assert_allclose(latent, moments[index, :4] * 0.18215, rtol=1e-6)
        sample, _ = source.example(index, lambda: np.random.default_rng(5), flip=False)
        np.testing.assert_allclose(
            sample, (moments[index, :4] + moments[index, 4:] * noise) * 0.18215, rtol=1e-4, atol=1e-6
        )
    given = opened(
        tmp_path / name, latent_mean=(5.81, 3.25, 0.12, -2.15), latent_scale=(0.1199, 0.1082, 0.1348, 0.1524)
    )
    bias = np.array([5.81, 3.25, 0.12, -2.15], np.float32)[:, None, None]
    scale = np.array([0.1199, 0.1082, 0.1348, 0.1524], np.float32)[:, None, None]
    np.testing.assert_allclose(given.train(3)[0], moments[3, :4] * scale - bias * scale, rtol=1e-4, atol=1e-5)
    mean = opened(tmp_path / name, posterior="mean")
    assert np.array_equal(mean.example(2, np.random.default_rng, flip=False)[0], mean.train(2)[0])


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 3e-2)])
def test_lightning_dit_latents_are_normalised_by_their_statistics(tmp_path, dtype, error):
    latents, flipped = (drawn(shape=(32, 16, 16), seed=seed) * 3 + 1 for seed in (0, 1))
    write_lightning(tmp_path / "set", latents, flipped, labels_of(), dtype=dtype)
    assert len(list((tmp_path / "set").glob("*.safetensors"))) == 4
    source = opened(tmp_path / "set", replace(MODEL, channels=32, image_size=(16, 16)), flip=True)
    rows = [*range(0, COUNT, 2), *range(1, COUNT, 2)]  # rank by rank
    assert source.labels.tolist() == [labels_of()[row] for row in rows]
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3), ddof=1)
    for index, row in enumerate(rows):
        for flip, several in ((False, latents), (True, flipped)):
            expected = (several[row] - mean[:, None, None]) / std[:, None, None]
            found, _ = source.example(index, np.random.default_rng, flip=flip)
            np.testing.assert_allclose(found, expected, rtol=error, atol=error)


def test_keys_that_are_null_are_filled_for_each_layout(tmp_path):
    write_fast_dit(tmp_path / "fast", drawn(), labels_of())
    write_edm2(tmp_path / "edm2.zip", drawn(shape=(8, 32, 32)), labels_of())
    for name in ("fast", "edm2.zip"):
        data = fill_latent_keys(DataConfig(source=str(tmp_path / name), latent_mean=0.5))
        assert (data.vae, data.latent_mean, data.latent_scale) == (None, (0.5,), (0.18215,))
    write_lightning(tmp_path / "vavae", drawn(), drawn(seed=1), labels_of())
    data = fill_latent_keys(DataConfig(source=str(tmp_path / "vavae")))
    np.testing.assert_allclose(data.latent_mean, drawn().mean((0, 2, 3)), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(data.latent_scale, 1 / drawn().std((0, 2, 3)), rtol=1e-3)
    assert opened(tmp_path / "vavae", latent_mean=0.0, latent_scale=1.0).train_size == COUNT
    for missing in (tmp_path / "nowhere", tmp_path / "shards/{0..3}.tar"):
        assert fill_latent_keys(DataConfig(source=str(missing))) == DataConfig(source=str(missing))


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_images_and_labels(tmp_path, packed):
    images, labels = pixels(side=28)[..., 0], labels_of(classes=10)
    write_idx(tmp_path / "mnist", "train", images, labels, packed=packed)
    write_idx(tmp_path / "mnist", "t10k", images[:5], labels[:5], packed=packed)
    model = small_model(image_size=(28, 28), channels=1, num_classes=10)
    with pytest.warns(LeftOutWarning, match=r"left out files outside data.split: 2, such as t10k-images"):
        source = opened(tmp_path / "mnist", model)
    found = everything(source)
    assert np.array_equal(np.stack([image for image, _ in found]), images[:, None] / np.float32(127.5) - 1)
    assert [label for _, label in found] == labels
    assert opened(tmp_path / "mnist", model, split="test").train_size == 5
    assert size_of(tmp_path / "mnist") == (28, 28, 1)
    assert count_classes(DataConfig(source=str(tmp_path / "mnist"))) == 10
    split = opened(tmp_path / "mnist", model, held_out=0.3)
    assert split.held_out_size
    assert split.train_size + split.held_out_size == COUNT


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_is_read():
    source = opened(FASHION, small_model(image_size=(28, 28), channels=1, num_classes=10), held_out=0.1)
    assert source.train_size + source.held_out_size == 60_000
    assert np.bincount(source.labels, minlength=10).min() > 5000
    assert source.train(0)[0].shape == (1, 28, 28)


@pytest.mark.parametrize("fine", [False, True])
def test_cifar_needs_only_its_name(tmp_path, fine):
    write_cifar(tmp_path / "cifar", fine=fine)
    source = opened(f"hf:{tmp_path / 'cifar'}", small_model(image_size=(32, 32), num_classes=100 if fine else 10))
    assert source.classes[:2] == ("class 0", "class 1")
    assert source.labels.tolist() == labels_of(classes=10)
    for (image, _), expected in zip(everything(source), pixels(), strict=True):
        assert np.array_equal(image, expected.transpose(2, 0, 1) / np.float32(127.5) - 1)
    assert count_classes(DataConfig(source=f"hf:{tmp_path / 'cifar'}")) == (100 if fine else 10)
    assert (
        opened(f"hf:{tmp_path / 'cifar'}", small_model(image_size=(32, 32), num_classes=0), split="test").train_size
        == 4
    )
    if fine:  # a column that is named is taken, whatever else there is
        coarse = small_model(image_size=(32, 32), num_classes=20)
        assert len(opened(f"hf:{tmp_path / 'cifar'}", coarse, label_column="coarse_label").classes) == 20


# ------------------------------------------------------------------------------------------- captions


def test_captions_are_left_out_with_a_word(tmp_path):
    write_folder(tmp_path / "set", captions=True)
    with pytest.warns(LeftOutWarning, match=r"no images: 24, such as class 0/0.txt, class 0/12.txt \(captions\)$"):
        opened(tmp_path / "set", small_model(image_size=(32, 32), num_classes=3))
    for path in (tmp_path / "set").rglob("*.txt"):
        path.rename(path.with_name(f"of {path.name}"))
    with pytest.warns(LeftOutWarning, match=r"no images: 24, such as class 0/of 0.txt, class 0/of 12.txt$"):
        opened(tmp_path / "set", small_model(image_size=(32, 32), num_classes=3))


def test_captions_in_shards_and_columns_are_left_out_with_a_word(tmp_path):
    (tmp_path / "shards").mkdir()
    ends = ("png", "txt", "json", "cls")
    members = [(f"{n}.{end}", png(x) if end == "png" else b"0") for n, x in enumerate(pixels(4)) for end in ends]
    pack(tmp_path / "shards/train-0000.tar", members)
    with pytest.warns(LeftOutWarning, match=r"members that are no images: 8, such as .*\.txt, .*\.json \(captions\)$"):
        opened(tmp_path / "shards", small_model(image_size=(32, 32), num_classes=1))
    rows = {"image": [png(image) for image in pixels(4)], "label": [0] * 4, "text": ["a"] * 4}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    with pytest.warns(LeftOutWarning, match=r"left out columns: 1, such as text \(captions\)$"):
        opened(f"hf:{tmp_path / 'saved'}", small_model(image_size=(32, 32), num_classes=1))


# ------------------------------------------------------------------------------------------- as encode


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Path, Path]:
    """The same images encoded by `encode`, and by diffusers into EDM2's layout."""
    root = tmp_path_factory.mktemp("both")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(block_out_channels=(8, 8), **blocks, norm_num_groups=4, latent_channels=4).eval()
    vae.save_pretrained(root / "vae")
    write_numbered(root / "images.zip")
    how = Encoding(
        DataConfig(source=str(root / "images.zip")),
        str(root / "vae"),
        (32, 32),
        "float32",
        flips=False,
        batch=1,
        shard=8,
    )
    list(encode(how, root / "latents", torch.device("cpu")))
    with torch.no_grad():
        several = [vae.encode(torch.tensor(x).permute(2, 0, 1)[None].float() / 127.5 - 1).latent_dist for x in pixels()]
    moments = torch.cat([torch.cat([one.mean, one.std], 1) for one in several]).numpy()
    return root / "latents", write_edm2(root / "edm2", moments, [number % 3 for number in range(COUNT)])


def losses(place: Path, out: Path, posterior: str, **keys) -> list[float]:
    config = run_of(place, posterior=posterior)
    list(train(config, out, **keys))
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines() if '"loss"' in line]


def run_of(place: Path, **keys) -> RunConfig:
    data = DataConfig(source=str(place), held_out=0.2, **keys)
    model = replace(MODEL, image_size=(16, 16), num_classes=3)
    steps = TrainConfig(
        steps=4, batch_size=4, precision="float32", checkpoint_every=2, sample_every=0, evaluate_every=0
    )
    return RunConfig(model=model, data=data, train=steps)


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_edm2_latents_train_to_the_losses_of_the_same_latents_from_encode(both, tmp_path, posterior):
    ours, theirs = (losses(place, tmp_path / place.name, posterior) for place in both)
    assert len(ours) == len(theirs) == 4
    np.testing.assert_allclose(theirs, ours, rtol=1e-6)
    model = run_of(both[0]).model
    one, other = (open_source(DataConfig(source=str(place), held_out=0.2), model) for place in both)
    assert one.held_out_size == other.held_out_size > 0
    for index in range(one.train_size):
        np.testing.assert_allclose(one.train(index)[0], other.train(index)[0], rtol=1e-5, atol=1e-6)
    for index in range(one.held_out_size):
        np.testing.assert_allclose(one.held_out(index)[0], other.held_out(index)[0], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------- runs


PLACES = {
    "fast": lambda path: write_fast_dit(path, drawn(shape=(4, 16, 16)), labels_of()),
    "edm2.zip": lambda path: write_edm2(path, np.abs(drawn(shape=(8, 16, 16))), labels_of()),
    "vavae": lambda path: write_lightning(path, *(drawn(shape=(4, 16, 16), seed=seed) for seed in (0, 1)), labels_of()),
}


@pytest.mark.parametrize("name", PLACES)
def test_runs_resume_on_moved_data_and_refuse_changed_data(tmp_path, name):
    place = PLACES[name](tmp_path / name)
    whole = losses(place, tmp_path / "whole", "sample")
    list(train(run_of(place, posterior="sample"), tmp_path / "parts", until=2))
    moved = place.rename(tmp_path / f"moved-{name}")
    again = losses(place, tmp_path / "parts", "sample", resume=True, data=str(moved))
    assert again == whole
    file = next(iter(sorted(moved.rglob("*0*")))) if moved.is_dir() else moved
    if name == "vavae":
        arrays = load_file(file := moved / "latents_rank00_shard000.safetensors")
        arrays["latents"][0, 0, 0, 0] += 1
        save_file(arrays, file)
    elif name == "fast":
        np.save(moved / "imagenet256_features/0.npy", np.zeros((1, 4, 16, 16), np.float32))
    else:
        write_edm2(file, np.abs(drawn(shape=(8, 16, 16), seed=3)), labels_of())
    with pytest.raises(UserError, match="changed since"):
        list(train(run_of(place, posterior="sample"), tmp_path / "parts", resume=True, data=str(moved)))


@pytest.mark.parametrize("name", PLACES)
def test_sources_pickle_and_digests_do_not_depend_on_the_place(tmp_path, name, monkeypatch):
    place, model = PLACES[name](tmp_path / name), replace(MODEL, image_size=(16, 16))
    source = opened(place, model, held_out=0.3)
    copy = pickle.loads(pickle.dumps(source))
    stream = lambda: np.random.default_rng(1)  # noqa: E731
    for index in range(source.train_size):
        one, other = (each.example(index, stream, flip=False) for each in (source, copy))
        assert np.array_equal(one[0], other[0])
        assert one[1] == other[1]
    assert source.held_out_size
    digest = source.digest
    moved = place.rename(tmp_path / f"moved-{name}")
    assert opened(moved, model, held_out=0.3).digest == digest
    assert np.array_equal(opened(moved, model, held_out=0.3)._held, source._held)
    monkeypatch.setattr("dit_in_dit.data.digest.MOST_CONTENT", 0)
    monkeypatch.setattr("dit_in_dit.data.formats.other_latents.MOST_CONTENT", 1000)
    assert opened(moved, model).digest != digest  # by sizes, or of evenly spaced rows
    config = replace(run_of(moved), data=DataConfig(source=str(moved)))
    with pytest.raises(UserError, match="the run was trained on latents: give --against IMAGES"):
        reference(None, Subject(lambda _: None, (16, 16, 3), {}, {}, count=1, config=config), 4)


def test_a_run_with_a_named_vae_decodes_its_latents(both, tmp_path):
    """fast-DiT's scale is in the run's config, so its latents are decoded as those of `encode`."""
    vae = AutoencoderKL.from_pretrained(both[0].parent / "vae")
    latents = drawn(4, (4, 16, 16))
    write_fast_dit(tmp_path / "fast", latents, [0] * 4)
    decode = open_decoder(
        DataConfig(source=str(tmp_path / "fast"), vae=str(both[0].parent / "vae")), torch.device("cpu")
    )
    with torch.no_grad():
        expected = vae.decode(torch.from_numpy(latents) / 0.18215).sample
    torch.testing.assert_close(decode(torch.from_numpy(latents)), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------- damage


def _npy(name, array):
    return lambda folder: np.save(folder / name, array, allow_pickle=True)


def _cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-7])


def _json(**rows):
    def change(folder):
        table = json.loads((folder / "dataset.json").read_text())
        for number, row in rows.items():
            table["labels"][int(number[1:])] = row
        (folder / "dataset.json").write_text(json.dumps(table))

    return change


def _tensors(change, name="latents_rank01_shard000.safetensors"):
    def save(folder):
        arrays = load_file(folder / name)
        change(arrays)
        save_file(arrays, folder / name)

    return save


FEATURE, LABEL, MOMENTS = "imagenet256_features/3.npy", "imagenet256_labels/3.npy", "00000/img-mean-std-00000003.npy"
OBJECTS, NANS = np.array([{"a": 1}], dtype=object), torch.full((4,), torch.nan)
FAULTS = {
    "fast": [
        (lambda folder: (folder / LABEL).unlink(), "labels/3.npy: No such file"),
        (
            _npy(FEATURE, np.zeros((1, 4, 8, 8), np.float32)),
            r"\[1, 4, 8, 8\] instead of .* \[1, 4, 16, 16\]",
        ),
        (_npy(FEATURE, np.zeros((1, 4, 16, 16), np.int32)), "int32"),
        (_npy(FEATURE, OBJECTS), "Object arrays cannot be loaded"),
        (_npy(FEATURE, np.full((1, 4, 16, 16), np.nan, np.float32)), r"float32 .* instead of finite numbers"),
        (_npy(LABEL, OBJECTS), "Object arrays cannot be loaded"),
        (_npy(LABEL, np.array([7])), "must be from 0 to 2: got 0 to 7"),
        (_npy(LABEL, np.array([-1])), "must be from 0 to 2: got -1"),
        (_npy(LABEL, np.array([0.5])), "float64"),
        (_cut(FEATURE), "cannot use .*3.npy"),
        (_cut(LABEL), "cannot use .*3.npy"),
        (lambda folder: (folder / FEATURE).write_bytes(b""), "cannot use .*3.npy"),
        (lambda folder: (folder / FEATURE).write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': (((\n   "), "cannot use"),
        (lambda folder: shutil.rmtree(folder / "imagenet256_labels"), "labels/0.npy: No such file"),
        (lambda folder: [path.unlink() for path in folder.rglob("*features/*")], "image files have 1 or 3 channels"),
    ],
    "edm2": [
        (lambda folder: (folder / "dataset.json").unlink(), "has no dataset.json"),
        (_json(_3=["00000/img-mean-std-00000003.npy", 9]), "must be from 0 to 2: got 0 to 9"),
        (_json(_3=["../../img-mean-std-00000003.npy", 0]), "has no label for 1 images"),
        (_json(_3=["00000/img-mean-std-00000003.npy", "cat"]), "labels must be whole numbers"),
        (_json(_3=None), "labels must be"),
        (lambda folder: (folder / "dataset.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "dataset.json").write_text('{"labels": null}'), "model.num_classes must fit"),
        (
            _npy(MOMENTS, np.zeros((4, 16, 16), np.float32)),
            r"\[4, 16, 16\] instead of .* \[8, 16, 16\]",
        ),
        (_npy(MOMENTS, OBJECTS), "Object arrays cannot be loaded"),
        (_cut(MOMENTS), "cannot use .*00000003.npy"),
    ],
    "vavae": [
        (_cut("latents_rank00_shard000.safetensors"), "is damaged"),
        (_tensors(lambda arrays: arrays.pop("labels")), "must hold labels"),
        (_tensors(lambda arrays: arrays.pop("latents_flip")), "must hold labels, and latents and latents_flip"),
        (_tensors(lambda arrays: arrays.update(labels=torch.full((10,), 3))), "must be from 0 to 2: got 0 to 3"),
        (_tensors(lambda arrays: arrays.update(labels=torch.zeros(9, dtype=torch.int64))), "must hold labels"),
        (_tensors(lambda arrays: arrays.update(latents=arrays["latents"].half())), "all latents must have one type"),
        (
            _tensors(lambda arrays: arrays.update({n: a[:0].contiguous() for n, a in arrays.items()})),
            "must hold labels",
        ),
        (_tensors(lambda arrays: arrays.update(latents=torch.zeros(10, 4, 8, 8))), r"set model.channels"),
        (lambda folder: (folder / "latents_stats.pt").unlink(), "latents_stats.pt: No such file"),
        (lambda folder: torch.save({"mean": 3}, folder / "latents_stats.pt"), "tensors mean and std"),
        (lambda folder: torch.save({"mean": torch.ones(4), "std": torch.zeros(4)}, folder / "latents_stats.pt"), "std"),
        (
            lambda folder: torch.save({"mean": torch.ones(3), "std": torch.ones(3)}, folder / "latents_stats.pt"),
            "1 or 4 numbers",
        ),
        (lambda folder: torch.save({"mean": DataConfig(), "std": 1}, folder / "latents_stats.pt"), "could run code"),
        (lambda folder: torch.save({"mean": torch.ones(4), "std": NANS}, folder / "latents_stats.pt"), "latent_scale"),
        (lambda folder: torch.save({"mean": NANS, "std": torch.ones(4)}, folder / "latents_stats.pt"), "latent_mean"),
    ],
}


@pytest.mark.parametrize(("name", "number"), [(name, n) for name, faults in FAULTS.items() for n in range(len(faults))])
def test_damaged_files_give_one_line(tmp_path, name, number):
    damage, message = FAULTS[name][number]
    place = PLACES["edm2.zip" if name == "edm2" else name](tmp_path / name)
    damage(place)
    with pytest.raises(UserError, match=message) as refused:
        opened(place, replace(MODEL, image_size=(16, 16)))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 320


def test_latents_without_mirror_images_refuse_flips(tmp_path):
    for name in ("fast", "edm2.zip"):
        with pytest.raises(
            UserError, match=r"data.flip=true: .* was encoded without mirror images; set data.flip=false"
        ):
            opened(PLACES[name](tmp_path / name), replace(MODEL, image_size=(16, 16)), flip=True)


def test_half_precision_files_are_read(tmp_path):
    place = write_fast_dit(tmp_path / "fast", drawn(), labels_of())
    np.save(place / "imagenet256_features/0.npy", drawn()[:1].astype(np.float16))
    latent, _ = opened(place).train(0)
    assert latent.dtype == np.float32
    assert np.array_equal(latent, drawn()[0].astype(np.float16).astype(np.float32))


def test_an_archive_with_a_name_outside_of_it_is_refused(tmp_path):
    place = PLACES["edm2.zip"](tmp_path / "edm2.zip")
    with zipfile.ZipFile(place, "a") as archive:
        archive.writestr("../../img-mean-std-00000099.npy", b"")
    with pytest.raises(UserError, match="points out of the archive"):
        opened(place, replace(MODEL, image_size=(16, 16)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot read"),
        (lambda path: path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1])), "is damaged"),
        (lambda path: path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"0")), "is damaged"),
        (lambda path: path.write_bytes(gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12)), "is damaged"),
        (lambda path: path.write_bytes(b"none"), "cannot read"),
        (lambda path: path.with_name("train-labels-idx1-ubyte.gz").unlink(), "No such file"),
        (lambda path: write_idx(path.parent, "train", pixels(5, 28)[..., 0], [0] * 6), "must be 5 whole numbers"),
        (lambda path: write_idx(path.parent, "train", pixels(5, 28)[..., 0], [11] * 5), "must be from 0 to 9"),
        (lambda path: write_idx(path.parent, "train", pixels(5, 30)[..., 0], [0] * 5), r"must be \(N, 28, 28, 1\)"),
    ],
)
def test_damaged_idx_files_give_one_line(tmp_path, change, message):
    write_idx(tmp_path / "mnist", "train", pixels(side=28)[..., 0], labels_of(classes=10))
    change(tmp_path / "mnist/train-images-idx3-ubyte.gz")
    with pytest.raises(UserError, match=message) as refused:
        opened(tmp_path / "mnist", small_model(image_size=(28, 28), channels=1, num_classes=10))
    assert "\n" not in str(refused.value)


def test_images_in_folders_of_similar_names_are_still_images(tmp_path):
    """Folders that were read as images before these layouts were known."""
    for name in ("features", "labels"):
        write_folder(tmp_path / "set" / name, 1)
    assert opened(tmp_path / "set", small_model(image_size=(32, 32), num_classes=2)).classes == ("features", "labels")
    write_folder(tmp_path / "target" / "images")
    write_edm2(tmp_path / "target" / "vae-sd", drawn(2, (8, 32, 32)), [0, 1])
    assert source_kind(str(tmp_path / "target")).name == "image files"
    assert source_kind(str(write_numbered(tmp_path / "images.zip"))).name == "image files"


# ------------------------------------------------------------------------------------------- the page

TINY = tuple(f"train.{key}" for key in ("steps=1", "batch_size=2", "sample_every=0", "evaluate_every=0", "warmup=0"))
PRESET = {
    "dit-s2": ("model.depth=1", "model.outer.width=24"),
    "emoji": ("model.stages=outer inner", "model.outer.width=32"),
}


def test_the_page_has_a_row_for_each_layout():
    assert sorted(re.search(r"data.source=(\S+)", row)[1] for row in ROWS if " train " in row) == sorted(LAYOUTS)


@pytest.mark.parametrize("line", [row for row in ROWS if " train " in row])
def test_each_row_of_the_page_trains(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)[1:]
    place = re.search(r"data.source=(\S+)", line)[1]
    path = Path(place.removeprefix("hf:"))
    path.parent.mkdir(parents=True, exist_ok=True)
    LAYOUTS[place](path)
    more = [word for key in (*TINY, "data.workers=0", *PRESET[words[2]]) for word in ("--set", key)]
    main([*words, *more])
    run = Path(words[-1])
    assert (run / "checkpoints").is_dir()
    assert read_config(run).data.source == place


def test_the_row_of_encode_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (line,) = [row for row in ROWS if " encode " in row]
    write_folder(Path("photos"))
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(8, 8), **blocks, norm_num_groups=4, latent_channels=4).save_pretrained("vae")
    main(shlex.split(line)[1:])
    assert "24 latents of 4x16x16 in latents: train with --set data.source=latents" in capsys.readouterr().out


def test_a_mistake_is_one_line_of_the_command(tmp_path, capsys):
    place = PLACES["fast"](tmp_path / "features")
    words = ["train", "--preset", "dit-s2", "--set", f"data.source={place}", "--out", str(tmp_path / "run")]
    assert "set data.flip=false" in lines_of(words, capsys)
    assert not (tmp_path / "run").exists()
