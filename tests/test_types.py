"""mypy in its strict mode: what `make check` runs, beside the other tests so that a second core does it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_mypy_has_no_complaint():
    pytest.importorskip("mypy", reason="pip install -e '.[dev]'")
    found = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert not found.returncode, found.stdout + found.stderr
