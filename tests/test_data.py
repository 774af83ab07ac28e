"""Sources give the same images in every format, never split a family, and lose nothing silently."""

from __future__ import annotations

import hashlib
import os
import pickle
import resource
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import small_model
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DataConfig
from dit_in_dit.data.formats.mosaic import CLASSES, Mosaic
from dit_in_dit.data.groups import is_held_out
from dit_in_dit.data.picture import resize_and_crop
from dit_in_dit.data.sources import open_source

MODEL = small_model(image_size=(8, 8), num_classes=3)


def everything(source) -> list[tuple[bytes, int]]:
    """All training images, then all held-out images, with labels."""
    pairs = [source.train(i) for i in range(source.train_size)]
    pairs += [source.held_out(i) for i in range(source.held_out_size)]
    return [(image.tobytes(), label) for image, label in pairs]


def opened(path, **keys):
    return open_source(DataConfig(**{"source": str(path), "held_out": 0.2, **keys}), MODEL)


def test_folder_and_zip_hold_the_same_images(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in folder.rglob("*.*"):
            archive.write(path, Path("wrapper") / path.relative_to(folder))
        archive.writestr("__MACOSX/wrapper/red/._image0.png", b"left behind by a file manager")
    a, b = opened(folder), opened(tmp_path / "set.zip")
    assert a.classes == b.classes == ("blue", "green", "red")
    assert (a.train_size + a.held_out_size, a.held_out_size > 0) == (30, True)
    assert everything(a) == everything(b)
    assert everything(pickle.loads(pickle.dumps(b))) == everything(b)  # as a worker process gets it


def test_an_array_file_gives_the_same_images_as_the_folder(folder, tmp_path):
    source = opened(folder, held_out=0.0)
    pairs = [source.train(i) for i in range(30)]
    pixels = np.stack([np.round((image + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0) for image, _ in pairs])
    labels = np.array([label for _, label in pairs])
    np.savez(tmp_path / "set.npz", images=pixels, labels=labels)
    np.savez(tmp_path / "adm.npz", arr_0=pixels, arr_1=labels)
    np.save(tmp_path / "set.npy", pixels)
    np.save(tmp_path / "set.labels.npy", labels)
    for name in ("set.npz", "adm.npz", "set.npy"):
        assert everything(opened(tmp_path / name, held_out=0.0)) == everything(source)


def test_latents_are_read_unchanged(tmp_path):
    latents = np.random.default_rng(0).standard_normal((5, 4, 8, 8)).astype(np.float16)
    np.savez(tmp_path / "latents.npz", images=latents)
    model = small_model(image_size=(8, 8), channels=4, num_classes=0)
    source = open_source(DataConfig(source=str(tmp_path / "latents.npz"), held_out=0.0), model)
    assert np.array_equal(source.train(3)[0], latents[3].astype(np.float32))


def test_a_family_is_never_divided_between_the_splits():
    source = open_source(DataConfig(), small_model(image_size=(32, 32), num_classes=9))
    names = {side: [source.names[i] for i in getattr(source, f"_{side}")] for side in ("train", "held")}
    train, held = ({Path(n).stem.split("~")[0] for n in side} for side in names.values())
    assert train.isdisjoint(held)
    assert 0.05 < len(held) / (len(train) + len(held)) < 0.15
    assert any("~" in n for n in names["held"])  # variants are there to be kept together


def test_the_split_depends_only_on_the_family_and_the_share():
    value = int.from_bytes(hashlib.sha256(b"grinning-face").digest()[:8], "big") / 2**64
    assert is_held_out("grinning-face", value + 1e-6)
    assert not is_held_out("grinning-face", value - 1e-6)


def test_embedded_emoji_match_their_notice():
    source = open_source(DataConfig(held_out=0.0), small_model(image_size=(64, 64), num_classes=9))
    assert source.classes == (
        "activities", "animals", "flags", "food", "objects", "people", "smileys", "symbols", "travel",
    )  # fmt: skip
    assert source.train_size == 3641
    assert not source.skipped
    image, _ = source.train(0)
    assert image.shape == (3, 64, 64)
    corners = image[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners > 0.99).all()  # drawn on white


def test_broken_files_are_named_or_skipped(folder, tmp_path):
    copy = tmp_path / "set"
    for path in folder.rglob("*.*"):
        target = copy / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (copy / "red" / "text.png").write_text("not an image")
    (copy / "red" / "empty.jpg").write_bytes(b"")
    whole = (copy / "blue" / "image2.jpg").read_bytes()
    (copy / "blue" / "half.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot read .*half\.jpg"):
        opened(copy)
    source = opened(copy, corrupt="skip")
    assert sorted(source.skipped) == ["blue/half.jpg", "red/empty.jpg", "red/text.png"]
    assert source.train_size + source.held_out_size == 30


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "no .png"),
        (lambda path: path.write_bytes(b"junk"), "neither a folder nor a .zip"),
    ],
)
def test_missing_and_empty_sources_are_refused(make, part, tmp_path):
    make(tmp_path / "data")
    with pytest.raises(UserError, match=part):
        opened(tmp_path / "data")


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "set.npz"
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    for arrays, part in (
        ({"images": pixels[:, :7], "labels": np.zeros(4, int)}, r"must be \(N, 8, 8, 3\)"),
        ({"images": pixels}, "no labels"),
        ({"images": pixels, "labels": np.full(4, 3)}, "from 0 to 2"),
        ({"images": pixels, "labels": np.zeros(3, int)}, "4 whole numbers"),
        ({"pictures": pixels}, "must hold an array 'images'"),
        ({"images": np.array([{}] * 4, dtype=object)}, "cannot read arrays"),
        ({"images": pixels.astype(np.int64), "labels": np.zeros(4, int)}, "uint8"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=part):
            opened(path)


def test_arrays_under_the_wrong_name_are_refused(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    np.savez(tmp_path / "many.npz", images=np.zeros(3))
    (tmp_path / "many.npz").rename(tmp_path / "many.npy")
    for name in ("one.npz", "many.npy"):
        with pytest.raises(UserError):
            opened(tmp_path / name)


def test_linked_class_folders_are_read_and_loops_terminate(folder, tmp_path):
    for name in ("red", "green"):
        (tmp_path / name).symlink_to(folder / name)
    shutil.copytree(folder / "blue", tmp_path / "blue")
    (tmp_path / "blue" / "loop").symlink_to(tmp_path)
    assert everything(opened(tmp_path)) == everything(opened(folder))
    (tmp_path / "red-again").mkdir()
    (tmp_path / "red-again" / "loop").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"class folder .*red-again is empty"):
        opened(tmp_path)


def test_a_long_thin_image_takes_little_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert resize_and_crop(Image.new("L", (60_000, 1)), (64, 64), 3).shape == (64, 64, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # kB: to cover 64x64 it took 16 GB


def test_a_wrong_number_of_classes_is_refused(folder):
    with pytest.raises(UserError, match=r"got 5, .* has 3"):
        open_source(DataConfig(source=str(folder)), small_model(image_size=(8, 8)))


def test_a_source_that_is_too_small_to_split_is_refused(folder):
    with pytest.raises(UserError, match="0 held-out images"):
        opened(folder, held_out=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "I;16", "CMYK", "RGBA", "RGB"])
def test_every_mode_is_converted_as_a_viewer_shows_it(mode):
    grey = np.full((6, 6), 128, np.uint16)
    if mode == "I;16":
        image = Image.fromarray(grey * 257)
    elif mode == "1":
        image = Image.new("1", (6, 6), 1)
    elif mode == "P":
        image = Image.fromarray(grey.astype(np.uint8)).convert("RGB").quantize(4)
    else:
        image = Image.fromarray(grey.astype(np.uint8)).convert("RGB").convert(mode)
    expected = 255 if mode == "1" else 128
    assert np.abs(resize_and_crop(image, (6, 6), 3).astype(int) - expected).max() <= 1


def test_transparency_is_composited_on_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (resize_and_crop(image, (4, 4), 3) == 255).all()


def test_resizing_covers_and_crops_the_centre():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255  # only the middle is white
    assert resize_and_crop(Image.fromarray(wide), (10, 10), 3).min() == 255
    halved = resize_and_crop(
        Image.fromarray(np.kron(np.eye(4, dtype=np.uint8) * 200, np.ones((2, 2), np.uint8))), (4, 4), 1
    )
    assert np.array_equal(halved[..., 0], np.eye(4, dtype=np.uint8) * 200)  # an exact half is a 2x2 mean
    assert resize_and_crop(Image.new("RGB", (5, 9)), (16, 8), 3).shape == (16, 8, 3)


def test_a_mosaic_image_depends_only_on_its_number():
    one, other = Mosaic((32, 32)), Mosaic((32, 32))
    other.image(5)
    assert np.array_equal(one.image(2**61)[0], other.image(2**61)[0])
    assert not np.array_equal(one.image(1)[0], one.image(2)[0])
    assert not np.array_equal(Mosaic((32, 32), seed=1).image(1)[0], one.image(1)[0])
    assert {one.image(i)[1] for i in range(200)} == set(range(len(CLASSES)))
    image = one.image(3)[0]
    assert image.dtype == np.float32
    assert np.abs(image).max() <= 1


def test_mosaic_textures_have_their_period_and_direction():
    """Compares the peak of the background's spectrum with the true period and direction."""
    mosaic, checked = Mosaic((64, 64)), 0
    for index in range(40):
        truth = mosaic.truth(index)
        free = 1 - np.max([mosaic.mask(truth, region) for region in truth.regions[1:]], axis=0)
        if free.mean() < 0.7:
            continue
        image = (mosaic.image(index)[0].mean(0) - mosaic.image(index)[0].mean()) * free
        spectrum = np.abs(np.fft.fft2(image, (512, 512)))
        fy, fx = np.meshgrid(np.fft.fftfreq(512), np.fft.fftfreq(512), indexing="ij")
        spectrum[np.hypot(fx, fy) < 0.08] = 0
        y, x = np.unravel_index(spectrum.argmax(), spectrum.shape)
        background = truth.regions[0]
        assert 1 / np.hypot(fx[y, x], fy[y, x]) == pytest.approx(background.period, rel=0.05)
        turned = np.arctan2(fy[y, x], fx[y, x]) - background.direction
        assert abs(np.sin(turned)) < 0.1
        checked += 1
    assert checked >= 5


def test_mosaic_is_endless_and_never_trains_on_held_out_images():
    source = open_source(DataConfig(source="mosaic"), small_model(image_size=(16, 16), num_classes=9))
    assert source.train_size is None
    held = {source.held_out(i)[0].tobytes() for i in range(source.held_out_size)}
    assert held.isdisjoint(source.train(i)[0].tobytes() for i in range(200))


# ------------------------------------------------------------------------------------------ digests


def digest_of(path, **keys) -> str:
    return opened(path, **{"held_out": 0.0, **keys}).digest


def test_a_digest_does_not_depend_on_place_time_or_file_order(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "moved")
    for path in (tmp_path / "moved").rglob("*.*"):
        os.utime(path, (1, 1))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted(folder.rglob("*.*"), reverse=True):
            archive.write(path, Path("wrapper") / path.relative_to(folder))
    first = digest_of(folder)
    assert len(bytes.fromhex(first)) == 32
    assert digest_of(tmp_path / "moved") == digest_of(tmp_path / "set.zip") == first
    assert digest_of(folder, held_out=0.2) == digest_of(folder, corrupt="skip") == first
    walk = os.walk
    monkeypatch.setattr("os.walk", lambda *a, **k: [(f, d[::-1], n[::-1]) for f, d, n in walk(*a, **k)])
    assert digest_of(folder) == first
    monkeypatch.chdir(folder.parent)
    assert digest_of(folder.name) == first


@pytest.mark.parametrize("most", [2**28, 0])  # by content, by size
def test_a_digest_changes_when_an_image_is_added_replaced_removed_or_moved(folder, tmp_path, monkeypatch, most):
    monkeypatch.setattr("dit_in_dit.data.digest.MOST_CONTENT", most)
    place = tmp_path / "set"
    shutil.copytree(folder, place)
    image = next((place / "red").glob("*.png"))
    seen = [digest_of(place)]
    shutil.copy(image, place / "red/one-more.png")
    seen.append(digest_of(place))
    shutil.move(place / "red/one-more.png", place / "blue/one-more.png")
    seen.append(digest_of(place))
    (place / "blue/one-more.png").unlink()
    assert digest_of(place) == seen[0]
    image.write_bytes(next((place / "blue").glob("*.jpg")).read_bytes())
    seen.append(digest_of(place))
    image.unlink()
    seen.append(digest_of(place))
    assert len(set(seen)) == 5


def test_replaced_images_of_the_same_size_are_detected(folder, tmp_path):
    digests = set()
    for colour in ("red", "lime"):
        for name in "abc":
            (tmp_path / name).mkdir(exist_ok=True)
            image = Image.new("RGB", (8, 8), colour if name == "a" else "blue")
            image.save(tmp_path / name / "0.png", compress_level=0)
        digests.add((digest_of(tmp_path), (tmp_path / "a/0.png").stat().st_size))
    assert len({size for _, size in digests}) == 1
    assert len(digests) == 2


def test_a_digest_of_arrays_depends_on_content_and_not_on_the_format(tmp_path, monkeypatch):
    pixels, labels = np.arange(6 * 192, dtype=np.uint32).astype(np.uint8).reshape(6, 8, 8, 3), np.arange(6) % 3
    np.savez(tmp_path / "set.npz", images=pixels, labels=labels)
    np.savez_compressed(tmp_path / "adm.npz", arr_0=pixels, arr_1=labels)
    np.save(tmp_path / "set.npy", pixels)
    np.save(tmp_path / "set.labels.npy", labels)
    assert len({digest_of(tmp_path / name) for name in ("set.npz", "adm.npz", "set.npy")}) == 1
    other = pixels.copy()
    other[4, 7, 7, 2] ^= 1
    for number, arrays in enumerate(((other, labels), (pixels, labels[::-1]), (pixels[:5], labels[:5]))):
        np.savez(tmp_path / f"{number}.npz", images=arrays[0], labels=arrays[1])
    names = ("set", "0", "1", "2")
    assert len({digest_of(tmp_path / f"{name}.npz") for name in names}) == 4
    monkeypatch.setattr("dit_in_dit.data.digest.MOST_ARRAY", 3 * 192)  # every second row
    assert len({digest_of(tmp_path / f"{name}.npz") for name in names}) == 4
    assert digest_of(tmp_path / "set.npy") == digest_of(tmp_path / "set.npz")
    other[4], other[3] = pixels[4], 0
    np.savez(tmp_path / "0.npz", images=other, labels=labels)
    assert digest_of(tmp_path / "0.npz") == digest_of(tmp_path / "set.npz")  # documented: such rows are not seen


def test_the_sources_of_the_package_have_constant_digests():
    model = small_model(image_size=(16, 16), num_classes=9)
    digests = {name: open_source(DataConfig(source=name), model).digest[:16] for name in ("mosaic", "emoji")}
    assert digests == {"mosaic": "1a133b6a7875722f", "emoji": "f13fb58f2ee7e2b5"}
