"""Bytes of a batch on its way to the device, and processor time to make it, with noise of the host and of the device.

    PYTHONPATH=src OMP_NUM_THREADS=1 python scripts/feeding.py [--pairs 9]

`processor` is the time of a worker that prepares a batch, median of interleaved rounds on one core; `noise` is that of
the noise alone, made by NumPy (host) or by the device's operations on this CPU (device). `before` has float32 images
and noise, as every batch had before train.noise.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dit_in_dit.config.run import DataConfig, ModelConfig, RunConfig
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.data.sources import open_source
from dit_in_dit.runtime import philox
from dit_in_dit.runtime.seeding import generator
from dit_in_dit.training.batches import Examples

BATCH = 256


def processor_ms(functions: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Processor time of each function in milliseconds, in interleaved rounds."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds + 1):
        for function, own in zip(functions, times, strict=True):
            begin = time.process_time()
            function()
            if turn:  # the first round warms up
                own.append(1000 * (time.process_time() - begin))
    return times


def host_noise(shape: tuple[int, ...], count: int) -> np.ndarray:
    """Noise as `Examples` makes it with train.noise=host."""
    return np.stack([generator(0, "noise", n).standard_normal(shape, np.float32) for n in range(count)])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9, help="interleaved rounds")
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    print(
        f"{BATCH} examples          before MB  host MB  device MB   processor ms: host  device   noise ms: host  device"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in (("latents 4x32x32", (4, 32, 32)), ("pixels 3x256x256", (3, 256, 256))):
            place, pixels = Path(folder) / f"{name[:6]}.npz", shape[0] == 3
            rows = (8, *shape[1:], shape[0]) if pixels else (8, *shape)
            images = draw.integers(0, 256, rows, np.uint8) if pixels else draw.standard_normal(rows, np.float32)
            np.savez(place, images=images, labels=np.zeros(8, int))
            model = ModelConfig(image_size=shape[1:], channels=shape[0], num_classes=1)
            config = RunConfig(model=model, data=DataConfig(source=str(place), held_out=0), train=TrainConfig())
            source = open_source(config.data, model)
            both = [
                Examples(source, replace(config, train=replace(config.train, noise=kind)))
                for kind in ("host", "device")
            ]
            before = sum(part.nbytes for part in both[0][0])
            sizes = [sum(part.nbytes for part in examples.packed(0) if part is not None) for examples in both]
            few = 16 if pixels else BATCH
            numbers = torch.arange(few)
            times = processor_ms(
                [
                    *(lambda examples=examples: examples.packed(0) for examples in both),
                    lambda shape=shape, few=few: host_noise(shape, few),
                    lambda shape=shape, numbers=numbers: philox.normal(0, "noise", numbers, shape),
                ],
                pairs,
            )
            whole, noise = times[:2], [[BATCH / few * t for t in row] for row in times[2:]]
            middle = [statistics.median(row) for row in (*whole, *noise)]
            ratio = statistics.median(d / h for h, d in zip(*noise, strict=True))
            print(
                f"{name:18s} {before / 1e6:14.2f} {sizes[0] / 1e6:8.2f} {sizes[1] / 1e6:10.2f} "
                f"{middle[0]:19.1f} {middle[1]:7.1f} {middle[2]:16.1f} {middle[3]:7.1f}   noise ratio {ratio:.2f}"
            )


if __name__ == "__main__":
    main()
