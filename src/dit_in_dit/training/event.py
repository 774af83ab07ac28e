"""Events of a run in training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dit_in_dit.model.nested import NestedDiT


@dataclass(frozen=True)
class Event:
    """An event of a run; `values` depends on its `kind`.

    start: device, precision, parameters, processes, and the damaged checkpoints that were skipped.
    step: loss, gradient norm in total and of each part, learning rate, images per second, `Utilization`.
    skipped: the examples of a step whose loss or gradient was not finite.
    rolled_back: the step to which the run went back, and the reason.
    held_out: denoising error by time.
    checkpoint: its path. With train.save=async the event comes when the write ends, after events of later steps; `step`
        is that of the checkpoint.
    unsaved: the reason why a checkpoint could not be written; `step` as in `checkpoint`.
    samples: samples are due; the averaged `model` must generate them. `model` is None except on rank 0.
    stopped: the signal that stopped the run; the last event.
    """

    kind: str
    step: int
    values: dict[str, Any] = field(default_factory=dict)
    model: NestedDiT | None = None


def progress_text(step: Event) -> str:
    """Loss, speed, MFU and peak memory of a step, as far as they are known, for a progress bar."""
    values = step.values
    parts = [f"loss {values['loss']:.4f}", f"{values['images_per_second']:.0f} images/s"]
    parts += [f"MFU {values['mfu']:.0%}"] if "mfu" in values else []
    parts += [f"{values['memory'] / 1e9:.1f} GB"] if "memory" in values else []
    return "  ".join(parts)
