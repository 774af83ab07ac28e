"""The notebook runs: from data of one's own to a comparison with intervals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dit_in_dit.runs.folder import newest_manifest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "own-idea.ipynb"


def test_the_notebook_is_short_and_without_outputs():
    """Outputs would be those of one machine; this test makes them anew."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    lines = [line for cell in cells for line in cell["source"] if line.strip()]
    assert len(lines) <= 40
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def test_the_notebook_trains_matches_compares_and_shows(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", ())]
    pictures = [data["image/png"] for data in shown if "image/png" in data]
    assert len(pictures) == 2  # the loss, and the samples
    assert any("<td>model.inner.aggregate<td>loudest" in data.get("text/html", "") for data in shown)
    table = next(data["text/plain"] for data in shown if "real vs real" in data.get("text/plain", ""))
    assert table.count("+-") > 10
    nested, plain = (newest_manifest(tmp_path / "runs" / name) for name in ("nested", "plain"))
    assert nested["objects"] == plain["objects"] == {"loss": "__main__.Huber"}
    assert nested["classes"] == ["rings", "stripes"]
