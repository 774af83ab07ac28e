"""Figures and tables of one evaluation, and of several evaluations with equal protocols."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.strict_json import has_form, json_difference, read_json
from dit_in_dit.metrics.evaluate import SCALES, SHOWN, Evaluation
from dit_in_dit.metrics.metric import direction
from dit_in_dit.metrics.pixels import Seams, Spectrum, statistics
from dit_in_dit.metrics.score import ReferenceHalves
from dit_in_dit.reporting import plots
from dit_in_dit.reporting.images import image_grid, image_png, side_by_side, to_floats
from dit_in_dit.runs import atomic
from dit_in_dit.runtime.precision import precision_of_version

NUMBER = (int, float)
SCORE = {"value": NUMBER, "low": (*NUMBER, NoneType), "high": (*NUMBER, NoneType), "floor": (*NUMBER, NoneType)}
FORM = {"subject": {"name": str}, "protocol": dict, "scores": dict}  # of metrics.json


def draw_evaluation(evaluation: Evaluation, out: Path) -> list[tuple[Path, str]]:
    """Write the figures; returns the path and a description of each figure."""
    samples, metrics, nearest = out / "samples.png", out / "metrics.png", out / "nearest.png"
    step = max(1, len(evaluation.real) // SHOWN)
    pictures = {
        "evaluated": image_grid(evaluation.images[:SHOWN]),
        "real images": image_grid(evaluation.real[::step][:SHOWN]),
    }
    atomic.write_atomic(samples, image_png(side_by_side(pictures)))
    draw_nearest(evaluation, nearest)
    draw_metrics(evaluation, metrics)
    return [
        (samples, "the first images beside real ones"),
        (metrics, "distances beside real against real, spectra, seams, nearest training images"),
        (nearest, "the images that come nearest to training images, each above its neighbour"),
    ]


def draw_nearest(evaluation: Evaluation, path: Path, columns: int = 16) -> None:
    """Draw the samples nearest to training images, each above the training image nearest to it."""
    count = min(columns * 2, len(evaluation.nearest))
    rows = []
    for start in range(0, count, columns):
        part = slice(start, min(start + columns, count))
        samples, real = evaluation.nearest[part], evaluation.nearest_real[part]
        blank = np.full((columns - len(samples), *samples.shape[1:]), 255, np.uint8)
        rows += [samples, blank, real, blank]
    atomic.write_atomic(path, image_png(image_grid(np.concatenate(rows), columns)))


def draw_metrics(evaluation: Evaluation, path: Path) -> None:
    """Plot every score against its floor, the power spectra, the seams and the distances to training images."""
    figure, axes = plots.figure(2, 2, width=5.2, height=3.9)
    images, real = to_floats(evaluation.images), to_floats(evaluation.real)
    first = ReferenceHalves.of(len(real)).first[0]
    _draw_scores(axes[0, 0], evaluation.result["scores"])
    spectrum = Spectrum(*images.shape[2:])
    _draw_spectra(axes[0, 1], spectrum, {"evaluated": spectrum(images).mean(0), "real": spectrum(real).mean(0)})
    scored = (name.partition(".") for name in evaluation.result["scores"])
    periods = tuple(int(period) for name, _, period in scored if name == "seam")
    seams = [s for s, _ in statistics(images.shape[1:], periods) if isinstance(s, Seams)]
    _draw_seams(axes[1, 0], [(s, s.deviation(s(images).mean(0), s(real[first]).mean(0))) for s in seams])
    _draw_neighbours(axes[1, 1], evaluation)
    figure.suptitle(caption(evaluation.result["subject"], evaluation.result["protocol"]), fontsize=9)
    atomic.write_atomic(path, plots.figure_png(figure))


def caption(subject: dict[str, Any], protocol: dict[str, Any]) -> str:
    """One line about what was evaluated and how."""
    samples, real = protocol["samples"], protocol["reference"]
    how = samples["made by"]
    if how == "sampling":
        scales = ", ".join(f"{name.replace('_', ' ')} {samples[name]:g}" for name in SCALES if name in samples)
        how = f"{samples['sampler']} {samples['steps']} steps, {scales}, seed {samples['seed']}"
    step = f" at step {subject['step']}" if "step" in subject else ""
    return f"{subject['name']}{step}: {protocol['images']} images ({how}) against {real['images']} of {real['data']}"


def _draw_scores(axis: Any, scores: dict[str, dict[str, Any]]) -> None:
    """Plot distances as multiples of their floor, with intervals, on a logarithmic scale; distances without a floor are
    left out."""
    rows = [(name, s) for name, s in scores.items() if s["floor"] and direction(name) in ("lower", "zero")]
    y = np.arange(len(rows))[::-1]
    floors = np.array([s["floor"] for _, s in rows])
    values = np.abs([s["value"] for _, s in rows]) / floors
    reach = np.array([0 if s["low"] is None else (s["high"] - s["low"]) / 2 for _, s in rows]) / floors
    left = np.maximum(values - reach, 0.1)
    axis.hlines(y, left, values + reach, color=plots.COLOURS[0], alpha=0.4, linewidth=4)
    axis.plot(np.maximum(values, 0.1), y, "o", color=plots.COLOURS[0], markersize=4)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", yticks=y, xlabel="size / real against real (1: as real images)")
    axis.set_yticklabels([name for name, _ in rows], fontsize=7)


def _draw_spectra(axis: Any, spectrum: Spectrum, spectra: dict[str, Any]) -> None:
    for colour, (name, power) in zip(plots.COLOURS, spectra.items(), strict=False):
        axis.plot(spectrum.frequency, power, color=colour, label=name)
    axis.set(xscale="log", yscale="log", xlabel="frequency, cycles a pixel", ylabel="mean power")
    ticks = [2.0**-k for k in range(1, 12) if 2.0**-k >= spectrum.frequency[0]]
    axis.set_xticks(ticks, [f"1/{round(1 / tick)}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.legend()


def _draw_seams(axis: Any, deviations: list[tuple[Seams, Any]]) -> None:
    for colour, (seams, deviation) in zip(plots.COLOURS, deviations, strict=False):
        for line, name, places in zip(("-", "--"), ("down", "across"), deviation, strict=True):
            x = (np.arange(seams.period) + 1) / seams.period
            axis.plot(x, places, line, color=colour, marker=".", label=f"{seams.period} px, {name}")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="place in the period (1: the border)", ylabel="excess step over real images")
    if deviations:
        axis.legend(fontsize=7)


def _draw_neighbours(axis: Any, evaluation: Evaluation) -> None:
    near = evaluation.near
    bins = np.linspace(0, max(near.train.max(), near.unseen_train.max(), 1e-3) * 1.02, 40)
    for colour, name, values in (
        (plots.COLOURS[0], "evaluated", near.train),
        (plots.COLOURS[1], "unseen real images", near.unseen_train),
    ):
        axis.hist(values, bins, density=True, histtype="step", color=colour, label=name)
    axis.axvline(near.too_near_train, color="black", linewidth=0.8, linestyle=":", label="too near")
    axis.set(xlabel="distance to the nearest training image (RMS, range 2)", ylabel="density")
    axis.legend(fontsize=7)


# --------------------------------------------------------------------------------------------- compare


def read_evaluation(path: Path) -> dict[str, Any]:
    """Read an evaluation from its `metrics.json`, from its folder, or from a run (its newest evaluation).

    Raises:
        UserError: there is no evaluation, or its file is damaged.
    """
    places = [path, path / "metrics.json", *sorted((path / "evaluation").glob("*/metrics.json"), reverse=True)]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(f"no evaluation at {path}: run `dit-in-dit evaluate {path}` first")
    advice = "run `dit-in-dit evaluate` again"
    result = read_json(file, "the evaluation ", advice)
    if not has_form(result, FORM) or not all(has_form(score, SCORE) for score in result["scores"].values()):
        raise UserError(f"{file} is not an evaluation: a part is missing or of another type; {advice}")
    made_with = result.get("made with")
    torch = made_with.get("torch") if isinstance(made_with, dict) else None
    result["protocol"].setdefault("precision", precision_of_version(torch if isinstance(torch, str) else ""))
    return result


def compare_evaluations(paths: list[Path]) -> tuple[list[str], dict[str, list[dict[str, Any] | None]]]:
    """Names of the evaluations and, by score, an entry of each evaluation (None: no such score).

    Raises:
        UserError: the protocols differ; the message names the first field that differs.
    """
    results = [read_evaluation(path) for path in paths]
    for path, result in zip(paths[1:], results[1:], strict=True):
        if field := json_difference(results[0]["protocol"], result["protocol"]):
            raise UserError(
                f"{paths[0]} and {path} cannot be compared: their protocols differ in {field}; use one protocol"
            )
    names = list(dict.fromkeys(name for result in results for name in result["scores"]))
    return [_label(r) for r in results], {name: [r["scores"].get(name) for r in results] for name in names}


def score_table(scores: dict[str, list[dict[str, Any] | None]], labels: list[str]) -> tuple[list[str], list[list[str]]]:
    """Heads, and a row per score: for each evaluation the value and half the width of its interval; the floor."""
    rows = []
    for name, entries in scores.items():
        floor = next((s["floor"] for s in entries if s and s["floor"] is not None), None)
        cells = [cell for score in entries for cell in _cells(score)]
        rows.append([name, *cells, "" if floor is None else f"{floor:.4g}"])
    return ["", *(cell for label in labels for cell in (label, "")), "real vs real"], rows


def _cells(score: dict[str, Any] | None) -> tuple[str, str]:
    if score is None:
        return "-", ""
    half = "" if score["low"] is None else f"+- {(score['high'] - score['low']) / 2:.2g}"
    return f"{score['value']:.4g}", half


def _label(result: dict[str, Any]) -> str:
    subject = result["subject"]
    return Path(subject["name"]).name + (f"@{subject['step']}" if "step" in subject else "")


def draw_compared(
    labels: list[str], scores: dict[str, list[dict[str, Any] | None]], path: Path, columns: int = 5
) -> None:
    """Plot one panel per score: the floor, and a dot with its interval for each evaluation."""
    figure, axes = plots.panel_grid(len(scores), columns, width=2.5, height=0.7 + 0.22 * len(labels))
    y = np.arange(len(labels))[::-1]
    for number, (axis, (name, entries)) in enumerate(zip(axes, scores.items(), strict=True)):
        for at, colour, score in zip(y, plots.COLOURS * len(y), entries, strict=False):
            if score is not None:
                if score["low"] is not None:
                    axis.hlines(at, score["low"], score["high"], color=colour, alpha=0.4, linewidth=4)
                axis.plot(score["value"], at, "o", color=colour, markersize=4)
        if floor := next((s["floor"] for s in entries if s and s["floor"] is not None), None):
            axis.axvline(floor, color="black", linewidth=0.8, linestyle=":")
            if direction(name) == "zero":
                axis.axvspan(-floor, floor, color="black", alpha=0.08)
        axis.set(yticks=y, ylim=(-0.7, len(labels) - 0.3))
        axis.set_yticklabels([] if number % columns else labels, fontsize=7)
        axis.set_title(name, fontsize=8)
        axis.tick_params(axis="x", labelsize=6)
        axis.locator_params(axis="x", nbins=4)
    figure.suptitle("dots with 95% intervals; dotted: real against real", fontsize=8)
    atomic.write_atomic(path, plots.figure_png(figure))
