"""`dit-in-dit recipe` without a preset: YAML that trains, and figures that the kept rows have."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean

import pytest

from dit_in_dit.cli import main
from dit_in_dit.config.files import from_yaml
from dit_in_dit.config.small_recipe import MEASURED, small_recipe, small_recipe_yaml

STUDIES = Path(__file__).resolve().parents[1] / "results" / "studies"
ARMS = {
    "train.optimizer": "Muon",
    "train.beta2": "beta2 0.95",
    "train.dropout": "dropout 0.1",
    "data.balance": "balanced",
}


def changes(study: str, arm: str) -> list[float]:
    """Change of the fine error of an arm at three times in percent, the mean over seeds."""
    values: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    with (STUDIES / study / "results.csv").open(newline="") as lines:
        for row in csv.DictReader(lines):
            if row["value"]:
                values[row["arm"], row["metric"]][row["seed"]] = float(row["value"])
    found = []
    for t in ("0.2", "0.5", "0.8"):
        ours, base = (values[name, f"held_out.{t}.high"] for name in (arm, "nested"))
        found.append(100 * (mean(ours.values()) / mean(base.values()) - 1))
    return found


def test_the_printed_recipe_is_the_config_and_says_what_was_measured(capsys):
    assert main(["recipe"]) in (None, 0)
    text = capsys.readouterr().out
    assert text == small_recipe_yaml()
    assert from_yaml(text) == small_recipe()
    assert all(f"# {measured}" in text for measured in MEASURED.values())
    assert small_recipe().train.steps // small_recipe().train.ema_snapshot_every == 40


@pytest.mark.parametrize(("key", "arm"), ARMS.items())
def test_figures_are_those_of_the_kept_rows(key, arm):
    for data, study in (("emoji", "recipes"), ("mosaic", "recipes-mosaic")):
        said = re.search(rf"{data} (\S+) / (\S+) / (\S+)", MEASURED[key])
        if said is None:
            assert (key, data) == ("data.balance", "mosaic")
            continue
        for number, found in zip(said.groups(), changes(study, arm), strict=True):
            assert float(number) == pytest.approx(found, abs=0.051)


def test_options_without_a_preset_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["recipe", "--gpus", "8"])
    assert ended.value.code == 2
    assert "name a preset" in capsys.readouterr().err
