"""How every network-free metric answers to five kinds of known damage: a table of metric against strength.

    python scripts/metric_response.py --out docs

Real emoji are damaged and compared with other real emoji. Each cell is the metric's size as a multiple of what two
halves of the real images score against each other: about 1 means "as real images".
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from corruptions import CORRUPTIONS
from dit_in_dit.config import presets
from dit_in_dit.data.sources import open_source
from dit_in_dit.metrics.pixels import score
from dit_in_dit.reporting import plots
from dit_in_dit.reporting.images import Pixels, image_grid, side_by_side, to_floats, to_pixels
from dit_in_dit.runs import atomic

STRENGTHS = {
    "blur": (0, 0.5, 0.8, 1.2, 2.0),
    "noise": (0, 0.02, 0.05, 0.1, 0.2),
    "jpeg": (0, 0.2, 0.5, 0.8, 0.95),
    "grid": (0, 0.01, 0.02, 0.04, 0.08),
    "colour": (0, 0.02, 0.05, 0.1, 0.2),
}
UNITS = {"blur": "deviation, pixels", "noise": "deviation", "jpeg": "1 - quality", "grid": "darker", "colour": "shift"}
PERIODS = (8, 2)


def real_images(count: int) -> Pixels:
    """Training emoji in a fixed random order, uint8 (count, 32, 32, 3)."""
    config = presets.get("emoji")
    source = open_source(config.data, config.model)
    order = np.random.default_rng(0).permutation(source.train_size or 0)[:count]
    return to_pixels(torch.from_numpy(np.stack([source.train(int(i))[0] for i in order])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="images damaged; three times as many are used")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    images = real_images(3 * options.images)
    damaged, real = images[: options.images], to_floats(images[options.images :])
    answers = {}
    for name, strengths in STRENGTHS.items():
        found = [score(to_floats(CORRUPTIONS[name](damaged, s)), real, PERIODS) for s in strengths]
        answers[name] = {m: [abs(f[m].value) / (f[m].floor or 1) for f in found] for m in found[0]}
        print(name, flush=True)
    table = {"images": options.images, "strengths": STRENGTHS, "units": UNITS, "multiples of the floor": answers}
    (options.out / "metric-response.json").write_text(json.dumps(table, indent=1) + "\n")
    draw(answers, options.out / "metric-response.png")
    rows = {name: np.concatenate([CORRUPTIONS[name](damaged[:6], s) for s in row]) for name, row in STRENGTHS.items()}
    shown = {f"{name}: {', '.join(map(str, STRENGTHS[name]))}": image_grid(row, 6) for name, row in rows.items()}
    side_by_side(shown).save(options.out / "corruptions.png")


def draw(answers: dict[str, dict[str, list[float]]], path: Path) -> None:
    """One panel per corruption: metrics down, strengths across, colour and number the multiple of the floor."""
    made, axes = plots.figure(1, len(answers), width=3.0, height=5.2)
    for axis, (name, rows) in zip(axes[0], answers.items(), strict=True):
        cells = np.array(list(rows.values()))
        axis.imshow(np.log2(np.maximum(cells, 1)), cmap="YlOrRd", vmin=0, vmax=6, aspect="auto")
        for y, x in np.ndindex(*cells.shape):
            colour = "white" if cells[y, x] > 24 else "black"
            number = f"{cells[y, x]:.{0 if cells[y, x] >= 10 else 1}f}"
            axis.text(x, y, number, ha="center", va="center", fontsize=7, color=colour)
        axis.set_xticks(range(cells.shape[1]), [f"{s:g}" for s in STRENGTHS[name]])
        axis.set_yticks(range(len(rows)), list(rows) if axis is axes[0, 0] else [""] * len(rows))
        axis.set(title=name, xlabel=UNITS[name])
        axis.grid(visible=False)
    made.suptitle("size of each metric, as a multiple of real against real")
    atomic.write_atomic(path, plots.figure_png(made))


if __name__ == "__main__":
    main()
