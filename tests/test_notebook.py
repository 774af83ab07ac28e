"""The notebooks run, and their stored outputs are what they give: `python scripts/run_notebooks.py` stores them."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from dit_in_dit.runs.folder import newest_manifest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
SLOW = ("own-idea", "fair-comparison", "look-inside")  # half a minute to a minute each: only with -m docs


def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def forms(notebook) -> list[list[str]]:
    """Kinds of the outputs of every cell."""
    return [
        [kind for out in cell["outputs"] for kind in out.get("data", [out["output_type"]])] for cell in code(notebook)
    ]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_stored_notebook_shows_its_results_and_nothing_of_the_machine(name):
    text = NOTEBOOKS[name].read_text()
    notebook = json.loads(text)
    assert len(text) < 150_000
    assert [cell["execution_count"] for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    shown = [kind for cell in forms(notebook) for kind in cell]
    assert sum(kind.startswith("image/") for kind in shown) >= (1 if name == "fair-comparison" else 2)
    outputs = json.dumps([cell["outputs"] for cell in code(notebook)])
    readable = re.sub(r'"image/png": "[^"]*"', "", outputs)  # base64 holds every short word
    assert not re.search(r"/(home|root|tmp|Users|work)/|images/s|\d (s|ms|seconds)\b|stderr|Traceback", readable)


def test_the_notebook_of_an_own_idea_is_short():
    lines = [line for cell in code(json.loads(NOTEBOOKS["own-idea"].read_text())) for line in cell["source"]]
    assert sum(bool(line.strip()) for line in lines) <= 45


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.docs if n in SLOW else ()) for n in NOTEBOOKS])
def test_a_notebook_gives_the_kinds_of_output_that_it_stores(name, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    scripts = runpy.run_path(str(ROOT / "scripts/run_notebooks.py"))
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    scripts["run"](notebook, tmp_path)
    scripts["clean"](notebook)
    assert forms(notebook) == forms(json.loads(NOTEBOOKS[name].read_text()))
    if name == "own-idea":
        nested, plain = (newest_manifest(tmp_path / "runs" / arm) for arm in ("nested", "plain"))
        assert nested["objects"] == plain["objects"] == {"loss": "__main__.Huber"}
        assert nested["classes"] == ["rings", "stripes"]
    if name == "first-picture":
        assert code(notebook)[-1].outputs[0].data["text/plain"] == "True"  # few samples are the first of many
