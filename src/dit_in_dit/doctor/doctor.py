"""Examination of a run, or of a config before training: data, loss, gradients and the model's inside."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.strict_json import has_form, parse_lines
from dit_in_dit.curves.logs import read_run
from dit_in_dit.data.run_data import open_source_of
from dit_in_dit.data.source import Source
from dit_in_dit.data.sources import open_source
from dit_in_dit.doctor import data_checks, model_checks, training_checks
from dit_in_dit.doctor.data_checks import CheckResult, DoctorSubject, Finding, Line, split_batch, take_examples
from dit_in_dit.doctor.observe import observe
from dit_in_dit.inspection import cost
from dit_in_dit.reporting.plots import COLOURS, figure, figure_png
from dit_in_dit.runs import atomic
from dit_in_dit.runs.checkpoint import Checkpoint, has_any
from dit_in_dit.runs.jsonl import ADVICE, check_lines, is_log_line
from dit_in_dit.training.batches import Batch, Examples, with_held_out_noise
from dit_in_dit.training.optimizer import is_trained
from dit_in_dit.training.trainer import Trainer

EXAMPLES = 256  # training examples examined
HELD_OUT = 512  # held-out images; many, because the null class changes errors only a little
SEVERITIES = ("fault", "warning", "note")
CURVE_POINTS = 400
STEP = {"step": int, "loss": (int, float), "grad_norm": (int, float)}  # a line of a log


@dataclass(frozen=True)
class DoctorReport:
    """All results, in the order of the checks; `step` is the step of the examined weights."""

    subject: str
    step: int
    sections: list[CheckResult]

    @property
    def findings(self) -> list[Finding]:
        """Findings of all checks, faults first."""
        every = [finding for section in self.sections for finding in section.findings]
        return sorted(every, key=lambda finding: SEVERITIES.index(finding.severity))

    def to_json(self) -> str:
        """The report as JSON; numbers that are not finite are null."""
        values = {**asdict(self), "findings": [asdict(finding) for finding in self.findings]}
        finite = json.loads(json.dumps(values), parse_constant=lambda name: None)
        return json.dumps(finite, indent=1, allow_nan=False)


def examine(config: RunConfig, device: torch.device, run: Path | None = None) -> DoctorReport:
    """Examine a config before training or, if `run` is given, the run's trained model. Writes no files.

    Consequences of a fault are not reported. Data out of range and numbers that are not finite end the examination. A
    run that diverged because of its learning rate has no other findings. UserError if the data is missing or does not
    fit the config, or the run is damaged.
    """
    patient = _admit(config, device, run)
    report = DoctorReport(str(run or "config"), patient.trainer.step, [])
    for check in (data_checks.check_examples, data_checks.check_initial_loss, model_checks.check_finite_weights):
        report.sections.append(check(patient))
        if any(f.severity == "fault" and f.check in ("data range", "non-finite") for f in report.findings):
            return report
    observations = observe(patient)
    for check_inside in (model_checks.check_activations, model_checks.check_attention, model_checks.check_inner_path):
        report.sections.append(check_inside(patient, observations))
    del observations
    last = training_checks.check_training  # its probe changes the weights
    for check in (model_checks.check_null_class, model_checks.check_sampling_start, model_checks.check_seams, last):
        report.sections.append(check(patient))
    if patient.trained and any(f.check == "learning rate" for f in report.findings):
        for section in report.sections[:-1]:
            section.findings.clear()  # consequences of the divergence
    return replace(report, sections=[section for section in report.sections if section.rows or section.findings])


def _admit(config: RunConfig, device: torch.device, run: Path | None) -> DoctorSubject:
    """Build the model, measure its initial loss, then load the run's newest checkpoint."""
    config = replace(config, train=replace(config.train, compile=False, evaluate_every=0))
    cost.check_fits(config.model, device, averages=1 + len(config.train.further_averages))
    source = open_source_of(run, config) if run else open_source(config.data, config.model)
    trainer = Trainer(config, source, device)
    initial = {name: parameter.detach().to("cpu", copy=True) for name, parameter in trainer.model.named_parameters()}
    numbers = math.prod(config.model.image_shape)
    count = max(data_checks.CHUNK, min(EXAMPLES, data_checks.MOST_NUMBERS // numbers))
    examples = take_examples(Examples(source, config), 0, count)
    start = _losses(trainer, Batch(*(part[: data_checks.forward_budget(config, device)] for part in examples)))
    trained = run is not None and has_any(run)
    if run is not None and trained:
        saved = Checkpoint.open(run)
        saved.check_model()
        try:
            _restore(trainer, saved)
        except (RuntimeError, KeyError):
            raise saved.misfit() from None
    held = _held_out(source, config, max(data_checks.CHUNK, min(HELD_OUT, data_checks.MOST_NUMBERS // numbers)))
    return DoctorSubject(trainer, initial, examples, start, held, _read_log(run), trained)


def _restore(trainer: Trainer, saved: Checkpoint) -> None:
    """Load a checkpoint: its whole state, or only its averaged weights if it holds no more (exported, imported) or if
    its optimizer was passed to train(), whose state cannot be loaded."""
    state = saved.state()
    if is_trained(state) and "optimizer" not in saved.manifest.get("objects", {}):
        trainer.restore(state, saved.averaged(), saved.step)
        return
    for model in (trainer.model, trainer.ema.model):
        model.load_state_dict(saved.weights())
    trainer.step = saved.step


@torch.no_grad()
def _losses(trainer: Trainer, examples: Batch) -> torch.Tensor:
    """The model's loss on each example."""
    losses = []
    for x, noise, t, y, *_ in split_batch(examples, trainer.device):
        with trainer.autocast():
            losses.append(trainer.objective.loss(trainer.model, x, noise, t, y).cpu())
    return torch.cat(losses)


def _held_out(source: Source, config: RunConfig, most: int) -> Batch:
    """Held-out images, or training images if none is held out; evenly spaced, since data is often sorted by class."""
    size = source.held_out_size or source.train_size or most
    read = source.held_out if source.held_out_size else source.train
    chosen = np.unique(np.linspace(0, size - 1, min(most, size)).round().astype(int)).tolist()
    return with_held_out_noise([read(number) for number in chosen], chosen, config.model)


def _read_log(run: Path | None) -> list[Line]:
    """Complete lines of the run's log."""
    path = run / "log.jsonl" if run else None
    if path is None or not path.exists():
        return []
    text = path.read_bytes()
    lines = parse_lines(text[: text.rfind(b"\n") + 1].splitlines(), str(path), ADVICE)
    check_lines(lines, is_log_line, str(path), ADVICE)
    for line in lines:
        numbers = [value for name, value in line.items() if name in STEP or name.startswith("grad_norm.")]
        if "loss" in line and not (has_form(line, STEP) and has_form(numbers, [(int, float)])):
            raise UserError(f"{path} is not a training log: a step lacks a number; {ADVICE}")
    read_run(path.parent)  # checks that held-out errors are numbers
    return lines


def draw_report(report: DoctorReport, path: Path) -> None:
    """Draw six plots: data, loss, gradients, activations, attention and seams; UserError without matplotlib."""
    sections = {section.title.split(",")[0].split(" /")[0]: section for section in report.sections}
    fig, axes = figure(2, 3, width=4.3)
    _draw_histogram(axes[0, 0], sections["data"])
    _draw_training(axes[0, 1], axes[0, 2], sections)
    _draw_rows(axes[1, 0], sections.get("activations"), "rms", "rms of the block's tokens")
    _draw_rows(axes[1, 1], sections.get("attention entropy"), "", "attention entropy / log(length)")
    _draw_seams(axes[1, 2], sections.get("seams"))
    for axis in axes.flat:
        if not axis.has_data():
            axis.text(0.5, 0.5, "not examined", ha="center", va="center", transform=axis.transAxes, color="grey")
            axis.set(xticks=[], yticks=[])
    atomic.write_atomic(path, figure_png(fig))


def _draw_histogram(axis: Any, section: CheckResult) -> None:
    axis.set_title("training data")
    if section.series:
        edges = np.array(section.series["edges"])
        counts = np.array(section.series["histogram"]) / sum(section.series["histogram"])
        axis.bar(edges[:-1], counts, np.diff(edges), align="edge", color=COLOURS[0])
        axis.set(xlabel="value", ylabel="share of the values", yscale="log")


def _draw_training(losses: Any, gradients: Any, sections: dict[str, CheckResult]) -> None:
    losses.set_title("loss")
    gradients.set_title("gradient norm by part")
    if "training" not in sections or not sections["training"].series:
        return
    series, start = sections["training"].series, sections["loss at start"].rows["loss"]
    losses.plot(*_thin(series["step"], series["loss"]), color=COLOURS[0], lw=1.2, label="loss")
    losses.axhline(start["analytic"], color=COLOURS[1], ls="--", lw=1, label="zero prediction, expected")
    losses.plot(1, start["measured"], "o", color=COLOURS[2], ms=5, label="untrained model, measured")
    gradients.plot(*_thin(series["step"], series["grad_norm"]), color="black", lw=1.6, label="all")
    for number, part in enumerate(name for name in series if name.startswith("grad_norm.")):
        label = part.removeprefix("grad_norm.").replace("_", " ")
        style, colour = ("-", "--")[number // 6], COLOURS[number % 6]
        gradients.plot(*_thin(series["step"], series[part]), style, color=colour, lw=1.2, label=label)
    for axis, label in ((losses, "training loss"), (gradients, "norm before clipping")):
        axis.set(xlabel="step", ylabel=label, yscale="log")
        low, high = axis.get_ylim()
        axis.set_yticks([m * 10.0**e for e in range(-9, 10) for m in ((1, 2, 5) if high < 200 * low else (1,))])
        axis.set_ylim(max(low, high * 1e-5), high)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    losses.legend(fontsize=7, frameon=False, loc="lower left")
    gradients.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))  # up to a dozen parts


def _thin(steps: list[float], values: list[float]) -> tuple[Any, Any]:
    """Medians over equal stretches of steps, because all steps of a long log would look like a band."""
    parts = len(steps) if len(steps) <= CURVE_POINTS else CURVE_POINTS // 4
    return [np.mean(p) for p in np.array_split(steps, parts)], [np.median(p) for p in np.array_split(values, parts)]


def _draw_rows(axis: Any, section: CheckResult | None, prefix: str, label: str) -> None:
    if not section or not section.rows:
        return
    columns = [c for c in next(iter(section.rows.values())) if c.startswith(prefix) and c != "length"]
    for number, column in enumerate(columns):
        values = [row[column] for row in section.rows.values()]
        axis.plot(values, "o-", ms=3, lw=1.2, label=column.removeprefix("rms "), color=COLOURS[number])
    names = [name.replace("_blocks", "") for name in section.rows]
    every = -(-len(names) // 12)
    axis.set_xticks(range(0, len(names), every), names[::every], rotation=60, ha="right", fontsize=7)
    axis.set(ylabel=label, title=section.title.split(" /")[0] + " by block")
    axis.legend(fontsize=7, frameon=False)


def _draw_seams(axis: Any, section: CheckResult | None) -> None:
    axis.set_title("seams")
    if not section or not section.series:
        return
    for number, (name, values) in enumerate(section.series.items()):
        label = name.removesuffix(" profile")
        axis.plot(range(len(values)), values, "o-", ms=4, lw=1.2, label=label, color=COLOURS[number])
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="position within the cell, pixels (last: its border)", ylabel="log steps, estimates / real")
    axis.axhline(0, color="grey", lw=0.8)
    axis.legend(fontsize=7, frameon=False)
