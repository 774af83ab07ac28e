"""Own images: what is chosen for them, the pictures of them, and every kind of source shown by `data`."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

import layouts
from conftest import small_model
from dit_in_dit.cli import main
from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import from_yaml, override, to_yaml
from dit_in_dit.config.run import AUTO
from dit_in_dit.data.groups import family_number
from dit_in_dit.data.sources import SOURCES
from dit_in_dit.data.summary import NearPairs, draw_classes, near_pairs, search_pairs, summarise_source
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs.folder import read_config
from dit_in_dit.training.loop import train
from test_sources import Dots

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "animated")
NAMES = ("ü ñ", "a b", "%20", "#1", "x;y", "'q'", "~tilde", "-dash", "日本", "UPPER", "new.line", "{0..3}")
CLASSES = ("Vögel & co", "cats", "x y")
KEYS = ("train.steps=2", "train.batch_size=2", "model.stages=outer inner")
QUICK = ["--device", "cpu", *(f"--set={key}" for key in KEYS)]


def save(path: Path, pixels: np.ndarray, mode: str = "RGB", turn: int = 1) -> None:
    """Pixels (H, W, 3), uint8, as a PNG of any mode, with an EXIF orientation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[274] = turn
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode != "animated":
        image = image.convert(mode)
    image.save(path, exif=exif, **({"save_all": True, "append_images": [image]} if mode == "animated" else {}))


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """300 PNGs of eight kinds and twelve odd names, from 1x1 to 90x90 pixels, and three files that cannot be read."""
    root, draw = tmp_path_factory.mktemp("own") / "my images", np.random.default_rng(0)
    for number in range(300):
        height, width = draw.integers(1, 91, 2)
        pixels = draw.integers(0, 256, (height, width, 3), np.uint8)
        path = root / CLASSES[number % 3] / f"{NAMES[number % 12]}{number}.png"
        save(path, pixels, MODES[number % 8], 1 + number % 7)
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save(root / "cats/moving.gif", save_all=True, append_images=frames[1:])
    (root / "cats/damaged.png").write_bytes(b"nothing")
    (root / "cats/notes.txt").write_text("no image")
    return root


def test_one_line_trains_on_300_odd_images_says_what_it_chose_and_the_run_samples(odd, tmp_path, capsys):
    run = tmp_path / "mine"
    main(["train", "--data", str(odd), "--out", str(run), *QUICK])
    said = " ".join(capsys.readouterr().out.split())
    config = read_config(run)
    assert (config.model.image_size, config.model.channels, config.model.num_classes) == ((32, 32), 3, 3)
    assert config.data.source == str(odd)
    assert config.data.corrupt == "skip"
    assert config.train.learning_rate == presets.get("small").train.learning_rate
    enlarged = int(said.split(" are enlarged")[0].split()[-1])
    assert 50 < enlarged < 250
    for part in (
        f"small {300 - int(said.split(' held out')[0].split()[-1])} training images, fewer than 1000 --preset emoji",
        "--set model.image_size=64",
        "3 Vögel & co, cats, x y --set model.num_classes=0",
        "cannot be read: cats/damaged.png cannot be read: cats/moving.gif",
        "such as cats/notes.txt",
        "2 files cannot be read",
    ):
        assert part in said, part
    assert Image.open(run / "data.png").width > 3 * 4 * 64
    main(["sample", str(run), "--num", "3", "--steps", "1", "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert len(list((tmp_path / "out").rglob("0*.png"))) == 3
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(SystemExit):  # a run is never overwritten
        main(["train", "--data", str(odd), "--out", str(run), *QUICK])
    assert (run / "config.yaml").read_bytes() == before


def test_the_keys_and_the_preset_that_a_user_names_replace_the_chosen_ones(odd, tmp_path, capsys):
    main(["train", "--data", str(odd), "--preset", "emoji-dit", "--set", "model.stages=outer",
          "--set", "model.num_classes=auto", "--out", str(tmp_path / "named"), *QUICK[:4]])  # fmt: skip
    config, preset = read_config(tmp_path / "named"), presets.get("emoji-dit")
    assert config.model.outer == preset.model.outer
    assert (config.model.num_classes, config.data.source) == (3, str(odd))
    summary = summarise_source(str(odd), {"model.image_size": 64, "model.channels": 1, "model.num_classes": 0})
    assert summary.config.model.image_shape == (1, 64, 64)
    assert summary.config.model.num_classes == 0
    assert not {"model.image_size", "model.channels"} & {choice[0] for choice in summary.choices}
    with pytest.raises(UserError, match=r"set data\.corrupt=skip"):
        summarise_source(str(odd), {"data.corrupt": "error"})
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--data", "nowhere", "--out", str(tmp_path / "none")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "dit-in-dit: data.source: no such file or folder: nowhere\n"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("sizes", "mode", "side", "preset"),
    [
        ([(128, 300)] * 30 + [(20, 20)] * 10, "RGB", 128, "small"),
        ([(127, 127)] * 20 + [(64, 64)] * 10, "L", 64, "small"),
        ([(5, 500)] * 30, "RGB", 32, "small"),
    ],
)
def test_the_size_is_the_largest_that_half_of_the_images_reach(sizes, mode, side, preset, tmp_path):
    draw = np.random.default_rng(0)
    for number, (height, width) in enumerate(sizes):
        save(tmp_path / f"{number}.png", draw.integers(0, 256, (height, width, 3), np.uint8), mode)
    summary = summarise_source(str(tmp_path), {})
    model = summary.config.model
    assert model.image_size == (side, side)
    assert model.channels == (1 if mode == "L" else 3)
    assert model.num_classes == 0  # one folder: no labels
    assert side % model.patch_size == 0
    assert summary.choices[0][:2] == ("preset", preset)


def test_three_images_are_enough_and_a_larger_set_gets_the_preset_of_its_size(tmp_path, monkeypatch):
    for number in range(3):
        save(tmp_path / f"{number}.png", np.full((40, 40, 3), 80 * number, np.uint8))
    few = summarise_source(str(tmp_path), {})
    assert few.source.train_size + few.source.held_out_size == 3
    assert few.source.train_size > 0
    assert ("data.held_out" in {choice[0] for choice in few.choices}) == (few.config.data.held_out != 0.1)
    monkeypatch.setattr("dit_in_dit.data.summary.FEW", 1)
    assert [summarise_source(str(tmp_path), {"model.image_size": s}).choices[0][1] for s in (32, 64, 128)] == [
        "emoji",
        "pixels-64",
        "pixels-128",
    ]


def latents(folder: Path, images: int = 20) -> Path:
    """A folder as `encode` writes it: 4x8x8 latents of two classes, with mirror images, of no VAE."""
    folder.mkdir()
    draw, families = np.random.default_rng(0), [family_number(str(number)) for number in range(images)]
    moments = {name: draw.normal(size=(images, 8, 8, 8)).astype(np.float16) for name in ("moments", "flipped")}
    numbers = {"label": np.arange(images, dtype=np.int64) % 2, "family": np.array(families, np.uint64)}
    save_file(moments | numbers, folder / "000000.safetensors")
    index = {
        "format": "dit-in-dit latents 1",
        "classes": ["left", "right"],
        "made": {"shape": [4, 8, 8], "flips": True, "shard": images, "dtype": "float16"},
        "vae": {"name": "absent/vae", "mean": [0.0], "scale": [1.0]},
        "shards": [{"file": "000000.safetensors", "count": images, "sha256": "0"}],
    }
    (folder / "latents.json").write_text(json.dumps(index))
    return folder


def places(folder: Path, root: Path) -> dict[str, str]:
    """A `data.source` of every kind; the first five hold the images of `folder`."""
    shutil.make_archive(str(root / "set"), "zip", folder)
    paths = sorted(folder.rglob("*.png"))
    with tarfile.open(root / "set.tar", "w") as tar:
        for path in paths:
            tar.add(path, path.relative_to(folder).as_posix())
    labels = [CLASSES.index(path.parent.name) for path in paths]
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    np.savez(root / "set.npz", images=pixels, labels=labels)
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    datasets.Dataset.from_dict({"image": rows, "label": labels}, features).to_parquet(root / "set.parquet")
    drawn = np.random.default_rng(1).normal(size=(2, 40, 4, 8, 8)).astype(np.float32)
    classes = [number % 2 for number in range(40)]
    layouts.write_fast_dit(root / "fast", drawn[0], classes)
    layouts.write_edm2(root / "edm2", np.abs(np.concatenate([*drawn], 1)), classes)
    layouts.write_lightning(root / "lightning", drawn[0], drawn[1], classes)
    layouts.write_idx(root / "idx", "train", layouts.pixels(40, 28)[..., 0], classes)
    np.save(root / "floats.npy", np.random.default_rng(0).normal(size=(40, 4, 8, 8)).astype(np.float32))
    return {
        "folder": str(folder), ".zip": f"{root}/set.zip", "tar shards": f"{root}/set.tar",
        "arrays": f"{root}/set.npz", "hf": f"hf:{root}/set.parquet",
        "float arrays": f"{root}/floats.npy", "latents": str(latents(root / "latents")),
        "fast-dit latents": f"{root}/fast", "edm2 latents": f"{root}/edm2", "lightning latents": f"{root}/lightning",
        "idx": f"{root}/idx", "mosaic": "mosaic", "own": "dots:",
    }  # fmt: skip


def test_data_shows_every_kind_of_source(tmp_path, capsys, monkeypatch):
    """Two of the images are copies: one within the training images, one across the split."""
    monkeypatch.setitem(SOURCES, "dots", Dots)
    monkeypatch.setattr("dit_in_dit.data.summary.SURVEYED", 300)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    draw, folder = np.random.default_rng(0), tmp_path / "images"
    for number in range(60):
        save(folder / CLASSES[number % 3] / f"{number}.png", draw.integers(0, 256, (28, 20, 3), np.uint8))
    for kind, place in places(folder, tmp_path).items():
        out = tmp_path / f"out {kind}"
        main(["data", place, "--out", str(out), "--set", "data.held_out=0.2"])
        said = capsys.readouterr().out
        assert Image.open(out / "data.png").size > (64, 64), kind
        assert "preset" in said, kind
        if kind in ("folder", ".zip", "tar shards", "arrays", "hf"):
            assert ("[28, 20]" if kind == "arrays" else "[32, 32]") in said, kind
            assert f"{place.removeprefix('hf:').removeprefix(str(tmp_path))}: 3 classes, 28x20" in said, kind
            assert (out / "nearest.png").exists(), kind
            assert "copies: 0 of " in said, kind
        if "latents" in kind or "float" in kind:
            assert "dit-in-dit-s2" in said, kind
            assert "[8, 8]" in said, kind
            flips = kind in ("latents", "lightning latents")
            assert f"data.flip {flips} {'' if flips else 'no '}mirror images are stored" in " ".join(said.split()), kind
            if kind != "float arrays":
                assert "2 classes, 8x8" in said, kind
                assert len(re.findall(r"^  (?:left|right|0|1) +\d", said, re.MULTILINE)) == 2, kind
        if kind == "idx":
            assert "[28, 28]" in said
            assert "model.patch_size 7 " in " ".join(said.split())
            assert "model.channels 1 " in " ".join(said.split())
    latent_kinds = {"latents folder", "fast-dit features", "edm2 latents", "lightningdit latents"}
    other_kinds = {"image files", "tar shards", "arrays", "hf", "mosaic", "dots", "emoji"}
    assert SOURCES.keys() == latent_kinds | other_kinds  # a new kind needs a place above


def test_copies_and_near_pairs_across_the_split_are_found_by_name(tmp_path, capsys):
    draw = np.random.default_rng(0)
    images = {f"{number}": draw.integers(0, 256, (32, 32, 3), np.uint8) for number in range(80)}
    held = [name for name in images if family_number(name) < 0.1 * 2**64]
    trained = [name for name in images if name not in held]
    assert len(held) > 2
    images[held[0]] = images[trained[0]]  # a copy across the split
    images[held[1]] = np.clip(images[trained[1]].astype(int) + 8, 0, 255).astype(np.uint8)  # nearly
    images[trained[3]] = images[trained[2]]  # a copy within the training images
    for name, pixels in images.items():
        save(tmp_path / "set" / f"{name}.png", pixels)
    summary = summarise_source(str(tmp_path / "set"), {})
    found = near_pairs(summary.source)
    *counts, last = search_pairs(summary.source)
    assert isinstance(last, NearPairs)
    assert counts == [(0, summary.source.train_size + summary.source.held_out_size)]  # few images: one report
    assert found.searched == (len(trained), len(held))
    assert found.copies == (1, 1)
    source = summary.source
    named = [(source.title(held, held_out=True), source.title(train)) for _, held, train in found.pairs]
    assert named[:2] == [(f"{held[n]}.png", f"{trained[n]}.png") for n in (0, 1)]
    distances = [pair[0] for pair in found.pairs]
    assert distances[0] == 0
    assert 0.03 < distances[1] < 0.07
    assert distances == sorted(distances)
    assert distances[2] > 0.3
    main(["data", str(tmp_path / "set"), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert f"0.000 {held[0]}.png {trained[0]}.png" in " ".join(said.split())
    drawn = np.asarray(Image.open(tmp_path / "out/nearest.png").convert("RGB"))
    top, below = drawn[30:94, 18:82], drawn[96:160, 18:82]  # the first pair
    assert np.array_equal(top, below)
    assert top.std() > 50
    assert draw_classes(source, lambda images: images).size[1] > 4 * 64


def test_auto_counts_the_classes_of_the_data_in_cli_yaml_and_python(tmp_path, capsys):
    draw = np.random.default_rng(0)
    for number in range(12):
        save(tmp_path / "set" / CLASSES[number % 3] / f"{number}.png", draw.integers(0, 256, (16, 8, 3), np.uint8))
    source = f"data.source={tmp_path / 'set'}"
    main(
        ["config", "--preset", "emoji", "--set", "model.num_classes=auto", "--set", source, "--set", "data.held_out=0"]
    )
    assert from_yaml(capsys.readouterr().out).model.num_classes == 3
    mine = tmp_path / "mine.yaml"
    text = to_yaml(override(presets.get("emoji"), [source, "data.held_out=0", "model.stages=outer"]))
    mine.write_text(text.replace("num_classes: 9", "num_classes: auto"))
    assert from_yaml(mine.read_text()).model.num_classes == AUTO
    main(["train", "--config", str(mine), "--out", str(tmp_path / "run"), *QUICK[:4]])
    assert "num_classes: 3 " in (tmp_path / "run/config.yaml").read_text()
    main(["train", "--config", str(mine), "--out", str(tmp_path / "run"), *QUICK[:4], "--resume"])
    config = override(from_yaml(mine.read_text()), ["train.steps=1", "train.batch_size=2"])
    list(train(config, tmp_path / "python", device="cpu"))
    assert read_config(tmp_path / "python").model.num_classes == 3
    shutil.move(tmp_path / "set" / CLASSES[0], tmp_path / "single" / CLASSES[0])
    single = override(config, [f"data.source={tmp_path / 'single'}", "model.num_classes=auto"])
    list(train(single, tmp_path / "one", device="cpu"))
    assert read_config(tmp_path / "one").model.num_classes == 0
    with pytest.raises(UserError, match="auto"):
        NestedDiT(small_model(num_classes=AUTO))


@pytest.mark.parametrize("name", ["pixels-64", "pixels-128", "small"])
def test_a_preset_for_own_images_costs_what_its_plain_twin_costs(name):
    from dit_in_dit.inspection import cost

    nested, plain = (cost.macs(presets.get(n).model)["total"] for n in (name, f"{name}-dit"))
    assert abs(plain / nested - 1) < 0.02
    assert not presets.get(f"{name}-dit").model.blocks("inner")


def test_the_picture_of_classes_without_ascii_names_is_drawn():
    from dit_in_dit.reporting.images import side_by_side

    drawn = {name: side_by_side({name: Image.new("RGB", (90, 9))}) for name in ("Vögel", "Vogel", "Жар")}
    assert len({image.tobytes() for image in drawn.values()}) == 3
    assert torch.tensor(np.asarray(drawn["Жар"])).float().std() > 0


@pytest.mark.timeout(60)
def test_arrays_without_images_end_in_one_line(tmp_path):
    np.savez(tmp_path / "none.npz", images=np.zeros((0, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="leaves 0 training and 0 held-out images"):
        summarise_source(str(tmp_path / "none.npz"), {})
