"""The scripts in `examples`: their commands parse, and their Python runs."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import subprocess
import sys
from functools import partialmethod
from pathlib import Path

import pytest

import dit_in_dit as dd
from dit_in_dit.cli import parser

EXAMPLES = Path(__file__).parents[1] / "examples"
PROGRAM = 'import json, os, sys; print(json.dumps(sys.argv[1:]), file=open(os.environ["RECORDED"], "a"))'
RECORD = f"""#!/bin/sh
exec {shlex.quote(sys.executable)} -c {shlex.quote(PROGRAM)} "$0" "$@"
"""  # the shell, as the interpreter's path may have a space


@pytest.mark.parametrize(
    ("script", "words", "commands"),
    [
        ("own_images.sh", ["images"], "data train train sample evaluate sample evaluate compare curves"),
        ("own_images.sh", ["images", "100"], "data train train sample evaluate sample evaluate compare curves"),
        ("latents.sh", ["photos", "vae"], "encode data train sample evaluate export"),
        (
            "latents.sh",
            ["photos", "vae", "2", "dit-in-dit-s2", "--set", "train.steps=6"],
            "encode data train sample evaluate export",
        ),
    ],
)
def test_the_commands_of_a_script_parse(script, words, commands, tmp_path):
    for name in ("dit-in-dit", "torchrun"):
        (tmp_path / name).write_text(RECORD)
        (tmp_path / name).chmod(0o755)
    recorded = tmp_path / "recorded"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORDED": str(recorded)}
    subprocess.run([EXAMPLES / script, *words], env=environment, cwd=tmp_path, check=True)
    lines = [json.loads(line)[1:] for line in recorded.read_text().splitlines()]
    lines = [line[line.index("dit_in_dit") + 1 :] if "dit_in_dit" in line else line for line in lines]
    assert [line[0] for line in lines] == commands.split()
    for line in lines:
        parser().parse_args(line)
        if line[0] == "train" and len(words) not in (1, 2):
            assert line[-1] == "train.steps=6"


@pytest.mark.parametrize("script", ["own_images.sh", "latents.sh"])
def test_a_script_without_arguments_says_what_to_give(script, tmp_path):
    done = subprocess.run([EXAMPLES / script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "give a folder of" in done.stderr


def test_the_python_of_play_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dd.Model, "sample", partialmethod(dd.Model.sample, steps=2))
    runpy.run_path(str(EXAMPLES / "play.py"))
    assert "9 classes" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"emoji.png", "way.gif"}
