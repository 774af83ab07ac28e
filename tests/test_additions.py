"""One new file in the package adds a command."""

from __future__ import annotations

import sys

from dit_in_dit import cli


def test_a_new_file_is_a_new_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "greet.py").write_text(
        "def add(commands):\n"
        "    greet = commands.add('greet', lambda options: print(f'hello, {options.name}'), 'say hello')\n"
        "    greet.add_argument('name')\n"
    )
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    try:
        cli.main(["greet", "reader"])
    finally:
        sys.modules.pop("dit_in_dit.cli.greet", None)
    assert capsys.readouterr().out == "hello, reader\n"
