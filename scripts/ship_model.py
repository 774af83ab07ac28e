"""Make a shipped model of a run: `python scripts/ship_model.py RUN --out models/NAME`.

Its averaged weights in float16, a grid of samples (classes take turns), its evaluation with the memorising check, and
the card that says all of it.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from dit_in_dit.cli import main as command
from dit_in_dit.interop.release import PICTURE, export_release, write_card
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.folder import read_config

KEPT = ("metrics.json", "metrics.png", "nearest.png")  # of an evaluation; the images themselves can be drawn again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num", default="1000", help="images that are evaluated")
    parser.add_argument("--grid", default="81", help="images of the grid")
    parser.add_argument("--metrics", default="pixels,classifier", help="as for `evaluate`")
    parser.add_argument("--ema", help="which average of the weights, as for `export` (default: train.ema)")
    parser.add_argument("--licence", default="apache-2.0")
    options = parser.parse_args()
    out: Path = options.out
    export_release(options.run, out, averaged=options.ema or True, licence=options.licence)
    step = checkpoint.newest(out).folder.name
    with tempfile.TemporaryDirectory() as place:
        drawn, measured = Path(place) / "samples", Path(place) / "evaluation"
        scale = "3" if max(read_config(out).model.image_size) <= 32 else "2"
        command(["sample", str(out), "--num", options.grid, "--scale", scale, "--out", str(drawn)])
        shutil.copyfile(drawn / "grid.png", out / PICTURE)
        command(["evaluate", str(out), "--num", options.num, "--metrics", options.metrics, "--out", str(measured)])
        kept = out / "evaluation" / step
        kept.mkdir(parents=True)
        for name in KEPT:
            if (measured / name).exists():
                shutil.copyfile(measured / name, kept / name)
    write_card(out, out.resolve().name, licence=options.licence)


if __name__ == "__main__":
    main()
