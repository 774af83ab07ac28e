"""Observations of the model for `doctor`: non-finite numbers, activations, attention, errors by label, and seams.

`model_checks` judges them.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dit_in_dit.diffusion.objective import EVALUATION_TIMES
from dit_in_dit.doctor.data_checks import CHUNK, DoctorSubject, forward_budget, split_batch, take_examples
from dit_in_dit.inspection import hooks
from dit_in_dit.model.mixers import MIXERS
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.training.batches import Batch, Examples

LABEL_TIME = 0.7  # the label lowers the error most near t = 0.65 (mosaic) to 0.8 (emoji)
SEAM_TIME = 0.5  # estimates are neither copies of the input nor a mean image
SEAM_IMAGES = 64
ROWS = 12  # classes tried on every held-out image
ATTENTION_BYTES = 2**28


def non_finite_parameters(patient: DoctorSubject) -> dict[str, int]:
    """Count of non-finite numbers in each parameter that has any, by "name (trained)" or "name (averaged)"."""
    return {
        f"{name} ({which})": int((~torch.isfinite(parameter)).sum())
        for which, model in (("trained", patient.trainer.model), ("averaged", patient.trainer.ema.model))
        for name, parameter in model.named_parameters()
        if not torch.isfinite(parameter).all()
    }


def non_finite_outputs(patient: DoctorSubject, model: NestedDiT) -> tuple[list[tuple[str, int]], int]:
    """The first layer whose output is not finite, with the example's number (empty if all outputs are finite), and the
    number of examples. The examples are those that training would take next."""
    trainer = patient.trainer
    failures: list[tuple[str, int]] = []
    first = trainer.step * patient.config.global_batch
    count = min(len(patient.examples.x), forward_budget(patient.config, trainer.device))
    batch = take_examples(Examples(trainer.source, patient.config), first, count)

    def hook(name: str, start: int, images: int, module: nn.Module, arguments: object, output: object) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        for tensor in (part for part in tensors if isinstance(part, Tensor) and not failures):
            bad = ~torch.isfinite(tensor)
            if bad.any():  # rows are images, or the groups of tokens of each image in turn
                row = int(bad.flatten(1).any(1).nonzero()[0]) if tensor.ndim > 1 else 0
                failures.append((name, start + row * images // len(tensor)))

    for number, (x, noise, t, y, *_) in enumerate(split_batch(batch, trainer.device)):
        place = first + number * CHUNK, len(x)
        watched = ((module, partial(hook, name, *place)) for name, module in model.named_modules())
        with hooks.forward_hooks(watched), trainer.autocast():
            model(trainer.objective.noisy(x, noise, t), t, y)
        if failures:
            break
    return failures, count


@dataclass
class Observation:
    """Output of the hooks at one time t: tokens by block, attention and aggregation weights, the inner path's share."""

    blocks: dict[str, Tensor]
    attention: dict[str, Tensor]
    aggregation: dict[str, Tensor]
    contribution: dict[str, Tensor]


@torch.no_grad()
def observe(patient: DoctorSubject) -> dict[float, Observation]:
    """Run the averaged model on some held-out images, at the times of the held-out error."""
    model, device = patient.trainer.ema.model, patient.trainer.device
    config = patient.config.model
    mixer = MIXERS[config.inner.mixer]
    longest = max(config.patches, mixer.length(config) if mixer else 0)
    heads = config.outer.num_heads * config.blocks("outer") + config.inner.num_heads * config.blocks("inner")
    most = max(1, ATTENTION_BYTES // (4 * heads * longest**2))
    count = min(16, most, forward_budget(patient.config, device))
    x, noise, _, y, *_ = (part[:: max(1, len(part) // count)][:count].to(device) for part in patient.held)
    watches = (hooks.watch_blocks, hooks.watch_attention, hooks.watch_aggregation, hooks.watch_contribution)
    observations = {}
    for t in EVALUATION_TIMES:
        times = patient.trainer.objective.path.snap(torch.full((len(x),), t, device=device))
        with ExitStack() as stack:
            observations[t] = Observation(*(stack.enter_context(watch(model)) for watch in watches))
            model(patient.trainer.objective.noisy(x, noise, times), times, y)
    return observations


@dataclass
class LabelErrors:
    """Held-out errors of M images at t = `LABEL_TIME` under several labels."""

    y: Tensor  # true labels, (M,)
    right: Tensor  # errors under the true label, (M,)
    null: Tensor  # errors under the null class, (M,)
    by_class: dict[int, Tensor]  # errors of all images under one class, (M,), by class number

    @property
    def wrong(self) -> Tensor:
        """Mean error under the wrong classes that were tried, (M,); NaN if no wrong class was tried."""
        errors = [torch.where(self.y == k, torch.nan, errors) for k, errors in self.by_class.items()]
        return torch.stack(errors).nanmean(0)


def errors_by_label(patient: DoctorSubject) -> LabelErrors | None:
    """Errors of held-out images under right, wrong and null labels; None if there are fewer than two classes."""
    trainer, null, held = patient.trainer, patient.config.model.num_classes, patient.held
    present = sorted(set(held.y.tolist()))
    if len(present) < 2:
        return None
    tried = present if len(present) <= ROWS else present[:: -(-len(present) // ROWS)]
    images = min(len(held.y), 5 * forward_budget(patient.config, trainer.device) // (len(tried) + 2))
    keep = torch.linspace(0, len(held.y) - 1, max(images, 2)).long()
    held = Batch(*(column[keep] for column in held))

    def errors(labels: Tensor) -> Tensor:
        parts = []
        for x, noise, _, y, *_ in split_batch(held._replace(y=labels), trainer.device):
            error = trainer.objective.denoising_error(trainer.ema.model, x, noise, LABEL_TIME, y)
            parts.append(error[0].cpu().double())
        return torch.cat(parts)

    by_class = {k: errors(torch.full_like(held.y, k)) for k in tried}
    return LabelErrors(held.y, errors(held.y), errors(torch.full_like(held.y, null)), by_class)


def seam_peaks(images: Tensor, period: int) -> Tensor:
    """Log of the mean |difference of neighbours| by position mod `period`, down and across, (2, period).

    Entry `period - 1` is the difference across the border between two cells. Needs images larger than the period.
    """
    profiles = []
    for axis in (2, 3):
        steps = images.diff(dim=axis).abs().movedim(axis, 0).flatten(1).mean(1)
        cells = torch.nn.functional.pad(steps, (0, -len(steps) % period), value=torch.nan).view(-1, period)
        profiles.append(cells.nanmean(0))
    return torch.stack(profiles).clamp(min=1e-12).log()


def periodic_share(errors: Tensor, period: int) -> float:
    """Rms of the part of errors (N, C, H, W) that repeats every `period` pixels, divided by the rms of the errors."""
    cells = errors.unfold(2, period, period).unfold(3, period, period).mean((0, 2, 3))  # C period period
    repeats = cells - cells.mean((1, 2), keepdim=True)
    return (repeats.square().mean() / errors.square().mean().clamp(min=1e-30)).sqrt().item()


def estimates(patient: DoctorSubject, time: float, most: int = SEAM_IMAGES) -> tuple[Tensor, Tensor]:
    """Image estimates at a time t of at most `most` held-out images, and those images, (M, C, H, W) each."""
    trainer = patient.trainer
    count = min(most, len(patient.held.x), forward_budget(patient.config, trainer.device))
    keep = torch.linspace(0, len(patient.held.x) - 1, count).long()
    held, parts = Batch(*(column[keep] for column in patient.held)), []
    for x, noise, _, y, *_ in split_batch(held, trainer.device):
        t = trainer.objective.path.snap(torch.full((len(x),), time, device=trainer.device))
        parts.append(trainer.objective.estimate(trainer.ema.model, x, noise, t, y)[1].cpu())
    return torch.cat(parts), held.x
