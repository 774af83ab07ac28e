"""One new file in the package adds a command, or a format of data."""

from __future__ import annotations

import sys

from conftest import small_model
from dit_in_dit import cli
from dit_in_dit.config.run import DataConfig
from dit_in_dit.data import formats, sources


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


def test_a_new_file_is_a_new_format(tmp_path, monkeypatch):
    (tmp_path / "noise.py").write_text(
        "import numpy as np\n"
        "from dit_in_dit.data.source import Source\n"
        "class NoiseSource(Source):\n"
        "    name, classes, train_size, digest = 'noise', ('all',), None, 'noise 1'\n"
        "    def __init__(self, data, model):\n"
        "        self.shape = model.image_shape\n"
        "    def train(self, index):\n"
        "        return np.random.default_rng(index).uniform(-1, 1, self.shape).astype(np.float32), 0\n"
    )
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    try:
        found = sources._built_in()
    finally:
        sys.modules.pop("dit_in_dit.data.formats.noise", None)
    assert found.keys() - sources.SOURCES.keys() == {"noise"}
    monkeypatch.setitem(sources.SOURCES, "noise", found["noise"])
    source = sources.open_source(DataConfig(source="noise"), small_model(num_classes=0))
    assert source.train(3)[0].shape == (3, 16, 8)
