"""Put finished runs side by side: `python scripts/emoji_results.py RUN ... --out results/emoji`.

Writes summary.json (costs, last losses and held-out errors, the commands) and grids.png (the same noise
and classes for every run, beside real images). Later studies replace it; it claims nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean

import torch

from dit_in_dit import checkpoint, cost, sample
from dit_in_dit.config import to_dict
from dit_in_dit.data.source import open_source
from dit_in_dit.sampling import beside, grid, to_pixels
from dit_in_dit.training.example import image_number

IMAGES = 36


def summarise(run: Path) -> dict:
    """One run's numbers."""
    config = checkpoint.read_config(run)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    return {
        "command": f"dit-in-dit train --preset {run.name} --out {run}",
        "macs": cost.macs(config.model)["total"],
        "parameters": cost.parameters(config.model)["total"],
        "steps": len(losses),
        "images": len(losses) * config.global_batch,
        "loss_last_200_steps": fmean(losses[-200:]),
        "held_out": [line["held_out"] for line in log if "held_out" in line][-1],
        "config": to_dict(config),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    summary = {"torch": torch.__version__, "runs": {r.name: summarise(r) for r in options.runs}}
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    pictures = {}
    for run in options.runs:
        model, config, _ = checkpoint.load_model(run, torch.device("cpu"))
        pictures[run.name] = grid(to_pixels(sample(model, config, IMAGES)))
    source = open_source(config.data, config.model)
    real = [torch.from_numpy(source.train(image_number(0, i, source.train_size))[0]) for i in range(IMAGES)]
    pictures["real training images"] = grid(to_pixels(torch.stack(real)))
    beside(pictures).save(options.out / "grids.png")
    for name, found in summary["runs"].items():
        errors = "  ".join(f"{e['whole']:.5f} / {e['high']:.5f}" for e in found["held_out"].values())
        print(f"{name:<16} {found['macs'] / 1e6:.1f} M  loss {found['loss_last_200_steps']:.4f}  {errors}")


if __name__ == "__main__":
    main()
