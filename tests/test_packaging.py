"""Packaging: tested version bounds, and a source tree that runs without installation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
APART = {"app", "docs", "eval", "lora"}  # extras with environments of their own


def test_minimum_versions_equal_the_tested_ones():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    words = [*project["dependencies"], *(word for name in extras.keys() - APART for word in extras[name])]
    wanted = {}
    for requirement in map(Requirement, words):
        for bound in requirement.specifier:
            assert bound.operator == ">="
            wanted[canonicalize_name(requirement.name)] = Version(bound.version)
    lines = (ROOT / "tests/oldest/constraints.txt").read_text().splitlines()
    pinned = (line.split("==") for line in lines if line and not line.startswith("#"))
    assert {canonicalize_name(name): Version(version) for name, version in pinned} == wanted


WITHOUT_METADATA = """
import importlib.metadata as metadata
import sys

def without(name, found=metadata.version):
    if name == "dit-in-dit":
        raise metadata.PackageNotFoundError(name)
    return found(name)

metadata.version = without
from dit_in_dit.cli import main
main(sys.argv[1:])
"""


def test_a_source_tree_without_package_metadata_trains_and_records_its_version(run_config, tmp_path):
    from dit_in_dit import __version__
    from dit_in_dit.config.files import to_yaml
    from dit_in_dit.runs import checkpoint

    (tmp_path / "run.yaml").write_text(to_yaml(run_config))
    words = ["train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", WITHOUT_METADATA, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((checkpoint.newest(tmp_path / "run").folder / "manifest.json").read_text())
    assert manifest["versions"]["dit-in-dit"] == __version__


def test_the_first_model_of_a_process_can_be_built_on_meta():
    """In a new process: imports on first use must not happen while a model is built on meta."""
    code = "from dit_in_dit.config import presets; from dit_in_dit.inspection import cost; import sys\n"
    code += "cost.held_bytes(presets.get('emoji').model); assert 'einops._torch_specific' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
