"""scripts/naming_sheet.py: numbered pictures without labels, and their key."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dit_in_dit as dd

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "scripts/naming_sheet.py"))


@pytest.mark.parametrize("guided", [[], ["--guide", "emoji-dit", "--guide-scale", "1.2"]], ids=["", "guided"])
def test_a_sheet_has_the_samples_and_the_real_images_of_its_key(tmp_path, monkeypatch, guided):
    words = ["naming_sheet.py", "emoji", "--num", "3", "--real", "2", "--out", str(tmp_path), *guided]
    monkeypatch.setattr(sys, "argv", words)
    SCRIPT["main"]()
    with (tmp_path / "key.csv").open(newline="") as file:
        key = list(csv.DictReader(file))
    assert sorted(row["kind"] for row in key) == ["real"] * 2 + ["sample"] * 3
    model = dd.load("emoji")
    assert {row["class"] for row in key} <= set(model.classes)
    sheet = np.asarray(Image.open(tmp_path / "sheet-1.png"))
    cell = SCRIPT["SIDE"] + SCRIPT["MARGIN"]
    assert sheet.shape == (cell, 8 * cell, 3)
    assert [bool((sheet[18:, n * cell : (n + 1) * cell] < 250).any()) for n in range(8)] == [True] * 5 + [False] * 3
