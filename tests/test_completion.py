"""Shell completion, seen from bash: what a user of the script is offered after TAB."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from dit_in_dit.cli.completion import SHELLS
from dit_in_dit.config.presets import NAMES
from dit_in_dit.config.run import RunConfig
from dit_in_dit.runs.pretrained import pretrained_models


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Path of each shell's script, as `dit-in-dit completion SHELL` prints it."""
    folder = tmp_path_factory.mktemp("completion")
    # The command runs in one process without torch: a user waits for it at each start of a shell.
    code = "import sys\nfrom dit_in_dit.cli import main\nmain(sys.argv[1:])\nassert 'torch' not in sys.modules"
    for shell in SHELLS:
        words = [sys.executable, "-c", code, "completion", shell]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
        (folder / shell).write_text(done.stdout)
    return folder


def offered(script, line: str, folder) -> list[str]:
    """What bash offers for the last word of a line. Bash splits words at `=` by itself."""
    words = line.replace("=", " = ").split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    code = f"source '{script / 'bash'}'; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _dit_in_dit\n"
    code += 'printf "%s\\n" "${COMPREPLY[@]}"'
    bash = ["bash", "--norc", "--noprofile", "-u", "-c", code]
    done = subprocess.run(bash, cwd=folder, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.split()


def test_bash_completes_commands_options_and_names(script, tmp_path):
    (tmp_path / "my-run").mkdir()
    (tmp_path / "mine.yaml").touch()
    for line, expected in {
        "dit-in-dit verify": {"verify-resume"},
        "dit-in-dit train --res": {"--resume"},
        "dit-in-dit study r": {"run", "report"},
        "dit-in-dit train --preset ": set(NAMES),
        "dit-in-dit recipe dit-in-dit-xl": {name for name in NAMES if name.startswith("dit-in-dit-xl")},
        "dit-in-dit train --preset emoji --set model.inner.mix": {"model.inner.mixer="},
        "dit-in-dit train --set train.steps=9 --out runs/a --set data.fl": {"data.flip="},
        "dit-in-dit sample ": {*pretrained_models(), "my-run"},
        "dit-in-dit train --out m": {"my-run"},
        "dit-in-dit train --config m": {"my-run", "mine.yaml"},
        "dit-in-dit sample emoji --sampler dd": {"ddim", "ddpm"},
        "dit-in-dit export emoji --format pipe": {"pipeline"},
        "dit-in-dit study run nesting": {"nesting", "nesting-64"},
        "dit-in-dit study plan field --set set.train.st": {"set.train.steps="},
        "dit-in-dit recipe --set train.steps=": set(),  # nothing of its own: bash offers files
    }.items():
        assert set(offered(script, line, tmp_path)) == expected, line


def test_every_key_of_a_run_can_be_completed(script, tmp_path):
    keys = {word.rstrip("=") for word in offered(script, "dit-in-dit config --set ", tmp_path)}
    values = dict.fromkeys(name for name in RunConfig.names() if name not in ("model", "data", "train"))
    assert {"train.learning_rate", "model.inner.aggregate", "sample.guidance", "seed"} <= keys <= values.keys()


def test_bash_knows_the_function_of_the_command(script):
    code = f"source '{script / 'bash'}'; complete -p dit-in-dit"
    done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, check=True, timeout=20)
    assert done.stdout.endswith("-F _dit_in_dit dit-in-dit\n")


@pytest.mark.parametrize("shell", [shell for shell in SHELLS if shutil.which(shell)])
def test_the_script_has_no_error_of_syntax(script, shell):
    assert subprocess.run([shell, "-n", script / shell], check=False, timeout=20).returncode == 0


@pytest.mark.parametrize("shell", SHELLS)
def test_every_script_holds_commands_options_and_names(script, shell):
    text = (script / shell).read_text()
    option = "verify-resume", "learning_rate=", "dit-in-dit-xl2", "micro-batch", "nesting-64"
    assert all(word in text for word in option)
    assert os.fspath(script) not in text
