"""Bad input gives exit code 2 and one line of at most 200 characters that names the input and the way out; nothing
changes on the disk.

Images of every mode are converted as their formats specify; NumPy's arithmetic gives the expected pixels.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from dit_in_dit.cli import main
from dit_in_dit.config.errors import LINE, UserError, one_line, truncate
from dit_in_dit.config.run import DataConfig
from dit_in_dit.data import picture
from dit_in_dit.data.files import ImageFiles
from dit_in_dit.data.picture import FORMATS, resize_and_crop
from dit_in_dit.data.sources import open_source

sys.path.insert(0, str(Path(__file__).parent))
from inputs import BAD, GOOD, encoded, files, png_of, training

from conftest import only_full, small_model

SECONDS, BYTES = 5, 2**30
ALONE = (  # inputs that run in a process of their own in every test run, because they could take time or memory
    *("billion laughs", "brackets in brackets", "a file too large", "a device for a config", "a tag that calls"),
    *(
        "a bomb at which Pillow warns",
        "a member that grows",
        "zeros that grow",
        "a device as image",
        "a header that lies",
    ),
)


def tree(root: Path) -> dict[str, str]:
    """Every file, link, pipe and folder below `root` with its content."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path)] = oct(path.lstat().st_mode)
    return found


def check(name: str, code: object, out: str, err: str) -> None:
    """Check the form of a refusal."""
    assert code == 2, err
    assert out == ""
    assert err.endswith("\n")
    line = err[:-1]
    assert line.isprintable(), line  # one line, and nothing that a terminal obeys
    assert line.startswith("dit-in-dit: ")
    assert len(line) <= 200
    assert any(part in line for part in BAD[name][1].split("|")), line


def test_there_are_enough_bad_inputs():
    assert len(BAD) >= 60
    assert set(ALONE) <= set(BAD)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_gives_a_one_line_error_and_changes_nothing(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = BAD[name][0]()
    before = tree(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as in a process of its own: a warning is a second line
        with pytest.raises(SystemExit) as stopped:
            main(words)
    check(name, stopped.value.code, *capfd.readouterr())
    assert tree(tmp_path) == before


class Done(NamedTuple):
    """Result of a process: exit code, output, CPU seconds and peak memory in bytes."""

    code: int
    out: str
    err: str
    seconds: float
    bytes: int


def ran(words: list[str], folder: Path, *, before: tuple[str, ...] = ()) -> Done:
    """Run the command in its own process, which is killed after a minute."""
    command = [*before, sys.executable, "-m", "dit_in_dit", *words]
    with (folder.parent / "out").open("w+") as out, (folder.parent / "err").open("w+") as err:
        process = subprocess.Popen(
            ["timeout", "-k", "1", "60", *command],
            cwd=folder,
            stdout=out,
            stderr=err,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        unit = 1 if sys.platform == "darwin" else 1024
        return Done(process.returncode, out.read(), err.read(), used.ru_utime + used.ru_stime, used.ru_maxrss * unit)


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> float:
    """CPU seconds of a refusal that reads no data: mostly imports, and more on a busy machine."""
    folder = tmp_path_factory.mktemp("usual") / "work"
    folder.mkdir()
    return ran(training("absent"), folder).seconds


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_takes_little_time_and_memory(name, tmp_path, monkeypatch, full, usual):
    if name not in ALONE and not full:
        pytest.skip("in a process of its own with --full")
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    words = BAD[name][0]()
    if any("\0" in word or len(word) > 2**16 for word in words):
        pytest.skip("the system passes no such word to a process")
    before = tree(folder)
    done = ran(words, folder)
    check(name, *done[:3])
    assert done.seconds < max(SECONDS, 2 * usual)
    assert done.bytes < BYTES
    assert tree(folder) == before


@pytest.mark.slow
def test_the_measure_of_memory_detects_an_allocation(tmp_path, monkeypatch):
    """An image just below the limit takes hundreds of MB, but less than the allowed memory."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    large = Image.new("LA", (8192, 8192))
    files(**{"a/large.png": encoded(large, compress_level=1), "c/1.png": GOOD})
    done = ran(training("data"), folder)  # refused for its third class, after the images were read
    assert "model.num_classes" in done.err
    assert 2**29 < done.bytes < 2 * BYTES


# -------------------------------------------------------------------------------------- permissions


def as_a_stranger(words: list[str], folder: Path) -> Done:
    """The command without root's right to read everything."""
    if os.geteuid():
        return ran(words, folder)
    if not shutil.which("setpriv"):
        pytest.skip("root reads everything, and there is no setpriv to give that up")
    return ran(words, folder, before=("setpriv", "--bounding-set", "-dac_override,-dac_read_search"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "mode", "part"),
    [
        ("data/a/1.png", 0o000, "cannot read data/a/1.png: Permission denied; fix or remove the image"),
        only_full("data/b", 0o000, "data.source: data is neither a folder nor a .zip: Permission denied"),
        only_full("data", 0o000, "Permission denied"),
        (".", 0o500, "cannot write to run: Permission denied"),
    ],
)
def test_files_without_permission_are_named(place, mode, part, tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    files()
    before = tree(folder)
    (folder / place).chmod(mode)
    done = as_a_stranger(training("data"), folder)
    (folder / place).chmod(0o700)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done.err
    assert part in done.err
    assert len(done.err) <= 201
    assert [*tree(folder)] == [*before]


# -------------------------------------------------------------------------------------------- modes


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


def bilevel() -> tuple[Image.Image, np.ndarray, int]:
    bits = noise(16, 16) > 127
    return Image.fromarray(bits), np.repeat(bits[..., None] * 255, 3, 2), 0


def grey() -> tuple[Image.Image, np.ndarray, int]:
    values = noise(16, 16)
    return Image.fromarray(values), np.repeat(values[..., None], 3, 2), 0


def grey_with_alpha() -> tuple[Image.Image, np.ndarray, int]:
    values = noise(16, 16, 2)
    return Image.fromarray(values, "LA"), on_white(np.repeat(values[..., :1], 3, 2), values[..., 1]), 1


def palette(**options: object) -> tuple[Image.Image, np.ndarray, int]:
    colours, places = noise(256, 3, seed=1), noise(16, 16)
    image = Image.fromarray(places, "P")
    image.putpalette(colours.tobytes())
    return image, colours[places], 0


def palette_with_alpha() -> tuple[Image.Image, np.ndarray, int]:
    image, colours, _ = palette()
    alpha = noise(256, seed=3)
    image.info["transparency"] = alpha.tobytes()
    return image, on_white(colours, alpha[np.asarray(image)]), 1


def palette_and_alpha() -> tuple[Image.Image, np.ndarray, int]:
    image, colours, _ = palette()
    alpha = noise(16, 16, seed=4)
    both = image.convert("PA")
    both.putalpha(Image.fromarray(alpha))
    return both, on_white(colours, alpha), 1


def grey_of_16_bits(mode: str) -> tuple[Image.Image, np.ndarray, int]:
    values = np.random.default_rng(0).integers(0, 2**16, (16, 16)).astype(np.uint16)
    values[0, 0], values[0, 1] = 0, 65535
    image = Image.fromarray(values if mode == "I;16" else values.astype(np.int32))
    assert image.mode == mode
    return image, np.repeat(np.floor(values / 257)[..., None], 3, 2), 0


def clear_grey_of_16_bits() -> tuple[Image.Image, np.ndarray, int]:
    image, expected, _ = grey_of_16_bits("I;16")
    image.info["transparency"] = int(np.asarray(image)[3, 3])
    expected[np.asarray(image) == np.asarray(image)[3, 3]] = 255
    return image, expected, 0


def colour() -> tuple[Image.Image, np.ndarray, int]:
    values = noise(16, 16, 3)
    return Image.fromarray(values), values, 0


def colour_with_alpha() -> tuple[Image.Image, np.ndarray, int]:
    values = noise(16, 16, 4)
    return Image.fromarray(values), on_white(values[..., :3], values[..., 3]), 1


def print_colours() -> tuple[Image.Image, np.ndarray, int]:
    values = noise(16, 16, 4)
    ink = values.astype(float)
    return Image.fromarray(values, "CMYK"), (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255, 1


def video_colours() -> tuple[Image.Image, np.ndarray, int]:
    values = noise(16, 16, 3) // 4 + 96  # all of them colours that RGB has
    y, blue, red = (values[..., i].astype(float) - (128 if i else 0) for i in range(3))
    mixed = (y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue)  # JFIF
    return Image.fromarray(values, "YCbCr"), np.clip(np.stack(mixed, -1), 0, 255), 2


MODES = {
    "1": bilevel,
    "L": grey,
    "LA": grey_with_alpha,
    "P": palette,
    "P with transparency": palette_with_alpha,
    "PA": palette_and_alpha,
    "I;16": lambda: grey_of_16_bits("I;16"),
    "I;16 with transparency": clear_grey_of_16_bits,
    "I": lambda: grey_of_16_bits("I"),
    "RGB": colour,
    "RGBA": colour_with_alpha,
    "CMYK": print_colours,
    "YCbCr": video_colours,
}
IN_FILES = {"1", "L", "LA", "P", "P with transparency", "I;16", "I;16 with transparency", "RGB", "RGBA"}  # PNG has them


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.parametrize("mode", MODES)
def test_modes_convert_as_documented(mode, tmp_path):
    image, expected, tolerance = MODES[mode]()
    assert image.mode == mode.split()[0]
    found = [resize_and_crop(image, (16, 16), 3)]
    if mode in IN_FILES:  # and through a file, as training reads it
        (tmp_path / "x.png").write_bytes(encoded(image))
        model = small_model(image_size=(16, 16), num_classes=0)
        read, _ = open_source(DataConfig(source=str(tmp_path), held_out=0), model).train(0)
        found.append(np.round((read.transpose(1, 2, 0) + 1) * 127.5))
    for pixels in found:
        assert np.abs(pixels - expected).max() <= tolerance + 0.5
    weights = np.array([0.299, 0.587, 0.114])  # ITU-R 601: how grey is made of colours
    assert np.abs(resize_and_crop(image, (16, 16), 1)[..., 0] - expected @ weights).max() <= tolerance + 1.5


def test_modes_without_a_defined_white_are_refused(tmp_path):
    for image, words in (
        (Image.fromarray(np.zeros((8, 8), np.float32)), "floats"),
        (Image.fromarray(np.full((8, 8), 70_000, np.int32)), "beyond 16 bits"),
        (Image.fromarray(np.full((8, 8), -1, np.int32)), "beyond 16 bits"),
    ):
        with pytest.raises(ValueError, match=words):
            resize_and_crop(image, (8, 8), 3)


def test_images_are_rotated_by_their_orientation(tmp_path):
    """EXIF 2.3 defines which side of the stored image is at the top, and which side is at the left, of the visible
    image.
    """
    seen = noise(12, 16, 3)
    stored = {
        1: seen,
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.transpose(1, 0, 2),
        6: np.rot90(seen),
        7: seen[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(seen, -1),
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("png", "webp"):
            place = tmp_path / kind / f"{orientation}.{kind}"
            place.parent.mkdir(exist_ok=True)
            Image.fromarray(np.ascontiguousarray(pixels)).save(place, exif=exif, lossless=True)
            files = ImageFiles(place.parent)
            assert np.array_equal(files.open(place.name, lambda image: resize_and_crop(image, (12, 16), 3)), seen), (
                orientation
            )
    content = io.BytesIO()
    Image.fromarray(seen).save(content, "PNG", exif=b"Exif\0\0MM\0*" + bytes(3))  # metadata that makes no sense
    assert np.array_equal(
        picture.apply_to_image(content.getvalue(), lambda image: resize_and_crop(image, (12, 16), 3)), seen
    )


def test_the_pixel_limit_is_ours_and_not_the_limit_of_pillow(monkeypatch):
    for theirs in (None, 10**9, 100):  # switched off, high, low
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", theirs)
        with pytest.raises(ValueError, match="more than"):
            picture.apply_to_image(png_of(8193, 8192), lambda image: pytest.fail("was opened"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert picture.apply_to_image(png_of(8192, 8192), lambda image: image.size) == (8192, 8192)


def test_damaged_images_are_either_read_or_refused_with_one_line(tmp_path, full):
    """Random changes and cuts in every format give an image or one line, never another error or a warning."""
    draw = np.random.default_rng(5)
    image = Image.fromarray(noise(24, 24, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = [encoded(image, kind, exif=exif) for kind in FORMATS]
    whole += [encoded(image, "TIFF", compression=name) for name in ("tiff_lzw", "jpeg", "tiff_adobe_deflate")]
    whole += [encoded(MODES[mode]()[0]) for mode in ("LA", "P with transparency", "I;16")]
    read, lines = 0, []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(6000 if full else 300):
            torn = bytearray(whole[number % len(whole)])
            for _ in range(draw.integers(1, 4)):
                torn[draw.integers(len(torn))] = draw.integers(256)
            if number % 5 == 0:
                del torn[draw.integers(len(torn)) :]
            (tmp_path / "x.png").write_bytes(torn)
            try:
                pixels = ImageFiles(tmp_path).open("x.png", lambda image: resize_and_crop(image, (8, 8), 3))
            except UserError as error:
                lines.append(str(error))
            else:
                assert pixels.shape == (8, 8, 3)
                read += 1
    assert len(lines) > 50
    assert all(len(line) < 200 and "x.png" in line and line.isprintable() for line in lines)
    assert read > 5


# -------------------------------------------------------------------------------------------- lines


def test_an_error_line_keeps_its_end_when_paths_are_long():
    path = "/" + "/".join(["folder"] * 60)
    line = one_line(
        f"dit-in-dit: cannot read {path}/x.png: it is torn; fix or remove the image, or set data.corrupt=skip"
    )
    assert len(line) <= LINE
    assert line.startswith("dit-in-dit: cannot read /folder/")
    assert line.endswith("/x.png: it is torn; fix or remove the image, or set data.corrupt=skip")


def test_no_control_characters_are_printed():
    assert truncate("a\nb\x1b[2J\udcff\u202e", 80) == "a\\nb\\x1b[2J\\udcff\\u202e"
    assert truncate("x" * 10**7, 40) == "x" * 13 + "..." + "x" * 24
