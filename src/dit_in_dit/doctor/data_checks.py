"""What `doctor` examines, what it finds, and the checks of the data and of the initial loss.

A check measures, then judges. The reason for each threshold is beside the threshold. `model_checks` and
`training_checks` hold the other checks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit_in_dit.config.run import RunConfig
from dit_in_dit.diffusion.objective import Objective, draw_time
from dit_in_dit.diffusion.path import prediction_coefficients
from dit_in_dit.inspection.cost import macs
from dit_in_dit.training.batches import Batch, Examples
from dit_in_dit.training.trainer import Trainer

Severity = Literal["fault", "warning", "note"]
Line = dict[str, Any]

MOST_NUMBERS = 2**25  # values of images in memory at a time: 128 MB of float32
CHUNK = 16  # examples at a time
LABELS_READ = 4096  # training images read for their labels


@dataclass(frozen=True)
class Finding:
    """One finding: severity, name of the check, observation with numbers, and advice."""

    severity: Severity
    check: str
    seen: str
    advice: str


@dataclass
class CheckResult:
    """Result of one check: statistics (row -> column -> number), findings, and series for the picture."""

    title: str
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    series: dict[str, list[float]] = field(default_factory=dict)

    def find(self, severity: Severity, check: str, seen: str, advice: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(severity, check, seen, advice))


@dataclass
class DoctorSubject:
    """Subject of the checks: a model with its optimizer, untrained or from a checkpoint, and its data."""

    trainer: Trainer
    initial: dict[str, Tensor]  # parameters before training, by name
    examples: Batch  # the first training examples
    start: Tensor  # the initial model's loss on each example
    held: Batch  # evenly spaced held-out images, with noise that is the same for every run
    log: list[Line]  # of log.jsonl
    trained: bool  # whether the weights are from a checkpoint

    @property
    def config(self) -> RunConfig:
        """Config of the run."""
        return self.trainer.config


def forward_budget(config: RunConfig, device: torch.device) -> int:
    """Number of images for a forward pass of two seconds, at 1e10 MACs per second on a CPU core, 1e12 on a GPU."""
    return max(2, int((2e10 if device.type == "cpu" else 2e12) // macs(config.model)["total"]))


def take_examples(examples: Examples, first: int, count: int) -> Batch:
    """Training examples `first` to `first + count - 1`, whatever the run's batch size."""
    config = examples.config
    train = replace(config.train, batch_size=1)
    single = Examples(examples.source, replace(config, train=train))
    parts = [single[number] for number in range(first, first + count)]
    return Batch(*(torch.cat(column) for column in zip(*parts, strict=True)))


def split_batch(batch: Batch, device: torch.device, size: int = CHUNK) -> Iterator[Batch]:
    """Pieces of at most `size` examples, on the device."""
    for at in range(0, len(batch.x), size):
        yield Batch(*(part[at : at + size].to(device) for part in batch))


def check_examples(patient: DoctorSubject) -> CheckResult:
    """Check range, deviation, constant images, duplicates and labels of the first training examples."""
    section, config = CheckResult("data"), patient.config
    _, first = np.unique(patient.examples.image.numpy(), return_index=True)
    images = patient.examples.x[torch.from_numpy(first)]  # each image once
    for channel, values in enumerate(images.double().transpose(0, 1).flatten(1)):
        numbers = {"min": values.min(), "mean": values.mean(), "max": values.max(), "deviation": values.std()}
        section.rows[f"channel {channel}"] = {name: number.item() for name, number in numbers.items()}
    _judge_range(section, images)
    flat = images.flatten(1)
    constant = (flat.amax(1) == flat.amin(1)).double().mean().item()
    copies = 1 - len({image.numpy().tobytes() for image in flat}) / len(flat)
    section.rows["images"] = {"looked at": len(flat), "constant": constant, "duplicates": copies}
    if constant > 0.1:  # a few blank images are usual; a tenth suggests a reader that fails silently
        section.find("warning", "data", f"{constant:.0%} of the images are constant", "look at the images; remove them")
    if copies > 0.05 and len(flat) >= 32:  # copies of held-out images in training would bias the held-out error
        section.find("warning", "data", f"{copies:.0%} of the images are copies of another image", "remove duplicates")
    low, high = images.min().item(), images.max().item()
    if math.isfinite(low + high):
        counts, edges = np.histogram(flat.numpy(), bins=64, range=(low, high or 1.0))
        section.series = {"histogram": counts.tolist(), "edges": edges.tolist()}
    if config.model.num_classes:
        _labels(section, patient)
    return section


def _judge_range(section: CheckResult, images: Tensor) -> None:
    low, high, deviation = images.min().item(), images.max().item(), images.double().std().item()
    seen = f"values from {low:.3g} to {high:.3g}, deviation {deviation:.3g}"
    if not torch.isfinite(images).all():
        row = int((~torch.isfinite(images)).flatten(1).any(1).nonzero()[0])
        section.find("fault", "data range", f"values that are not finite, first in image {row}", "fix data.source")
        return
    slack = 1e-3  # rounding
    pixels = images.shape[1] in (1, 3)
    not_scaled = pixels and low >= 0 and not _from_bytes(images)
    if not_scaled and high > 1 + slack:
        section.find("fault", "data range", f"{seen}: pixels in [0, 255]", "store uint8, or floats x / 127.5 - 1")
    elif not_scaled:
        section.find("fault", "data range", f"{seen}: pixels in [0, 1]", "store uint8, or floats 2 x - 1")
    elif max(-low, high) <= 1 + slack and pixels:
        if deviation < 0.05:  # usual images have about 0.5, and so 100 times the signal-to-noise ratio
            section.find("warning", "data range", f"{seen}: almost no contrast", "scale the images to [-1, 1]")
    # The noise has deviation 1. A factor of two shifts every signal-to-noise ratio as much as one deviation of
    # logit-normal times. Beyond a factor of ten the network sees either only noise or none.
    elif not 0.1 < deviation < 10:
        advice = "scale latents to deviation 1 (a VAE's scaling_factor), pixels to [-1, 1]"
        section.find("fault", "data range", seen, advice)
    elif not 0.5 < deviation < 2:
        section.find("warning", "data range", f"{seen}; the noise has deviation 1", "scale latents to deviation 1")


def _from_bytes(images: Tensor) -> bool:
    """Whether all values are x / 127.5 - 1 for integers x. If so, a reader has scaled bright images."""
    levels = (images.double() + 1) * 127.5
    return bool((levels - levels.round()).abs().max() < 1e-3) and bool(levels.max() < 256)


def _labels(section: CheckResult, patient: DoctorSubject) -> None:
    """Check the labels of training examples, and that every class has images."""
    config, source, batch = patient.config, patient.trainer.source, patient.examples
    classes, drop = config.model.num_classes, config.train.label_drop
    true = torch.tensor([source.train(int(number))[1] for number in batch.image])
    size, most = source.train_size, MOST_NUMBERS // batch.x[0].numel()
    complete = size is not None and size <= min(LABELS_READ, most)
    labels = torch.tensor([source.train(i)[1] for i in range(size or 0)]) if complete else true
    outside = int(((labels < 0) | (labels >= classes)).sum())
    if outside:
        advice = "number classes from 0, or raise model.num_classes"
        section.find("fault", "labels", f"{outside} labels outside 0 to {classes - 1}", advice)
        return
    counts = labels.bincount(minlength=classes)
    dropped = batch.y == classes
    share, n = dropped.double().mean().item(), len(dropped)
    ends = {"least images": counts.min().item(), "most images": counts.max().item()}
    section.rows["labels"] = {"classes": classes, **ends, "dropped": share}
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty and (complete or n / classes > 20):  # the chance that a class of equal share is absent is e^-20
        names = ", ".join(source.classes[number] for number in empty[:5])
        section.find("warning", "labels", f"no training image of {len(empty)} classes: {names}", "remove the class")
    if config.data.balance == "class":
        _balance(section, np.bincount(source.labels))
    if not torch.equal(batch.y[~dropped], true[~dropped]):
        section.find(
            "fault", "null class", "training examples have labels that are neither the image's label nor num_classes",
            f"a dropped label must be {classes} (model.num_classes)",
        )  # fmt: skip
    if abs(share - drop) > 4 * math.sqrt(drop * (1 - drop) / n) + 1 / n:  # four standard deviations of a binomial share
        seen = f"{share:.1%} of the labels are dropped, not {drop:.1%}"
        section.find("fault", "null class", seen, f"replace labels by {classes} with probability train.label_drop")


def _balance(section: CheckResult, counts: NDArray[np.int64]) -> None:
    counts = counts[counts > 0]
    ratio = counts.mean() / counts.min()
    if ratio > 10:  # memorised sooner: a held-out error of all classes hides it
        seen = f"the smallest class ({counts.min()} images) repeats an image {ratio:.0f} times as often as the average"
        section.find("warning", "balance", seen, "add images of this class, or set data.balance=none")


def _times(section: CheckResult, t: Tensor, shift: float) -> None:
    """Judge the training times of a shift: with most times at one end of the path, the rest is hardly learned."""
    for where, share in (("above 0.98", (t > 0.98).double().mean()), ("below 0.02", (t < 0.02).double().mean())):
        if shift != 1 and share > 0.5:
            seen = f"diffusion.time_shift={shift:.4g} puts {share:.0%} of the training times {where}"
            section.find("warning", "time shift", seen, "set diffusion.time_shift nearer to 1")


def zero_loss(objective: Objective, batch: Batch) -> Tensor:
    """Loss (N,) of a zero prediction for these images at these times, in expectation over the noise.

    The loss is weight(t) (u(t)^2 x^2 + w(t)^2) if the target is u x + w e.
    """
    if objective.config.frequency_weight:  # for the noise of these examples
        return objective.loss(lambda x, t, y: torch.zeros_like(x), batch.x, batch.noise, batch.t, None)
    u, w = prediction_coefficients(objective.path, objective.config.predict, *objective.path.coefficients(batch.t))
    return objective.weight(batch.t) * (u**2 * batch.x.square().flatten(1).mean(1) + w**2)


def expected_loss(config: RunConfig, power: float) -> float:
    """Expected loss of a zero prediction over the configured times, for images of mean square `power`."""
    objective, even = Objective(config.diffusion), (torch.arange(2**14, dtype=torch.float64) + 0.5) / 2**14
    t = draw_time(objective.path, even, config.diffusion)
    u, w = prediction_coefficients(objective.path, config.diffusion.predict, *objective.path.coefficients(t))
    return (objective.weight(t) * (u**2 * power + w**2)).double().mean().item()


def check_initial_loss(patient: DoctorSubject) -> CheckResult:
    """Check that the untrained model's loss is that of a zero prediction, since its heads start at zero."""
    section, config, batch = CheckResult("loss at start"), patient.config, patient.examples
    zero = zero_loss(patient.trainer.objective, batch)[: len(patient.start)]
    analytic = expected_loss(config, batch.x.square().mean().item())
    measured, expected = patient.start.mean().item(), zero.mean().item()
    even = (torch.arange(2**14, dtype=torch.float64) + 0.5) / 2**14
    _times(section, draw_time(patient.trainer.objective.path, even, config.diffusion), config.diffusion.shift)
    section.rows["loss"] = {"analytic": analytic, "these examples": expected, "measured": measured}
    # The two differ only by the noise, whose mean square deviates by sqrt(2 / numbers), far below a tenth. A model that
    # starts from a run's weights (train.init), or predicts split, does not predict zero.
    if patient.trainer.begun is None and not config.diffusion.split and not abs(measured / expected - 1) < 0.1:
        section.find(
            "warning", "loss at start",
            f"the untrained model's loss is {measured:.4g}; a zero prediction has a loss of {expected:.4g}",
            "zero-initialise the heads, or check the objective",
        )  # fmt: skip
    error = zero.std().item() / math.sqrt(len(zero))
    known = not config.diffusion.frequency_weight  # the analytic loss leaves out the frequency loss
    if known and len(zero) >= 64 and abs(expected - analytic) > 5 * error:
        seen = f"the sampled times give {expected:.4g}, the configured distribution {analytic:.4g} (+- {error:.2g})"
        section.find("warning", "loss at start", seen, "check diffusion.time and the weight")
    logged = patient.log[0]["loss"] if patient.log and patient.log[0].get("step") == 1 else None
    if logged is not None and config.global_batch <= len(patient.start):
        again = patient.start[: config.global_batch].mean().item()
        section.rows["loss"] |= {"logged": logged, "again": again}
        if not abs(logged / again - 1) < 0.05:  # same examples and weights: only the precision can differ
            section.find(
                "warning", "loss at start", f"step 1 logged {logged:.4g}; the same examples now give {again:.4g}",
                "data.source or the code has changed since: undo the change, or train again",
            )  # fmt: skip
    return section
