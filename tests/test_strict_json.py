"""Damaged, hostile or wrong JSON gives one line that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.strict_json import parse_json, read_json

BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not valid JSON"),
    "half a file": (b'{"a": [1, 2', "not valid JSON"),
    "deep lists": (b"[" * 200_000, "nests too deeply"),
    "deep groups": (b'{"a":' * 200_000, "nests too deeply"),
    "Latin-1": (b'{"a": "\xe9"}', "not UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "a number of thousands of digits": (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "a list": (b"[]", "must hold a JSON object .*: got list"),
    "null": (b"null", "got NoneType"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_without_a_json_object_give_a_one_line_error(name, tmp_path):
    content, part = BAD[name]
    (tmp_path / "some.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"^the plan .*some\.json .*{part}.*; begin again") as refused:
        read_json(tmp_path / "some.json", "the plan ", "begin again")
    assert str(refused.value).isprintable()


def test_unreadable_or_endless_files_give_a_one_line_error(tmp_path, monkeypatch):
    for path, part in ((tmp_path, "Is a directory"), (tmp_path / "absent", "No such file"), (Path("a\0"), "null")):
        with pytest.raises(UserError, match=f"cannot read .*{part}"):
            read_json(path)
    monkeypatch.setattr("dit_in_dit.config.strict_json.MOST_BYTES", 100)
    with pytest.raises(UserError, match="at most 100 bytes"):
        read_json(Path("/dev/zero"))


def test_valid_json_is_read(tmp_path):
    (tmp_path / "some.json").write_bytes(b'\xef\xbb\xbf{"a": [1, "\xc3\xa9"]}')
    assert read_json(tmp_path / "some.json") == {"a": [1, "\u00e9"]}
    assert parse_json("3", "a number") == 3
