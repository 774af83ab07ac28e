"""Files and folders are complete or absent, and files of the user are never touched."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dit_in_dit
from dit_in_dit.cli.options import make_folder
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig
from dit_in_dit.runs import atomic, retention
from dit_in_dit.runs.folder import create_run

ROOT = Path(dit_in_dit.__file__).parent


def test_a_folder_is_written_under_a_unique_temporary_name(tmp_path):
    (tmp_path / "keep.part").mkdir()
    (tmp_path / "keep.part" / "mine").write_text("the user's")
    with atomic.folder(tmp_path / "keep") as beside:
        assert beside.parent == tmp_path
        assert beside.name.startswith(".keep.")
        (beside / "a").write_text("new")
    assert (tmp_path / "keep.part" / "mine").read_text() == "the user's"
    assert {path.name for path in tmp_path.iterdir()} == {"keep", "keep.part"}


def test_a_block_that_fails_leaves_nothing(tmp_path):
    for write in (atomic.folder, atomic.file):
        with pytest.raises(KeyError), write(tmp_path / "out"):
            raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_file_is_written_under_a_unique_temporary_name(tmp_path):
    mine = tmp_path / f"a.png.0.{os.getpid()}.part"
    mine.write_text("the user's")
    atomic.write_atomic(tmp_path / "a.png", "new")
    assert mine.read_text() == "the user's"
    assert (tmp_path / "a.png").read_text() == "new"


def test_only_temporary_files_of_killed_processes_are_deleted(tmp_path):
    kept = ["a.part", ".a.part", ".b.0123abcd.part", ".a.0123ABCD.part", "a.0123abcd.part", ".a.png.0123abcd.part"]
    for name in [*kept, ".a.0123abcd.part", ".a.89abcdef.part"]:
        (tmp_path / name).touch()
    atomic.clear_temporary(tmp_path, {"a"})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize("out", [".", "..", "../empty", "/"])
def test_an_export_into_the_current_folder_or_a_folder_above_it_is_refused(out, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match="is the current folder or a folder above it: give a new name"):
        atomic.check_free(Path(out))
    with pytest.raises(UserError, match="current folder"), atomic.folder(Path(out)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    with atomic.folder(tmp_path / "empty") as beside:
        (beside / "a").write_text("new")
    assert (tmp_path / "empty" / "a").read_text() == "new"


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_files_have_the_permissions_of_the_umask(mask, file, folder, tmp_path):
    """The safetensors library writes files of mode 0600."""
    before = os.umask(mask)
    try:
        with atomic.folder(tmp_path / "out") as beside:
            (beside / "in").mkdir()
            save_file({"a": torch.zeros(1)}, beside / "in" / "a.safetensors")
            (beside / "b").touch()
        atomic.write_atomic(tmp_path / "c", "")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"out": folder, "in": folder, "a.safetensors": file, "b": file, "c": file}


def test_files_and_folders_are_synced_before_and_after_their_rename(tmp_path, monkeypatch):
    done, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda number: (done.append(os.fstat(number).st_ino), fsync(number)))
    monkeypatch.setattr(Path, "rename", lambda path, target: (done.append("rename"), rename(path, target)))
    with atomic.folder(tmp_path / "out") as beside:
        (beside / "in").mkdir()
        (beside / "in" / "a").write_text("new")
    number = {name: (tmp_path / name).stat().st_ino for name in ("", "out", "out/in", "out/in/a")}
    assert set(done[:3]) == {number[name] for name in ("out", "out/in", "out/in/a")}
    assert done[3:] == ["rename", number[""]]


def test_reports_and_pictures_are_written_atomically():
    """A reader sees the former complete file while it is rewritten. Folders of an export are atomic as a whole."""
    plainly = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if re.search(r"\.write_(text|bytes)\(|\.savefig\((?!drawn)", path.read_text())
    }
    assert {name for name in plainly if not name.startswith("interop/")} == {"cli/match.py"}  # may be given a pipe


def test_a_run_keeps_files_that_it_did_not_write(tmp_path):
    for name in ("config.yaml.part", ".part", "checkpoints/mine.part/a", "checkpoints/0000010.part/a"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("the user's")
    make_folder(tmp_path)
    create_run(tmp_path, RunConfig())
    retention.clear_unfinished(tmp_path)
    assert (tmp_path / ".part").exists()
    assert (tmp_path / "config.yaml.part").exists()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["mine.part"]
