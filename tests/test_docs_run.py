"""The commands and blocks of the tutorials and how-to pages run, in the order of the page, with small budgets.

`make test-docs`. A comment before a block says what is special about it:

    <!-- small: WORDS -->        words for each of its commands, after those of SMALLER
    <!-- not run: REASON -->     its commands are parsed only
    <!-- before: COMMAND -->     a command of the test, which the reader does not see
    <!-- given: KIND PLACE -->   a folder of the test: `images` or a `vae`

A block of Python or YAML whose first line is `# FILE` is written to that file; other blocks of Python run.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKL
from PIL import Image

from test_docs import PAGES, ROOT, TOOLS

pytestmark = pytest.mark.docs

NEW_PAGES = [page for page in PAGES if page.parent.name in ("tutorials", "how-to") and page.name != "index.md"]
SOURCE = [*NEW_PAGES, *(ROOT / f"docs/{name}.md" for name in ("presets", "data", "imagenet", "scaling", "recipes"))]
NEW = "--set train.batch_size=2 --set train.warmup=0 --set train.evaluate_every=4 --set train.sample_every=4 "
SMALLER = {  # command: words that make it small; the last value of an option counts
    "train": NEW + "--set train.steps=4 --set train.checkpoint_every=2 --set sample.steps=2",
    "train resumed": "",
    "sample": "-n 4 --steps 2",
    "evaluate": "-n 8 --steps 2",
    "maps": "--num 2 --steps 2 --times 0.3,0.7",
    "study run": "--set budget.steps=2 --set samples=4 --set set.train.batch_size=2 --set set.sample.steps=2",
    "verify-resume": "--steps 4",
}


def steps(page: Path) -> list[tuple[str, str, str]]:
    """The page in order: (kind, text, note). Kinds: command, file, python; the note is that of `not run` or `small`."""
    found, note = [], ""
    pattern = (
        r"<!-- (small|not run|before|given): (.*?) -->|^```(\w*)\n(.*?)^```$|((?:^ {4}[^\n]*\n(?:^\s*\n(?=^ {4}))*)+)"
    )
    for match in re.finditer(pattern, page.read_text() + "\n", re.MULTILINE | re.DOTALL):
        kind, words, language, block, indented = match.groups()
        if kind in ("before", "given"):
            found.append(("command" if kind == "before" else kind, words, "hidden"))
        elif kind:
            note = f"{kind}: {words}"
            continue
        elif indented:
            lines = re.sub(r"\\\n\s*", " ", indented).splitlines()
            found += [("command", line.strip(), note) for line in lines if line.strip()]
        elif language in ("python", "yaml"):
            named = re.match(r"# ([\w-]+\.(?:py|yaml))\n", block or "")
            found.append(("file" if named else language, block, named[1] if named else note))
        if kind not in ("before", "given"):
            note = ""
    return found


def run(line: str, note: str, folder: Path) -> None:
    """Run a command of a page; it must end with exit code 0."""
    words = list(shlex.split(line, comments=True))
    if note.startswith("not run") or words[0].startswith("model."):  # a line of Python in a block of commands
        return
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if words[0] == "dit-in-dit" or "dit_in_dit" in words:
        place = 1 if words[0] == "dit-in-dit" else words.index("dit_in_dit") + 1
        name = " ".join(words[place : place + 1 + (words[place] == "study")])
        name += " resumed" if "--resume" in words else ""
        smaller = SMALLER.get(name, "") + " " + note.removeprefix("small:") * note.startswith("small:")
        start = [sys.executable] if words[0] == "dit-in-dit" else [sys.executable, "-m", "torch.distributed.run"]
        middle = [] if words[0] == "dit-in-dit" else words[1 : words.index("-m")]
        middle = ["2" if word == "8" else word for word in middle]  # processes
        words = [*start, *middle, "-m", "dit_in_dit", *words[place:], *shlex.split(smaller)]
    elif words[0] == "python":
        words[:2] = [sys.executable, str(ROOT / words[1] if (ROOT / words[1]).exists() else words[1])]
    elif words[0] == "make":
        return  # an environment of its own
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, f"{line}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"


def images(place: Path) -> None:
    """Sixty images of 64x64 in three classes."""
    draw = np.random.default_rng(0)
    for number in range(60):
        folder = place / f"class-{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{number}.png")


def vae(place: Path) -> None:
    """A VAE from 64x64 images to latents of 4x32x32, with random weights."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    widths = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    AutoencoderKL(**blocks, **widths).save_pretrained(place)


GIVEN = {"images": images, "vae": vae}


@pytest.mark.parametrize("page", SOURCE, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_the_commands_of_the_page_run_in_their_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for kind, text, note in steps(page):
        if kind == "command":
            run(text, note, tmp_path)
        elif kind == "given":
            what, place = text.split()
            GIVEN[what](tmp_path / place)
        elif kind == "file":
            (tmp_path / note).write_text(text)
        elif kind == "python":
            exec(compile(text, f"{page.name}, a block of Python", "exec"), names)


def test_a_page_is_read_in_its_order(tmp_path):
    page = tmp_path / "page.md"
    comments, commands = "<!-- before: a -->\n<!-- small: -x -->", "    b \\\n        c\n    d"
    page.write_text(f"{comments}\n\n{commands}\n\n```python\n# f.py\n1\n```\n\n    e\n")
    assert steps(page) == [
        *(("command", "a", "hidden"), ("command", "b  c", "small: -x"), ("command", "d", "small: -x")),
        *(("file", "# f.py\n1\n", "f.py"), ("command", "e", "")),
    ]


def test_every_line_of_a_block_is_a_command():
    for page in NEW_PAGES:
        for kind, text, note in steps(page):
            known = (*TOOLS, "pip", "sha256sum") if note != "hidden" else (*TOOLS, "cp", "mkdir")
            assert kind != "command" or text.split()[0] in known, f"{page.name}: {text}"
