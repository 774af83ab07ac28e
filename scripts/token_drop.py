"""Time of a training step with token dropping over that of a dense step, beside the ratio of their MACs.

    PYTHONPATH=src OMP_NUM_THREADS=1 python scripts/token_drop.py [--rounds 5] [--patches 256]

A plain model of 12 outer blocks, and a nested one with three inner blocks at the end, on the CPU. Dense steps and those
with a half and a quarter of the patches alternate. Times are processor times, and a ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch

from dit_in_dit.config import presets
from dit_in_dit.config.files import override
from dit_in_dit.config.run import RunConfig
from dit_in_dit.data.sources import open_source
from dit_in_dit.inspection import cost
from dit_in_dit.training.batches import Examples
from dit_in_dit.training.trainer import Trainer

SIZES = ((256, 32, 2, 8), (1024, 64, 2, 4))  # patches, side of the image, patch size, batch
PROGRAMS = ("outer*12", "outer*12 inner*3")


def step_of(config: RunConfig):
    """A function that takes a training step and returns its processor time in seconds."""
    source = open_source(config.data, config.model)
    trainer, batch = Trainer(config, source, torch.device("cpu")), Examples(source, config)[0]

    def step() -> float:
        began = time.process_time()
        trainer.update([batch])
        return time.process_time() - began

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patches", type=int, choices=[size[0] for size in SIZES])
    parser.add_argument("--program", choices=PROGRAMS)
    parser.add_argument("--width", type=int, default=128)
    options = parser.parse_args()
    print("patches  program           drop  MACs   time")
    for patches, side, patch, batch in SIZES:
        for program in PROGRAMS:
            if options.patches not in (None, patches) or options.program not in (None, program):
                continue
            keys = [
                "data.source=mosaic",
                f"model.image_size={side}",
                f"model.patch_size={patch}",
                f"model.stages={program}",
            ]
            keys += [f"model.outer.width={options.width}", "model.outer.num_heads=4", "model.num_classes=0"]
            keys += [f"train.batch_size={batch}", "train.evaluate_every=0", "train.warmup=0", "train.precision=float32"]
            dense = override(presets.get("emoji"), keys)
            configs = {0.0: dense} | {
                drop: replace(dense, train=replace(dense.train, token_drop=drop)) for drop in (0.5, 0.75)
            }
            steps = {drop: step_of(config) for drop, config in configs.items()}
            times = {drop: [] for drop in steps}
            for turn in range(options.rounds + 2):
                for drop, step in steps.items():
                    if (took := step()) and turn > 1:
                        times[drop].append(took)
            for drop in (0.5, 0.75):
                macs = [cost.training_macs(dense.model, each)["total"] for each in (configs[drop].token_drop, None)]
                share = statistics.median(times[drop]) / statistics.median(times[0.0])
                print(f"{patches:<8} {program:<17} {drop:<5} {macs[0] / macs[1]:.3f}  {share:.3f}", flush=True)


if __name__ == "__main__":
    main()
