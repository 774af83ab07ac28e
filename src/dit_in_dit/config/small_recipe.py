"""The recipe for a few thousand images of 64x64 on one GPU, as YAML that says what was measured of each choice."""

from __future__ import annotations

from dit_in_dit.config import presets
from dit_in_dit.config.files import replace_keys, to_yaml
from dit_in_dit.config.run import RunConfig

PRESET = "pixels-64"
# Steps between checkpoints and between snapshots of the averages: 40 snapshots reconstruct any length within 0.4%.
SNAPSHOTS = 500
CHANGES = {
    "train.optimizer": "muon",
    "train.learning_rate": 0.003,
    "train.ema_lengths": [0.05, 0.1],
    "train.checkpoint_every": SNAPSHOTS,
    "train.ema_snapshot_every": SNAPSHOTS,
}
# Change of the fine held-out error at t = 0.2 / 0.5 / 0.8, mean of three seeds (studies `recipes`, `recipes-mosaic`).
MEASURED = {
    "train.optimizer": "Muon: emoji -6.0 / -4.1 / -2.5 %, mosaic -10.8 / -13.4 / -0.2 %; step time 1.11",
    "train.learning_rate": "twice the preset's: on emoji Muon was best at twice AdamW's rate, of a half, one and two",
    "train.beta2": "0.95: emoji -1.8 / -1.5 / -0.8 %, mosaic +1.1 / +2.4 / +0.0 %: no difference seen",
    "train.dropout": "0.1: emoji +0.9 / -0.1 / -0.4 %, mosaic -3.2 / -5.2 / -0.0 %: step time 1.23",
    "train.ema_lengths": "averages of 0.015 to 0.09 of the run are within 0.8 % of each other, longer ones lose",
    "data.balance": "class: emoji +2.0 / +2.2 / +0.9 %, and samples are further from real ones",
}
HEADER = f"""\
# A recipe for one GPU and a few thousand images of 64x64: preset {PRESET} with what helped in docs/recipes.md.
#
#   dit-in-dit recipe > recipe.yaml
#   dit-in-dit data FOLDER --out looked                      # classes, copies, near pairs across the split
#   dit-in-dit train --config recipe.yaml --data FOLDER --out runs/mine
#   dit-in-dit evaluate runs/mine --ema all --out averages   # which average is best
#   dit-in-dit average runs/mine --length 0.03               # any other length
#   dit-in-dit sample runs/mine --ema length=0.03 --guidance 1.5 --out samples
#
# Figures: change of the fine held-out error at t = 0.2 / 0.5 / 0.8, mean of three seeds, 1,200 steps at 32x32 on a CPU.
# Nothing of this was run on a GPU. `dit-in-dit recipe {PRESET}` plans memory and time.
"""


def small_recipe() -> RunConfig:
    """The config of the recipe."""
    return replace_keys(presets.get(PRESET), CHANGES)


def small_recipe_yaml() -> str:
    """The recipe as YAML: how to use it, and beside the keys what was measured of them."""
    lines, path = [], list[str]()
    for line in to_yaml(small_recipe()).splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.strip().partition(":")[0]
        path[depth:] = [name]
        measured = MEASURED.get(".".join(path))
        lines.append(f"{line:<32}  # {measured}" if measured else line)
    return HEADER + "\n".join(lines) + "\n"
