"""Folders and archives are read as a person sees them: every image with its class, and a report on everything else."""

from __future__ import annotations

import json
import os
import shutil
import stat
import unicodedata
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from conftest import small_model
from dit_in_dit.cli import main
from dit_in_dit.config.errors import LeftOutWarning, UserError
from dit_in_dit.config.run import DataConfig
from dit_in_dit.data.sources import count_classes, open_source
from test_data import everything

KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".jpe": "JPEG", ".webp": "WEBP"}
KINDS |= {".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF", ".gif": "GIF"}
KINDS |= {".avif": "AVIF"} if features.check("avif") else {}


def opened(source: Path, classes: int = 0, **keys):
    model = small_model(image_size=(8, 8), num_classes=classes)
    return open_source(DataConfig(**{"source": str(source), "held_out": 0.0, **keys}), model)


def image(place: Path, colour: str | int = "red", kind: str | None = None) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(place, kind)


def fruits(root: Path, **files: str) -> Path:
    """A folder of two classes with further text files."""
    for name in ("apple", "cherry"):
        image(root / name / "0.png")
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def zipped(folder: Path, place: Path, separator: str = "/") -> Path:
    with zipfile.ZipFile(place, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                entry = zipfile.ZipInfo()  # whose first argument would lose what follows a NUL, and other separators
                entry.filename = path.relative_to(folder).as_posix().replace("/", separator)
                archive.writestr(entry, path.read_bytes())
    return place


def said(source: Path, **keys) -> str:
    """The single line that reports what is left out."""
    with pytest.warns(LeftOutWarning) as caught:
        opened(source, **keys)
    [line] = caught
    assert str(line.message).isprintable()
    return str(line.message)


# ---------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("suffix", KINDS)
def test_every_one_frame_format_of_pillow_is_read(suffix, tmp_path):
    pixels = np.kron(np.arange(0, 256, 64, dtype=np.uint8).reshape(2, 2), np.ones((4, 4), np.uint8))
    exact = Image.fromarray(np.stack([pixels] * 3, -1))
    for name in (f"apple/0{suffix}", f"banana/0{suffix.upper()}"):
        (tmp_path / name).parent.mkdir()
        exact.save(tmp_path / name, KINDS[suffix], quality=100)
    image(tmp_path / "cherry/0.png")
    for source in (tmp_path, zipped(tmp_path, tmp_path.parent / f"{tmp_path.name}.zip")):
        opened_ = opened(source, 3)
        assert opened_.classes == ("apple", "banana", "cherry")
        assert opened_.labels.tolist() == [0, 1, 2]
        assert np.abs((opened_.train(1)[0][0] + 1) * 127.5 - pixels).max() <= 4


@pytest.mark.parametrize("suffix", [suffix for suffix in (".gif", ".tif", ".avif") if suffix in KINDS])
def test_several_frames_in_one_file_are_refused_or_skipped(suffix, tmp_path):
    image(tmp_path / "0.png")
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 120, 240)]
    frames[0].save(tmp_path / f"1{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match=rf"1{suffix}: several frames: store each frame as an image"):
        opened(tmp_path)
    assert "unreadable files: 1" in said(tmp_path, corrupt="skip")


def test_avif_that_pillow_cannot_read_is_reported(tmp_path, monkeypatch):
    image(tmp_path / "0.png")
    (tmp_path / "1.avif").write_bytes(b"\0\0\0\x20ftypavif" + bytes(100))
    monkeypatch.setattr("dit_in_dit.data.picture.FORMATS", ("PNG",))
    with pytest.raises(UserError, match=r"1\.avif: AVIF, which this Pillow does not read"):
        opened(tmp_path)


# ------------------------------------------------------------------------------------ what is left


def test_a_class_without_readable_files_is_refused(tmp_path):
    root = fruits(tmp_path / "set")
    for name in ("0.heic", "0.svg", "notes.txt"):
        (root / "banana").mkdir()
        (root / "banana" / name).write_text("no image that is read")
        for source in (root, zipped(root, tmp_path / "set.zip")):
            with pytest.raises(UserError, match=rf"class folder .*banana holds {name}, but no image"):
                opened(source, 2)
        shutil.rmtree(root / "banana")
    (root / "banana/more").mkdir(parents=True)
    with pytest.raises(UserError, match=r"class folder .*banana is empty"):
        opened(root, 2)


def test_a_class_of_unreadable_images_is_refused_and_never_skipped(tmp_path):
    root = fruits(tmp_path / "set", **{"banana/0.png": "no image"})
    with pytest.raises(UserError, match=r"class banana of .*set: none of its images can be read"):
        opened(root, 2, corrupt="skip")
    image(root / "banana/1.png")
    source = opened(root, 3, corrupt="skip")
    assert (source.classes, source.labels.tolist()) == (("apple", "banana", "cherry"), [0, 1, 2])


def test_files_that_are_no_images_are_reported_in_one_line(tmp_path):
    root = fruits(tmp_path / "set", **{"README.txt": "", "apple/0.json": "{}", "Thumbs.db": "", "apple/._0.png": ""})
    for source in (root, zipped(root, tmp_path / "set.zip")):
        line = said(source, classes=2)
        assert line.endswith("left out files that are no images: 2, such as README.txt, apple/0.json")
        assert str(source)[-8:] in line


def test_the_command_reports_left_out_files_once_and_only_in_one_process(tmp_path, monkeypatch, capsys):
    fruits(tmp_path / "set", **{"README.txt": ""})
    words = ["train", "--preset", "emoji", "--out", str(tmp_path / "run"), "--device", "cpu"]
    keys = ("data.source=" + str(tmp_path / "set"), "data.held_out=0", "model.num_classes=2", "train.steps=1")
    keys += ("train.warmup=0", "train.batch_size=2", "model.image_size=16", "train.sample_every=0")
    with warnings.catch_warnings():  # pytest collects warnings; this prints them as Python does
        warnings.simplefilter("default")
        warnings.showwarning = lambda *w: print(warnings.formatwarning(*w[:4]), end="")
        main([*words, *(word for key in keys for word in ("--set", key))])
        [line] = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
        assert line.startswith("dit-in-dit: ")
        assert line.endswith("set: left out files that are no images: 1, such as README.txt")
        monkeypatch.setenv("RANK", "1")
        opened(tmp_path / "set", 2)
        assert capsys.readouterr().out == ""


def test_arrays_that_are_not_read_are_reported(tmp_path):
    np.savez(tmp_path / "set.npz", images=np.zeros((3, 8, 8, 3), np.uint8), label=np.arange(3), captions=np.arange(3))
    assert said(tmp_path / "set.npz").endswith("left out arrays: 2, such as label, captions")


def test_files_of_operating_systems_do_not_become_classes(tmp_path):
    root = fruits(tmp_path / "set", **{"apple/desktop.ini": "", "apple/Thumbs.db": ""})
    for name in ("lost+found", "System Volume Information", "$RECYCLE.BIN", "@eaDir", ".Trash-0", "__MACOSX"):
        image(root / name / "0.png")
    for source in (root, zipped(root, tmp_path / "set.zip")):
        assert opened(source, 2).classes == ("apple", "cherry")


def test_an_unreadable_system_folder_is_not_entered(tmp_path, monkeypatch):
    root = fruits(tmp_path / "set")
    (root / "lost+found").mkdir()
    walk = os.scandir

    def refused(place):
        if str(place).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", str(place))
        return walk(place)

    monkeypatch.setattr("os.scandir", refused)
    assert opened(root, 2).classes == ("apple", "cherry")


# ------------------------------------------------------------------------------------------- names


def test_a_zip_made_on_windows_has_the_classes_of_its_folder(folder, tmp_path):
    expected = opened(folder, 3)
    source = opened(zipped(folder, tmp_path / "windows.zip", "\\"), 3)
    assert source.classes == expected.classes
    assert everything(source) == everything(expected)
    assert source.digest == expected.digest
    with zipfile.ZipFile(tmp_path / "out.zip", "w") as archive:
        entry = zipfile.ZipInfo()
        entry.filename = "..\\0.png"
        archive.writestr(entry, b"")
    with pytest.raises(UserError, match="points out of the archive"):
        opened(tmp_path / "out.zip")


def test_zip_members_whose_names_begin_with_a_dot_and_a_slash_are_read(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("./", b"")
        for path in folder.rglob("*.*"):
            archive.writestr(f"./{path.relative_to(folder)}", path.read_bytes())
    assert everything(opened(tmp_path / "set.zip", 3)) == everything(opened(folder, 3))


def test_links_in_a_zip_are_read_as_their_targets(tmp_path):
    root = fruits(tmp_path / "set")
    image(root / "store/blob", "lime", "PNG")
    with zipfile.ZipFile(zipped(root, tmp_path / "set.zip"), "a") as archive:
        entry = zipfile.ZipInfo("banana/0.png")
        entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "../store/blob")
    source = opened(tmp_path / "set.zip", 3)
    assert source.classes == ("apple", "banana", "cherry")
    assert np.round((source.train(1)[0][:, 0, 0] + 1) * 127.5).tolist() == [0, 255, 0]


def test_a_linked_class_folder_in_a_zip_is_refused(tmp_path):
    root = fruits(tmp_path / "set")
    with zipfile.ZipFile(zipped(root, tmp_path / "set.zip"), "a") as archive:
        entry = zipfile.ZipInfo("banana")
        entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "apple")
    with pytest.raises(UserError, match=r"class folder .*banana is a link, and links to folders are not followed"):
        opened(tmp_path / "set.zip", 3)


def test_two_unicode_forms_of_a_name_become_one_class_sorted_by_the_first_form(tmp_path):
    forms = [unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD")]
    for number, name in enumerate((*forms, "cafz", "cap", "zebra")):
        image(tmp_path / name / f"{number}.png")
    source = opened(tmp_path, 4)
    assert [unicodedata.normalize("NFC", name) for name in source.classes] == ["caf\u00e9", "cafz", "cap", "zebra"]
    assert {Path(name).stem: label for name, label in zip(source.names, source.labels, strict=True)} == {
        "0": 0, "1": 0, "2": 1, "3": 2, "4": 3,
    }  # fmt: skip


def test_names_in_one_unicode_form_keep_their_order(tmp_path):
    for name in ("cafe\u0301", "cafz", "zebra"):
        image(tmp_path / name / "0.png")
    assert opened(tmp_path, 3).classes == ("cafe\u0301", "cafz", "zebra")


def test_a_class_name_may_have_a_comma(tmp_path):
    for name in ("cat, domestic", "dog"):
        image(tmp_path / name / "0.png")
    assert opened(tmp_path, 2).classes == ("cat, domestic", "dog")


# ----------------------------------------------------------------------------------- dataset.json


def edm(root: Path, labels: object, count: int = 6) -> Path:
    """Images and labels as EDM2's dataset_tool.py writes them."""
    for number in range(count):
        image(root / f"{number // 4:05d}/img{number:08d}.png", number)
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    return root


NAMES = [f"{number // 4:05d}/img{number:08d}.png" for number in range(6)]
ROWS = [[name, label] for name, label in zip(NAMES, (3, 0, 2, 3, 1, 0), strict=True)]


def test_labels_come_from_dataset_json_and_not_from_shard_folders(tmp_path):
    root = edm(tmp_path / "set", ROWS)
    (tmp_path / "outer").mkdir()
    shutil.copytree(root, tmp_path / "outer/inner")
    for source in (root, zipped(root, tmp_path / "set.zip"), zipped(tmp_path / "outer", tmp_path / "wrapped.zip")):
        found = opened(source, 4)
        assert found.classes == ("0", "1", "2", "3")
        assert found.labels.tolist() == [3, 0, 2, 3, 1, 0]
        assert found.digest == opened(root, 4).digest
    assert len(opened(root, 10).classes) == 10  # some classes may be for others to fill
    (root / "dataset.json").write_text(json.dumps({"labels": ROWS[::-1]}))
    assert opened(root, 4).labels.tolist() == [3, 0, 2, 3, 1, 0]
    before = opened(root, 4).digest
    (root / "dataset.json").write_text(json.dumps({"labels": [[name, 3 - label] for name, label in ROWS]}))
    assert opened(root, 4).digest != before


def test_null_in_dataset_json_means_images_without_labels(tmp_path):
    source = opened(edm(tmp_path / "set", None))
    assert (source.classes, source.train_size) == (("images",), 6)


@pytest.mark.parametrize("table", ["{}", "[]", "5"])
def test_a_table_without_labels_does_not_turn_shard_folders_into_classes(table, tmp_path):
    root = tmp_path / "set"
    for number in range(2):
        (root / f"0000{number}").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / f"0000{number}/img0000000{number}.png")
    (root / "dataset.json").write_text(table)
    with pytest.raises(UserError, match=r"dataset\.json has no labels, and folders such as 00000 are no classes"):
        opened(root, classes=2)


def test_a_dataset_json_of_another_kind_is_left_out(tmp_path):
    root = fruits(tmp_path / "set", **{"dataset.json": '{"title": "fruits"}', "apple/dataset.json": '{"labels": 3}'})
    assert said(root, classes=2).endswith("no images: 2, such as apple/dataset.json, dataset.json")
    assert opened(root, 2).classes == ("apple", "cherry")


BAD = {
    "half a file": ('{"labels": [["a"', "not valid JSON"),
    "deep": ("[" * 200_000, "nests too deeply"),
    "a number": ('{"labels": 3}', r"labels must be \[\[NAME"),
    "names": ('{"labels": ["a", "b"]}', r"labels must be \[\[NAME"),
    "pairs of another kind": ('{"labels": [[1, 2]]}', r"labels must be \[\[NAME"),
    "vectors": (json.dumps({"labels": [[name, [0, 1]] for name in NAMES]}), "labels must be whole numbers"),
    "truths": (json.dumps({"labels": [[name, True] for name in NAMES]}), "labels must be whole numbers"),
    "fractions": (json.dumps({"labels": [[name, 0.5] for name in NAMES]}), "labels must be whole numbers"),
    "a label twice": (json.dumps({"labels": [*ROWS, ROWS[0]]}), "two labels to one image"),
    "an image without": (json.dumps({"labels": ROWS[:-1]}), r"no label for 1 images, such as 00001/img00000005"),
    "below zero": (json.dumps({"labels": [[name, -1] for name in NAMES]}), "from 0 to .* got -1"),
    "beyond the model": (json.dumps({"labels": [[name, 4] for name in NAMES]}), "from 0 to 3: got 4 to 4"),
    "a class without images": (json.dumps({"labels": [*ROWS, ["00009/x.png", 7]]}), "labels of class 7"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_dataset_json_gives_a_one_line_error(name, tmp_path):
    root = edm(tmp_path / "set", None)
    (root / "dataset.json").write_text(BAD[name][0])
    with pytest.raises(UserError, match=BAD[name][1]) as refused:
        opened(root, 4)
    assert str(refused.value).isprintable()


def test_a_huge_class_number_takes_no_memory(tmp_path):
    with pytest.raises(UserError, match="from 0 to 9999999"):
        opened(edm(tmp_path / "set", [[name, 10**12] for name in NAMES]))


def test_labels_of_missing_images_are_reported(tmp_path):
    line = said(edm(tmp_path / "set", [*ROWS, ["00009/lost.png", 3]]), classes=4)
    assert line.endswith("left out labels of dataset.json without an image: 1, such as 00009/lost.png")


# ------------------------------------------------------------------------------------------ splits


@pytest.mark.parametrize(
    ("one", "other"), [("train", "val"), ("train", "test"), ("Train", "Valid"), ("training", "validation")]
)
def test_a_folder_of_splits_is_refused(one, other, tmp_path):
    for split in (one, other):
        fruits(tmp_path / "set" / split)
    for source in (tmp_path / "set", tmp_path):
        with pytest.raises(UserError, match=r"holds splits, not classes: name one, .* or ") as refused:
            opened(source, 2)
        assert all(f"/set/{split}" in str(refused.value) for split in (one, other))
    with pytest.raises(UserError, match="unpack it and name one"):
        opened(zipped(tmp_path / "set", tmp_path / "set.zip"), 2)
    assert opened(tmp_path / "set" / one, 2).classes == ("apple", "cherry")


def test_a_class_named_train_among_other_vehicles_is_not_a_split(tmp_path):
    for name in ("bus", "train", "tram"):
        image(tmp_path / name / "0.png")
    assert opened(tmp_path, 3).classes == ("bus", "train", "tram")


# ------------------------------------------------------------------------------------ labels of arrays


def test_boolean_labels_of_arrays_are_read_as_0_and_1(tmp_path):
    pixels, labels = np.zeros((4, 8, 8, 3), np.uint8), np.array([True, False, False, True])
    np.savez(tmp_path / "set.npz", images=pixels, labels=labels)
    np.save(tmp_path / "set.npy", pixels)
    np.save(tmp_path / "set.labels.npy", labels)
    for name in ("set.npz", "set.npy"):
        assert opened(tmp_path / name, 2).labels.tolist() == [1, 0, 0, 1]
        assert [type(opened(tmp_path / name, 2).train(i)[1]) for i in range(4)] == [int] * 4
        assert count_classes(DataConfig(source=str(tmp_path / name))) == 2


@pytest.mark.parametrize("labels", [np.full(4, np.nan), np.full(4, 0.5), np.array(["a"] * 4)])
def test_labels_that_are_no_whole_numbers_are_refused_when_counted(labels, tmp_path):
    np.savez(tmp_path / "set.npz", images=np.zeros((4, 8, 8, 3), np.uint8), labels=labels)
    with pytest.raises(UserError, match="must be whole numbers"):
        count_classes(DataConfig(source=str(tmp_path / "set.npz")))
