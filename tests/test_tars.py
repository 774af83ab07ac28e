"""Tar shards give the same examples as a folder, in the same order; nothing is lost silently."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import pytest

from conftest import small_model
from dit_in_dit.config.errors import LeftOutWarning, UserError
from dit_in_dit.config.run import DataConfig
from dit_in_dit.data.sources import open_source
from test_data import everything

CLASSES = ("blue", "green", "red")


def opened(source, *, classes: int = 3, **keys):
    model = small_model(image_size=(8, 8), num_classes=classes)
    return open_source(DataConfig(**{"source": str(source), "held_out": 0.2, **keys}), model)


def pack(shard: Path, members: Iterable[tuple[str, bytes]]) -> None:
    with tarfile.open(shard, "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def paths_of(folder: Path) -> list[Path]:
    """The folder's images in the order of their names."""
    return sorted(folder.rglob("*.*"), key=lambda path: path.relative_to(folder).as_posix())


@pytest.fixture
def shards(folder, tmp_path) -> Path:
    """The folder as three shards with `.cls` and `.json` members, as in WebDataset."""
    paths, place = paths_of(folder), tmp_path / "shards"
    place.mkdir()
    for number in range(3):
        members = []
        for path in paths[number * 10 : number * 10 + 10]:
            key = path.relative_to(folder).with_suffix("").as_posix()
            members.append((f"{key}.json", b"{}"))
            members.append((f"{key}.cls", str(CLASSES.index(path.parent.name)).encode()))
            members.append((f"{key}{path.suffix}", path.read_bytes()))
            members.append((f"{key}.mask.png", b"more about an example is no example"))
        pack(place / f"train-{number:04d}.tar", members)
    return place


def test_shards_give_the_same_examples_as_their_folder(folder, shards, monkeypatch):
    expected = everything(opened(folder))
    for source in (shards, shards / "train-*.tar", shards / "train-{0000..0002}.tar"):
        assert everything(opened(source)) == expected
    monkeypatch.setattr(
        "dit_in_dit.data.formats.images.IN_MEMORY", 0
    )  # read by offset when asked, also by a worker's copy
    source = pickle.loads(pickle.dumps(opened(shards)))
    assert everything(source) == expected
    assert source.train(7)[0].tobytes() == expected[7][0]


def test_without_cls_files_the_folder_or_the_shard_is_the_class(folder, tmp_path):
    expected = everything(opened(folder))
    pack(tmp_path / "one.tar", ((f"./{p.relative_to(folder)}", p.read_bytes()) for p in paths_of(folder)))
    assert everything(opened(tmp_path / "one.tar")) == expected
    (tmp_path / "raw").mkdir()
    for name in CLASSES:
        pack(tmp_path / f"raw/{name}.tar", ((p.name, p.read_bytes()) for p in paths_of(folder) if name in p.parts))
    source = opened(tmp_path / "raw")
    assert source.classes == CLASSES
    assert everything(source) == expected


def test_the_index_is_recomputed_only_when_the_shard_changes(folder, shards, monkeypatch):
    first = everything(opened(shards))
    indexes = sorted(shards.glob("*.index.json"))
    assert len(indexes) == 3
    monkeypatch.setattr("tarfile.open", None)  # whoever walks a tar now, fails
    assert everything(opened(shards)) == first
    monkeypatch.undo()
    indexes[0].write_text("torn")
    path = paths_of(folder)[0]
    pack(shards / "train-0001.tar", [("a.png", path.read_bytes()), ("a.cls", b"2")])
    changed = opened(shards, held_out=0.0)
    assert changed.train_size == 21
    assert changed.train(10)[1] == 2
    assert json.loads(indexes[0].read_text())["labels"]


def test_the_index_is_cached_when_the_folder_of_shards_is_read_only(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    opening = Path.open

    def refused(path: Path, mode: str = "r", *arguments, **keys):
        if path.parent == shards and mode != "rb":
            raise PermissionError(path)
        return opening(path, mode, *arguments, **keys)

    monkeypatch.setattr(Path, "open", refused)
    first = everything(opened(shards))
    assert not list(shards.glob("*.json"))
    assert len(list((tmp_path / "cache/dit-in-dit/tars").iterdir())) == 3
    monkeypatch.setattr("tarfile.open", None)
    assert everything(opened(shards)) == first


def test_variants_of_one_family_are_not_split(folder, tmp_path):
    content = paths_of(folder)[0].read_bytes()
    names = [f"hand{i}~{tone}.png" for i in range(20) for tone in ("light", "dark")]
    pack(tmp_path / "set.tar", ((name, content) for name in names))
    source = opened(tmp_path / "set.tar", classes=0)
    held = [source.names[i].split("/")[1] for i in source._held]
    assert 0 < len(held) < 40
    assert all(name.replace("light", "dark") in held for name in held if "light" in name)


@pytest.mark.parametrize("cut", [700, 20 * 512, -1024])
def test_a_truncated_shard_is_refused(shards, cut):
    shard = shards / "train-0002.tar"
    with tarfile.open(shard) as archive:
        end = [m.offset_data + -(-m.size // 512) * 512 for m in archive][-1]
    os.truncate(shard, end if cut < 0 else cut)
    with pytest.raises(UserError, match=r"truncated|not a plain \.tar"):
        opened(shards)


def test_files_that_are_not_shards_are_refused(folder, shards, tmp_path):
    (tmp_path / "text.tar").write_text("not a tar")
    with tarfile.open(tmp_path / "squeezed.tar", "w:gz") as archive:
        archive.add(shards)
    pack(tmp_path / "empty.tar", [("readme.txt", b"no images")])
    pack(tmp_path / "name.tar", [("a.png", b""), ("a.cls", b"red")])
    image = paths_of(folder)[0].read_bytes()
    pack(tmp_path / "some.tar", [("a.png", image), ("a.cls", b"1"), ("b.png", image)])
    pack(tmp_path / "large.tar", [("a.png", image), ("a.cls", b"3")])
    for source, part, keys in (
        ("large.tar", "from 0 to 2: got 3 to 3", {"held_out": 0.0}),
        ("text.tar", "not a plain .tar", {}),
        ("squeezed.tar", "not a plain .tar", {}),
        ("empty.tar", "no .png", {}),
        ("name.tar", "class number: got 'red'", {}),
        ("some.tar", "b.png has no .cls", {}),
        ("absent.tar", "no such file", {}),
        ("shards/train-{0000..0003}.tar", "no such file: .*0003.tar", {}),
        ("*.tar.gz", "no such file", {}),
    ):
        with pytest.raises(UserError, match=part):
            opened(tmp_path / source, **keys)


def test_a_digest_of_shards_depends_on_content_and_not_on_place(shards, tmp_path):
    first = opened(shards).digest
    shutil.copytree(shards, tmp_path / "moved", ignore=shutil.ignore_patterns("*.json"))
    assert opened(tmp_path / "moved").digest == opened(tmp_path / "moved/train-*.tar").digest == first
    (tmp_path / "moved/train-0002.tar").unlink()
    assert opened(tmp_path / "moved").digest != first


def linked(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


def add_links(shard: Path, *links: tarfile.TarInfo) -> None:
    with tarfile.open(shard, "a") as archive:
        for link in links:
            archive.addfile(link)


def test_links_in_a_tar_are_read_as_their_targets(folder, tmp_path):
    paths = paths_of(folder)
    members = [
        ("blobs/0.bin", paths[0].read_bytes()),
        (".hidden/0.bin", paths[3].read_bytes()),
        ("red/0.png", paths[1].read_bytes()),
    ]
    pack(tmp_path / "set.tar", [*members, ("green/0.png", paths[2].read_bytes())])
    add_links(
        tmp_path / "set.tar",
        linked("red/store", "../.hidden"),
        linked("red/1.png", "../blobs/0.bin"),
        linked("red/2.png", "0.png"),
        linked("green/1.png", "red/2.png", tarfile.LNKTYPE),
        linked("green/2.png", "../red/store/0.bin"),
    )
    source = opened(tmp_path / "set.tar", classes=2, held_out=0.0)
    assert [name.split("/", 1)[1] for name in source.names] == [
        "red/0.png", "green/0.png", "red/1.png", "red/2.png", "green/1.png", "green/2.png",
    ]  # fmt: skip
    assert [source.files.content(name) for name in source.names] == [
        paths[number].read_bytes() for number in (1, 2, 0, 1, 1, 3)
    ]
    labels = [("a.png", paths[0].read_bytes()), ("b.png", paths[1].read_bytes()), ("a.cls", b"1"), ("c.cls", b"0")]
    pack(tmp_path / "labels.tar", [*labels, ("c.png", paths[2].read_bytes())])
    add_links(tmp_path / "labels.tar", linked("b.cls", "a.cls", tarfile.LNKTYPE))
    assert opened(tmp_path / "labels.tar", classes=2, held_out=0.0).labels.tolist() == [1, 1, 0]


def test_a_file_stored_again_as_a_link_to_itself_is_read(folder, tmp_path):
    image = paths_of(folder)[0].read_bytes()
    pack(tmp_path / "set.tar", [("x/0.png", image), ("x/1.png", image)])
    add_links(tmp_path / "set.tar", linked("x/0.png", "./x/0.png", tarfile.LNKTYPE))
    with warnings.catch_warnings(action="error"):  # nothing is lost
        source = opened(tmp_path / "set.tar", classes=0, held_out=0.0)
    assert [source.files.content(name) for name in source.names] == [image, image]


def test_a_class_folder_that_is_a_link_is_refused(folder, tmp_path):
    image = paths_of(folder)[0].read_bytes()
    pack(tmp_path / "set.tar", [("w/a/0.png", image), ("w/b/0.png", image)])
    add_links(tmp_path / "set.tar", linked("w/c", "b"))
    with pytest.raises(UserError, match=r"class folder .*w/c is a link, and links to folders are not followed"):
        opened(tmp_path / "set.tar", held_out=0.0)


def test_links_that_leave_the_tar_or_are_broken_or_circular_are_refused_or_skipped(folder, tmp_path):
    image = paths_of(folder)[0].read_bytes()
    for number, target in enumerate(("../../etc/passwd", "/etc/passwd", "nothing.png", "b.png", "a.png/b.png")):
        shard = tmp_path / f"{number}.tar"
        pack(shard, [("x/0.png", image)])
        add_links(shard, linked("x/b.png", target), linked("x/a.png", "x/b.png", tarfile.LNKTYPE))
        with pytest.raises(UserError, match=r"x/[ab]\.png: a link to a missing file"):
            opened(shard, classes=0, held_out=0.0)
        with pytest.warns(LeftOutWarning, match="unreadable files: 2"):
            source = opened(shard, classes=0, held_out=0.0, corrupt="skip")
        assert source.train_size == 1


def test_a_tar_is_read_to_the_end_of_the_file(folder, tmp_path):
    paths = paths_of(folder)
    pack(tmp_path / "all.tar", ((f"{p.parent.name}/{p.name}", p.read_bytes()) for p in paths))
    parts = []
    for number, some in enumerate((paths[:7], paths[7:20], paths[20:])):
        part = tmp_path / f"part{number}.tar"
        pack(part, ((f"{p.parent.name}/{p.name}", p.read_bytes()) for p in some))
        parts.append(part.read_bytes())
    (tmp_path / "joined.tar").write_bytes(parts[0] + bytes(3 * 2**20) + parts[1] + parts[2])
    assert everything(opened(tmp_path / "joined.tar")) == everything(opened(tmp_path / "all.tar"))
    (tmp_path / "joined.tar").write_bytes(parts[0] + parts[1] + parts[2][:700])
    with pytest.raises(UserError, match=r"truncated|not a plain \.tar"):
        opened(tmp_path / "joined.tar")
    last = len(parts[2].rstrip(b"\0"))
    (tmp_path / "joined.tar").write_bytes(parts[2][: last - last % 512] + b"something else" * 100)  # no end mark
    with pytest.raises(UserError, match="is truncated: at byte"):
        opened(tmp_path / "joined.tar")


@pytest.mark.parametrize("stray", [b"\r\nEO", b"something else" * 100])
def test_bytes_after_the_end_mark_are_reported_and_not_read(folder, tmp_path, stray):
    paths, shard = paths_of(folder), tmp_path / "set.tar"
    pack(shard, ((f"{p.parent.name}/{p.name}", p.read_bytes()) for p in paths))
    whole = opened(shard)
    expected, digest = everything(whole), whole.digest
    with shard.open("ab") as file:
        file.write(stray)
    for _ in range(2):  # the second time from the index
        with pytest.warns(LeftOutWarning, match=f"left out bytes behind a tar's end mark: {len(stray)}, such as set"):
            source = opened(shard)
        assert everything(source) == expected
        assert source.digest == digest  # a run that was trained on it resumes


def test_the_last_of_several_members_with_one_name_is_read_and_the_others_are_reported(folder, tmp_path):
    first, second, third = (path.read_bytes() for path in paths_of(folder)[:3])
    pack(tmp_path / "set.tar", [("a/0.png", first), ("b/0.png", second), ("a/0.png", third)])
    with pytest.warns(LeftOutWarning, match="members that are no images: 1, such as set.tar/a/0.png"):
        source = opened(tmp_path / "set.tar", classes=2, held_out=0.0)
    assert [source.files.content(name) for name in source.names] == [third, second]


def test_a_class_without_images_in_a_tar_is_refused(folder, tmp_path):
    image = paths_of(folder)[0].read_bytes()
    pack(tmp_path / "folders.tar", [("a/0.png", image), ("b/0.heic", image), ("c/0.png", image)])
    pack(tmp_path / "numbers.tar", [("0.png", image), ("0.cls", b"0"), ("1.heic", image), ("1.cls", b"1")])
    (tmp_path / "shards").mkdir()
    for name, member in (("a", "0.png"), ("b", "0.heic"), ("c", "0.png")):
        pack(tmp_path / f"shards/{name}.tar", [(member, image)])
    for source, part in (
        ("folders.tar", r"class folder .*b holds 0\.heic, but no image"),
        ("numbers.tar", r"a \.cls names class 1, but no image has it"),
        ("shards", r"no images in .*shards/b\.tar"),
    ):
        with pytest.raises(UserError, match=part):
            opened(tmp_path / source, classes=2, held_out=0.0)
    pack(tmp_path / "shards/b.tar", [("0.png", image)])
    assert opened(tmp_path / "shards", held_out=0.0).classes == ("a", "b", "c")
    with tarfile.open(tmp_path / "shards/d.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "folders.tar")
    with pytest.raises(UserError, match=r"d\.tar\.gz lies among the \.tar files"):
        opened(tmp_path / "shards", held_out=0.0)


def test_shards_of_several_splits_are_refused(folder, shards, tmp_path):
    shutil.copy(shards / "train-0000.tar", shards / "val-0000.tar")
    with pytest.raises(UserError, match=r"holds splits, not classes: name one, .*\*train\*\.tar or .*\*val\*\.tar"):
        opened(shards)
    assert opened(shards / "*train*.tar").train_size


def test_a_damaged_index_is_computed_again(shards):
    first = everything(opened(shards))
    index = shards / "train-0000.tar.index.json"
    whole = json.loads(index.read_text())
    for wrong in (
        {"images": [["a", 0]]},
        {"images": [["a", 0, 10**12]]},
        {"images": [[3, 0, 10]]},
        {"labels": {"a": "1"}},
        {"labels": []},
        {"folders": 3},
    ):
        index.write_text(json.dumps(whole | wrong))
        assert everything(opened(shards)) == first, wrong
        assert json.loads(index.read_text()) == whole
    index.write_text("[" * 200_000)
    assert everything(opened(shards)) == first


def test_a_label_above_the_limit_gives_a_one_line_error(folder, tmp_path):
    pack(tmp_path / "set.tar", [("0.png", paths_of(folder)[0].read_bytes()), ("0.cls", b"9" * 20)])
    with pytest.raises(UserError, match=r"labels of .* must be from 0 to 9999999: got"):
        opened(tmp_path / "set.tar", classes=0, held_out=0.0)


def test_unread_files_in_and_beside_shards_are_reported(shards):
    (shards / "README.md").write_text("what the shards are")
    with pytest.warns(LeftOutWarning) as said:
        opened(shards)
    [line] = said
    assert "left out files beside the shards: 1, such as README.md; " in str(line.message)
    assert "left out members that are no images: 60, such as train-0000" in str(line.message)
