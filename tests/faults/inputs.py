"""Bad inputs by name: each writes its files into the current folder and gives a command that must refuse them, with a
part of the expected line."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Words = list[str]
Bad = tuple[Callable[[], Words], str]  # the files and the command; what the line says


def settings(*assignments: str) -> Words:
    return [word for assignment in assignments for word in ("--set", assignment)]


SMALL = ("model.image_size=16", "model.outer.width=32", "model.outer.num_heads=2", "model.inner.width=16")
SMALL = (*SMALL, "model.inner.num_heads=2", "model.num_classes=2", "train.steps=2", "train.batch_size=4")
SMALL = (*SMALL, "data.held_out=0", "train.warmup=0", "sample.steps=2")


def training(source: str, *more: str) -> Words:
    words = ["train", "--preset", "emoji", *settings(*SMALL, f"data.source={source}", *more)]
    return [*words, "--out", "run", "--device", "cpu"]


# --------------------------------------------------------------------------------------------- YAML


def assigned(*assignments: str) -> Callable[[], Words]:
    return lambda: ["config", "--preset", "emoji", *settings(*assignments)]


def yaml(content: str | bytes, *words: str) -> Callable[[], Words]:
    def make() -> Words:
        Path("bad.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
        return [*(words or ("config", "--config")), "bad.yaml"]

    return make


LAUGHS = "seed: [&a [x, x, x, x, x, x, x, x, x], " + ", ".join(
    f"&{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
YAML: dict[str, Bad] = {
    "a whole number that is none": (assigned("seed=nan"), "seed must be a whole number"),
    "a negative number": (assigned("seed=-1"), "seed must be from 0"),
    "infinity": (assigned("train.learning_rate=.inf"), "finite number"),
    "a number beyond floats": (assigned("train.steps=1e400"), "train.steps must be a whole number"),
    "a number of thousands of digits": (assigned("seed=0x" + "f" * 5000), "seed must be a whole number"),
    "as many in decimal": (assigned("seed=" + "9" * 5000), "--set seed is not valid YAML"),
    "sizes that do not divide": (assigned("model.patch_size=7"), "must divide image_size"),
    "heads that do not divide": (assigned("model.outer.num_heads=7"), "must divide width"),
    "an unknown key": (assigned("model.inner.widht=3"), "did you mean 'model.inner.width'"),
    "a key like no other": (assigned("x" * 3000 + "=1"), "the nearest of"),
    "a key below a value": (assigned("model=5", "model.depth=3"), "model is set to '5' and has a key below it"),
    "a list for a number": (assigned("model.channels=[1, 2]"), "model.channels must be a whole number"),
    "a number for a group": (assigned("model=5"), "model must be a group of keys"),
    "a date": (assigned("seed=2020-01-01"), "seed must be a whole number"),
    "bytes": (assigned("seed=!!binary aGk="), "seed must be a whole number"),
    "too many blocks": (assigned("model.stages=" + "(outer)*9" * 5000), "more than 1000 blocks"),
    "brackets without end": (assigned("model.stages=" + "(" * 3000), "cannot read"),
    "an escape sequence": (assigned('data.source="\\e[31m"'), "data.source must be text"),
    "a tag that calls": (yaml("seed: !!python/object/apply:os.system ['touch canary']"), "not valid YAML, line 1"),
    "billion laughs": (yaml(LAUGHS + "]"), "its aliases (*) stand for more than"),
    "a list that holds itself": (yaml("seed: &a [*a]"), "contains itself"),
    "brackets in brackets": (yaml("[" * 60_000), "nests too deeply"),
    "groups in groups": (yaml("{a: " * 10_000), "nests too deeply"),
    "a file too large": (yaml("# " + "x" * 10**6), "must hold at most"),
    "a file in UTF-16": (yaml("seed: 1".encode("utf-16")), "save it as UTF-8"),
    "a file in Latin-1": (yaml(b"seed: 1 # \xe9"), "save it as UTF-8"),
    "a NUL": (yaml(b"seed: 1\0"), "unacceptable character"),
    "an empty file": (yaml(""), "must hold keys such as"),
    "a list for a config": (yaml("- seed: 1"), "must hold keys such as"),
    "two documents": (yaml("seed: 1\n---\nseed: 2"), "not valid YAML, line 2"),
    "a key given twice": (yaml("seed: 1\nseed: 2"), "given twice, the second on line 2"),
    "a key that is a list": (yaml("? [seed]\n: 1"), "not valid YAML"),
    "a key that is a number": (yaml("1: 2"), "unknown key '1'"),
    "a byte order mark before a slip": (yaml(b"\xef\xbb\xbfsed: 1"), "did you mean 'seed'"),
    "a month that is none": (yaml("seed: 2020-13-01"), "month must be in 1..12"),
    "a device for a config": (lambda: ["config", "--config", "/dev/zero"], "is it the right file?"),
    "a folder for a config": (lambda: ["config", "--config", "."], "Is a directory"),
    "a name with a NUL": (lambda: ["config", "--config", "a\0.yaml"], "a\\x00.yaml"),
    "a name too long": (lambda: ["config", "--config", "n" * 5000], "File name too long"),
    "a bomb for a study": (yaml(LAUGHS + "]", "study", "plan"), "its aliases (*) stand for more than"),
    "a bomb to match": (yaml(LAUGHS + "]", "match", "--preset", "emoji", "--like"), "its aliases (*) stand for more"),
    "a group of a study that is none": (
        lambda: ["study", "plan", "ablation", *settings("set=5", "set.train.steps=3")],
        "study.set is set to '5'",
    ),
}


# ------------------------------------------------------------------------------------------- images


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


GOOD = encoded(Image.new("RGB", (20, 20), "red"))
JPEG = encoded(Image.effect_noise((64, 64), 90), "JPEG")
FILM = encoded(Image.new("L", (9, 9)), "GIF", save_all=True, append_images=[Image.new("L", (9, 9), 200)])
TIFF = encoded(Image.new("RGB", (20, 20), "red"), "TIFF")
THREE = {"a/1.png": GOOD, "a/2.png": GOOD, "b/1.png": GOOD}


def png_of(width: int, height: int) -> bytes:
    """A small file whose header claims a large image."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def files(**content: bytes) -> None:
    for name, part in {**THREE, **content}.items():
        Path("data", name).parent.mkdir(parents=True, exist_ok=True)
        Path("data", name).write_bytes(part)


def folder(name: str, content: bytes) -> Callable[[], Words]:
    def make() -> Words:
        files(**{name: content})
        return training("data")

    return make


def beside(put: Callable[[Path], object]) -> Callable[[], Words]:
    """Good images, and the files that `put` adds to their folder."""

    def make() -> Words:
        files()
        put(Path("data"))
        return training("data")

    return make


def undecodable_class(data: Path) -> None:
    place = os.path.join(os.fsencode(data), b"\xff\xfe")
    os.mkdir(place)
    Path(os.fsdecode(place), "1.png").write_bytes(GOOD)


IMAGES: dict[str, Bad] = {
    "no byte": (
        folder("b/bad.png", b""),
        "b/bad.png: not a PNG, JPEG, WebP, BMP, TIFF, GIF or AVIF image; fix or remove the image",
    ),
    "text as PNG": (folder("b/bad.png", b"I am text"), "b/bad.png: not a PNG"),
    "a page as JPEG": (folder("b/bad.jpg", b"<html>404</html>"), "b/bad.jpg: not a PNG"),
    "half a JPEG": (folder("b/bad.jpg", JPEG[: len(JPEG) // 2]), "b/bad.jpg: image file is truncated"),
    "the header of a PNG": (folder("b/bad.png", GOOD[:33]), "b/bad.png"),
    "the signature of a PNG": (folder("b/bad.png", GOOD[:8]), "b/bad.png: not a PNG"),
    "the header of a WebP": (folder("b/bad.webp", b"RIFF\x10\0\0\0WEBPVP8 " + bytes(20)), "b/bad.webp"),
    "an icon as PNG": (folder("b/bad.png", encoded(Image.new("RGB", (16, 16)), "ICO")), "not a PNG"),
    "a film": (
        folder("b/bad.gif", FILM),
        "b/bad.gif: several frames: store each frame as an image; fix or remove the image",
    ),
    "the header of a TIFF": (folder("b/bad.tif", TIFF[:8]), "b/bad.tif"),
    "a class that no one reads": (folder("c/0.heic", b""), "class folder data/c holds 0.heic, but no image"),
    "splits for classes": (
        lambda: [files(**{"train/1.png": GOOD, "val/1.png": GOOD}), training("data")][1],
        "data holds splits, not classes: name one, data/train or data/val",
    ),
    "labels in half a file": (folder("dataset.json", b'{"labels": [['), "data/dataset.json is not valid JSON"),
    "labels in brackets": (folder("dataset.json", b"[" * 200_000), "data/dataset.json nests too deeply"),
    "labels of others": (folder("dataset.json", b'{"labels": [["x.png", 1]]}'), "has no label for 3 images"),
    "an image without pixels": (folder("b/bad.png", png_of(0, 5)), "b/bad.png"),
    "a bomb below Pillow's limit": (
        folder("b/bad.png", png_of(9_000, 9_000)),
        "9000x9000 is more than 67108864 pixels",
    ),
    "a bomb at which Pillow warns": (folder("b/bad.png", png_of(12_000, 12_000)), "more than 67108864 pixels"),
    "a bomb that Pillow refuses": (folder("b/bad.png", png_of(60_000, 60_000)), "more than 67108864 pixels"),
    "a bomb as large as can be": (folder("b/bad.png", png_of(2**31 - 1, 2**31 - 1)), "more than 67108864 pixels"),
    "a name as long as can be": (folder(f"a/{'n' * 250}.png", b""), "n.png: not a PNG"),
    "a name of two lines": (folder("a/one\ntwo\x1b[31m.png", b""), "one\\ntwo\\x1b[31m.png: not a PNG"),
    "a pipe as image": (beside(lambda data: os.mkfifo(data / "a/x.png")), "a/x.png: not a file"),
    "a device as image": (beside(lambda data: (data / "a/x.png").symlink_to("/dev/zero")), "a/x.png: not a file"),
    "a link to itself": (beside(lambda data: (data / "a/x.png").symlink_to("x.png")), "symbolic links"),
    "a link to nothing": (beside(lambda data: (data / "a/x.png").symlink_to("nothing")), "a/x.png: No such file"),
    "a folder that holds itself": (beside(lambda data: (data / "c").symlink_to(data.resolve())), "data/c is empty"),
    "an empty class": (beside(lambda data: (data / "c").mkdir()), "class folder data/c is empty: fill it"),
    "a class of hidden files": (
        beside(lambda data: [(data / "c").mkdir(), (data / "c/.DS_Store").touch()]),
        "class folder data/c is empty",
    ),
    "a class of two lines": (folder("b\nc/1.png", GOOD), "'b\\nc' of data cannot be printed"),
    "a class that is no text": (beside(undecodable_class), "cannot be printed: rename it"),
    "a class too many": (folder("c/1.png", GOOD), "model.num_classes must fit the data: got 2"),
    "an empty folder": (lambda: [Path("data").mkdir(), training("data")][1], "no .png, .jpg"),
    "no such folder": (lambda: training("absent"), "no such file or folder: absent"),
    "a pipe as data": (lambda: [os.mkfifo("data"), training("data")][1], "data is neither a folder nor a .zip"),
    "a device as data": (lambda: training("/dev/zero"), "/dev/zero is neither a folder nor a .zip"),
}


# ----------------------------------------------------------------------------------------- archives


def archive(content: dict[str, bytes], method: int = zipfile.ZIP_STORED, change: object = None) -> Callable[[], Words]:
    """A .zip of good images and `content`; `change(bytes, offset of the directory)` changes its bytes."""

    def make() -> Words:
        with zipfile.ZipFile("data.zip", "w", method, compresslevel=1) as made:
            for name, part in {**THREE, **content}.items():
                made.writestr(name, part)
        whole = bytearray(Path("data.zip").read_bytes())
        if callable(change):
            whole = change(whole, whole.index(b"PK\x01\x02"))
        Path("data.zip").write_bytes(whole)
        return training("data.zip")

    return make


def encrypted(whole: bytearray, directory: int) -> bytearray:
    whole[6] |= 1
    whole[directory + 8] |= 1
    return whole


def of_unknown_method(whole: bytearray, directory: int) -> bytearray:
    whole[8] = whole[directory + 10] = 99
    return whole


def torn(whole: bytearray, _: int) -> bytearray:
    whole[50] ^= 255
    return whole


ARCHIVES: dict[str, Bad] = {
    "a member with an absolute name": (
        archive({"/etc/x.png": GOOD}),
        "holds '/etc/x.png', which points out of the archive",
    ),
    "a member above the archive": (archive({"../x.png": GOOD}), "holds '../x.png', which points out of the archive"),
    "a member above in the middle": (archive({"a/../../x.png": GOOD}), "which points out of the archive"),
    "a member that grows": (
        archive({"b/x.png": bytes(2**28 + 1)}, zipfile.ZIP_DEFLATED),
        "x.png: 268435457 bytes, more",
    ),
    "an encrypted member": (archive({}, change=encrypted), "password required for extraction; fix or remove"),
    "an unknown compression": (archive({}, change=of_unknown_method), "compression method is not supported"),
    "a damaged member": (archive({}, change=torn), "Bad CRC-32"),
    "a damaged member, bzip2": (archive({}, zipfile.ZIP_BZIP2, torn), "data.zip/a/1.png: "),
    "a damaged member, lzma": (archive({}, zipfile.ZIP_LZMA, torn), "data.zip/a/1.png: "),
    "half an archive": (archive({}, change=lambda whole, _: whole[:-30]), "neither a folder nor a .zip"),
    "an archive without images": (
        lambda: [zipfile.ZipFile("data.zip", "w").close(), training("data.zip")][1],
        "no .png, .jpg",
    ),
    "an empty class in an archive": (archive({"c/": b""}), "class folder data.zip/c is empty"),
    "text as tar": (lambda: [Path("data.tar").write_bytes(b"x" * 2000), training("data.tar")][1], "not a plain .tar"),
    "more shards than there can be": (lambda: training("'x-{0..999999999}.tar'"), "at most 100000 shards"),
}


# ------------------------------------------------------------------------------------------- arrays


PIXELS, LABELS = np.zeros((4, 16, 16, 3), np.uint8), np.array([0, 1, 0, 1])


def arrays(**content: object) -> Callable[[], Words]:
    def make() -> Words:
        np.savez("data.npz", **content)
        return training("data.npz")

    return make


def written(name: str, content: bytes) -> Callable[[], Words]:
    return lambda: [Path(name).write_bytes(content), training(name)][1]


def header(shape: str) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00v\x00" + text.ljust(117) + b"\n"


def zipped_zeros() -> Words:
    with (
        zipfile.ZipFile("data.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made,
        made.open("images.npy", "w") as file,
    ):
        file.write(header("(400000, 16, 16, 3)"))
        for _ in range(257):
            file.write(bytes(2**20))
    return training("data.npz")


def a_lie_in_a_zip() -> Words:
    with zipfile.ZipFile("data.npz", "w") as made:
        made.writestr("images.npy", header("(1000000000000, 16, 16, 3)"))
    return training("data.npz")


ARRAYS: dict[str, Bad] = {
    "NaN in latents": (
        lambda: [
            np.savez("data.npz", images=np.full((4, 3, 16, 16), np.nan, np.float32), labels=LABELS),
            training("data.npz"),
        ][1],
        "image 0 of data.npz holds NaN",
    ),
    "no image": (arrays(images=PIXELS[:0], labels=LABELS[:0]), "0 training and 0 held-out images"),
    "images of another size": (arrays(images=PIXELS[:, :8], labels=LABELS), "must be (N, 16, 16, 3)"),
    "images of text": (arrays(images=np.array(["a"] * 4), labels=LABELS), "must be uint8 (pixels) or floats"),
    "images of structures": (arrays(images=np.zeros(4, [("a", "u1")]), labels=LABELS), "must be uint8 (pixels)"),
    "one number": (arrays(images=np.uint8(3), labels=LABELS), "must be (N, 16, 16, 3)"),
    "labels below zero": (arrays(images=PIXELS, labels=LABELS - 1), "from 0 to 1"),
    "labels in fractions": (arrays(images=PIXELS, labels=LABELS / 2), "4 whole numbers"),
    "labels of objects": (arrays(images=PIXELS, labels=np.array([{}] * 4)), "it holds Python objects"),
    "text as npz": (written("data.npz", b"text"), "or is no file of arrays"),
    "text as npy": (written("data.npy", b"text"), "cannot read arrays from data.npy"),
    "an empty npy": (written("data.npy", b""), "cannot read arrays from data.npy"),
    "a header that lies": (written("data.npy", header("(1000000000000, 16, 16, 3)")), "larger than|greater than"),
    "a header that lies in a zip": (a_lie_in_a_zip, "Unable to allocate"),
    "zeros that grow": (zipped_zeros, "a zip bomb?"),
    "a folder as npz": (lambda: [Path("data.npz").mkdir(), training("data.npz")][1], "files in data.npz: name another"),
}


# ----------------------------------------------------------------------------------------- commands


COMMANDS: dict[str, Bad] = {
    "no command": (lambda: [], "the following arguments are required: COMMAND"),
    "an unknown command": (lambda: ["trian"], "did you mean 'train'"),
    "an unknown preset": (lambda: ["inspect", "--preset", "emoij"], "did you mean 'emoji'"),
    "a preset like no other": (lambda: ["inspect", "--preset", "x" * 10**5], "the nearest of"),
    "a batch of many digits": (lambda: ["inspect", "--preset", "emoji", "--batch", "9" * 5000], "--batch"),
    "a run that is none": (lambda: ["sample", "absent", "--out", "drawn"], "no run at absent"),
    "a run whose name is too long": (lambda: ["doctor", "r" * 5000], "File name too long"),
    "an evaluation that is none": (lambda: ["compare", "a", "b"], "run `dit-in-dit evaluate a` first"),
    "curves of nothing": (lambda: ["curves", "absent"], "no run at absent"),
    "maps at no time": (lambda: ["maps", "absent", "--times", "nan"], "must be times above 0 and below 1"),
    "a target that is no number": (lambda: ["curves", "absent", "--reach", "0.5:nan"], "must be T:ERROR"),
    "a tolerance that is no number": (
        lambda: ["match", "--preset", "emoji", "--like", "emoji", "--tolerance", "nan"],
        "--tolerance must be at least 0.0001 and below 1: got nan",
    ),
    "an unknown study": (lambda: ["study", "plan", "ablatoin"], "did you mean 'ablation'"),
    "a study's folder that is none": (lambda: ["study", "status", "absent"], "absent is not a study's folder"),
    "seconds that are none": (lambda: ["bench", "--seconds", "nan"], "must be above 0 and at most 3600"),
    "a model wider than any memory": (
        lambda: [*training("emoji", "model.num_classes=9", "model.outer.width=65536", "model.depth=null")],
        "make the model smaller",
    ),
    "an image larger than any memory": (
        lambda: training(
            "emoji", "model.num_classes=9", "model.image_size=65536", "model.patch_size=1", "model.inner.sub_patch=1"
        ),
        "make the model smaller",
    ),
    "an unknown suite": (lambda: ["bench", "--suite", "x"], "choose from cpu, cuda, quick"),
    "an output name with a NUL": (
        lambda: ["doctor", "--preset", "emoji", "--out", "a\0b"],
        "cannot write to a\\x00b: embedded null byte; choose another --out",
    ),
}

BAD: dict[str, Bad] = YAML | IMAGES | ARCHIVES | ARRAYS | COMMANDS
