"""Checks of training: loss, gradients and updates, from a log or from a probe of some steps in memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from dit_in_dit.config.training import TrainConfig
from dit_in_dit.curves.logs import held_out_errors
from dit_in_dit.doctor import data_checks
from dit_in_dit.doctor.data_checks import CheckResult, DoctorSubject, Line, take_examples, zero_loss
from dit_in_dit.inspection.cost import macs
from dit_in_dit.model.nested import part_of
from dit_in_dit.training.batches import Examples
from dit_in_dit.training.ema import ema_decay
from dit_in_dit.training.optimizer import adam_direction, reached_by_gradient
from dit_in_dit.training.trainer import Trainer
from dit_in_dit.training.warm_start import is_inner

PROBE_STEPS = 40
PROBE_LEAST = 8  # Adam's first steps have unit size whatever the gradient: fewer steps are not informative


def probe(trainer: Trainer) -> list[Line]:
    """Run optimizer steps in memory; returns log lines, or none if the steps would take too long.

    The budget is about twenty seconds; a backward pass costs twice a forward pass. The batch size is reduced to keep
    at least `PROBE_LEAST` steps.
    """
    config, lines = trainer.config, []
    images = 10 * data_checks.forward_budget(config, trainer.device) // 3
    size = min(config.global_batch, images // PROBE_LEAST)
    steps = min(PROBE_STEPS, images // size) if size else 0
    examples, first = Examples(trainer.source, config), trainer.step * config.global_batch
    for number in range(steps):
        batch = take_examples(examples, first + number * size, size)
        zero = zero_loss(trainer.objective, batch).mean().item()
        micro_batches = list(data_checks.split_batch(batch, trainer.device, config.train.batch_size))
        values = {name: float(value) for name, value in trainer.update(micro_batches).items()}
        lines.append({"step": trainer.step, **values, "relative": values["loss"] / zero})
        if not math.isfinite(values["loss"] + values["grad_norm"]):
            break
    return lines


def check_training(patient: DoctorSubject) -> CheckResult:
    """Check loss and gradients over the log, or over a `probe` if there is no log."""
    section, train = CheckResult("training"), patient.config.train
    _judge_held_out(section, patient)
    _judge_averages(section, train)
    if patient.trained and not patient.trainer.optimizer.state:
        seen = "the run holds weights only, no log and no optimizer state: gradients and learning rate cannot be judged"
        section.find("note", "training", seen, "run doctor on the run that was exported, if there is one")
        return section
    logged = [line for line in patient.log if "loss" in line]
    in_log = bool(logged) and any(name.startswith("grad_norm.") for name in logged[-1])
    probed = [] if in_log and patient.trained else probe(patient.trainer)
    lines = logged or probed
    if not lines:
        seen = f"{macs(patient.config.model)['total'] / 1e9:.0f} GMACs per image: too large to probe here"
        gpu = "on a GPU, or " if patient.trainer.device.type == "cpu" else ""
        section.find("note", "training", seen, f"run doctor {gpu}on the run once it has logged steps")
        return section
    parts = sorted({name for line in (*logged, *probed) for name in line if name.startswith("grad_norm.")})
    for part in parts:
        values = [line[part] for line in probed or logged if part in line]
        section.rows[part] = _ends_and_median(values)
    loss, norm = (np.array([line[name] for line in lines]) for name in ("loss", "grad_norm"))
    clipped = float((norm > (train.clip or math.inf)).mean())
    spikes = _spikes(norm)
    section.rows |= {"loss": _ends_and_median(loss), "grad_norm": _ends_and_median(norm)}
    section.rows["steps"] = {"looked at": len(lines), "clipped": clipped, "spikes": spikes}
    named = ("step", "loss", "grad_norm", *(part for part in parts if part in lines[-1]))
    section.series = {name: [line.get(name, math.nan) for line in lines] for name in named}
    # Small batches and loss weights such as 1/t^2 have heavy tails: healthy runs have single spikes of up to 40.
    if spikes > 0.01:
        seen = f"the gradient norm is above 10x its running median in {spikes:.1%} of the steps"
        clip = "" if train.clip else ", or set train.clip=1"
        section.find("warning", "training", seen, f"lower train.learning_rate{clip}")
    _judge_rate(section, patient, lines, logged)
    _judge_gradients(section, patient)
    return section


def _ends_and_median(values: Any) -> dict[str, float]:
    return {"first": values[0], "median": float(np.median(values)), "last": values[-1]}


def _spikes(values: np.ndarray[Any, Any], window: int = 50) -> float:
    """Share of values above ten times the median of the `window` values before them."""
    if len(values) <= window:
        return 0.0
    before = np.lib.stride_tricks.sliding_window_view(values[:-1], window)
    return float((values[window:] > 10 * np.median(before, axis=1)).mean())


def check_update_ratios(patient: DoctorSubject) -> dict[str, float]:
    """Relative size of one update at the peak learning rate, by part of the model.

    The ratio is rate * rms(Adam's direction) / rms(initial weights), over matrices that do not start at zero. The
    direction comes from Adam's moments: other optimizers give no ratios. Initial weights are used because a wrong rate
    inflates the weights, which would hide the wrong rate.
    """
    optimizer, rate = patient.trainer.optimizer, patient.config.train.learning_rate
    sums: dict[str, list[float]] = {}
    for name, parameter in patient.trainer.model.named_parameters():
        direction, initial = adam_direction(optimizer, parameter), patient.initial[name]
        if direction is None or parameter.ndim < 2 or not initial.any():
            continue
        part = sums.setdefault(part_of(name), [0.0, 0.0])
        part[0] += float(direction.square().sum())
        part[1] += float(initial.square().sum())
    return {part: rate * math.sqrt(step / weight) for part, (step, weight) in sums.items()}


def _judge_averages(section: CheckResult, train: TrainConfig) -> None:
    """Report averages of train.ema that are equal to the end of the run, because the ramp ends after it for each."""
    equal = [decay for decay in train.decays if ema_decay(train.steps, decay) < decay]
    if len(equal) > 1:
        low = ema_decay(train.steps, 1.0)
        seen = (
            f"the averages {', '.join(map(str, equal))} are the same: in {train.steps} steps no decay exceeds {low:.5f}"
        )
        section.find("warning", "averages", seen, f"set decays below {low:.5f}, or use train.ema_lengths")


def _judge_held_out(section: CheckResult, patient: DoctorSubject) -> None:
    """Report held-out errors in the log that are not finite."""
    errors = {line["step"]: held_out_errors(line).values() for line in patient.log if "held_out" in line}
    bad = sorted(step for step, values in errors.items() if not all(map(math.isfinite, values)))
    if bad:
        seen = f"the held-out error is not finite at {len(bad)} of {len(errors)} evaluations, first at step {bad[0]}"
        way = "if the loss rises too, lower train.learning_rate; if not, look at the held-out images"
        section.find("fault", "held-out error", seen, way)


def _judge_rate(section: CheckResult, patient: DoctorSubject, lines: list[Line], logged: list[Line]) -> None:
    """Report a learning rate that is too high, a model that does not learn, and a loss that is not finite."""
    ratios = check_update_ratios(patient)
    for part, ratio in ratios.items():
        section.rows[f"update / weight: {part}"] = {"peak rate": ratio}
    relative = _relative(patient, logged) if logged else [line["relative"] for line in lines]
    last, worst = float(np.median(relative[-10:])), max(relative)
    section.rows["loss / a zero prediction's"] = {"worst": worst, "last": last}
    highest = max((ratio for part, ratio in ratios.items() if part.endswith("_blocks")), default=0.0)
    rate = patient.config.train.learning_rate
    lower = f"lower train.learning_rate={rate:g} to about {rate * 1e-2 / max(highest, 0.3):.0e}"
    if not math.isfinite(lines[-1]["loss"] + lines[-1]["grad_norm"]):
        section.find("fault", "learning rate", f"the loss is not finite at step {lines[-1]['step']}", lower)
    # Healthy ratios lie between 1e-4 and 3e-2. At 0.1, a hundred noisy steps replace every weight. A loss above
    # that of a zero prediction is not noise: both are of the same examples. Healthy runs stay below 1.
    elif highest > 0.1 or last > 1.5 or worst > 3:
        seen = (
            f"a step at the peak rate changes the blocks' weights by {highest:.2g} of their size; the loss reaches "
            f"{worst:.2g} times, and ends at {last:.2g} times, the loss of a zero prediction"
        )
        section.find("fault", "learning rate", seen, lower)
    # The mean image is learned within some steps, and lowers the loss by a tenth.
    elif len(logged) >= patient.config.train.warmup + 100 and last > 0.9:
        seen = f"after {len(logged)} steps the loss is still {last:.2g} times that of a zero prediction"
        section.find("warning", "training", seen, "nothing is learned: change train.learning_rate, or check the data")


def _relative(patient: DoctorSubject, logged: list[Line]) -> list[float]:
    """Ratios of the ten largest and the ten last losses to those of a zero prediction for the same examples."""
    config, objective = patient.config, patient.trainer.objective
    examples = Examples(patient.trainer.source, config)
    count = min(config.global_batch, max(1, data_checks.MOST_NUMBERS // patient.examples.x[0].numel()))
    ratios = []
    for line in (*sorted(logged, key=lambda line: -line["loss"])[:10], *logged[-10:]):
        zero = zero_loss(objective, take_examples(examples, (line["step"] - 1) * config.global_batch, count))
        ratios.append(line["loss"] / zero.mean().item())
    return ratios


def _judge_gradients(section: CheckResult, patient: DoctorSubject) -> None:
    """Report parameters that no gradient has reached, or that still have their initial values."""
    optimizer, scale = patient.trainer.optimizer, patient.config.train.lr_scale
    if not optimizer.state:
        return
    still = []
    for name, parameter in patient.trainer.model.named_parameters():
        reached = reached_by_gradient(optimizer, parameter)
        unmoved = (
            patient.trained
            and (scale.inner if is_inner(name) else scale.outer) > 0  # else it is frozen by the config
            and bool(patient.initial[name].any())
            and torch.equal(parameter.cpu(), patient.initial[name])
        )
        if parameter.requires_grad and (reached is None or not reached.any() or unmoved):
            still.append(name)
    if still:
        seen = f"{len(still)} parameters never got a gradient: {', '.join(still[:4])}{' ...' if still[4:] else ''}"
        section.find("warning", "gradients", seen, "the parameters are unused, or a zero factor blocks the gradient")
