"""Measurements of an experiment, collected in one report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from dit_in_dit.benchmark.parts import part_macs, part_seconds, profile_by_part, subject_for_parts
from dit_in_dit.benchmark.report import BenchmarkReport, Parts, Ratio
from dit_in_dit.benchmark.subjects import (
    BenchmarkSubject,
    Make,
    Measurements,
    diffusers_dit,
    measure_subjects,
    nested,
    official_dit,
)
from dit_in_dit.benchmark.sweep import Sweep, sweep
from dit_in_dit.benchmark.timing import Times, best_product, check_memory, interleave
from dit_in_dit.config.run import RunConfig
from dit_in_dit.runtime.device import resolve_auto

Twin = Callable[[RunConfig, RunConfig], RunConfig]  # (plain, like) -> plain of equal MACs
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BUSY = 0.3  # load of other processes per core; the report notes a higher load


class Bench:
    """Measures models and collects the results in `report`.

    Args:
        seconds: measuring time for each comparison.
        twin: a function that resizes a plain config to the cost of another. It is passed in, because this package
            must not import `study`.
        dit: a checkout of facebookresearch/DiT, to compare with the official code; None: no comparison.

    Raises:
        UserError: the checkout has no DiT.
    """

    def __init__(self, command: str, device: torch.device, seconds: float, twin: Twin, dit: Path | None = None) -> None:
        self.device, self.seconds, self.twin = device, seconds, twin
        self.report = BenchmarkReport(command, device)
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        if load > BUSY * cores:
            self.report.notes.append(f"a load of {load:.1f} on {cores} cores before the start: others use the machine")
        self.others: dict[str, Make] = {"diffusers": diffusers_dit}
        if dit:
            self.others["official DiT"] = official_dit(dit)

    def measure_product(self, run: RunConfig) -> None:
        """Measure the fastest matrix product in the precision of a run; the report keeps the best of all calls."""
        precision = resolve_auto(run, self.device).train.precision
        speed = best_product(self.device, DTYPES[precision])
        self.report.products[precision] = max(speed, self.report.products.get(precision, 0.0))

    def subject(self, run: RunConfig, make: Make = nested) -> BenchmarkSubject:
        """Build a model for training."""
        self.measure_product(run)
        return BenchmarkSubject(run, self.device, make)

    def compare(self, subjects: Mapping[str, tuple[RunConfig, Make]], longer: float = 1.0) -> dict[str, Measurements]:
        """Measure subjects alternately; the measuring time is `seconds` multiplied by `longer`."""
        with check_memory(subjects, self.device):
            built = {name: self.subject(run, make) for name, (run, make) in subjects.items()}
            measurements = measure_subjects(built, longer * self.seconds)
        self.report.subjects |= measurements
        return measurements

    def add(
        self, name: str, how: str, rounds: tuple[float, ...], limit: float | None = None, *, at_least: bool = False
    ) -> None:
        """Add a `Ratio` to the report."""
        self.report.ratios.append(Ratio(name, how, rounds, limit, at_least))

    def parts(self, name: str, run: RunConfig) -> list[dict[str, float]]:
        """Measure the seconds of each part in each round; a compiled model is compiled block by block."""
        self.measure_product(run)
        subject = subject_for_parts(run, self.device)
        rounds = interleave({name: partial(part_seconds, subject)}, self.seconds / 2)[name]
        middle = {part: Times(tuple(r.get(part, 0.0) for r in rounds)).seconds for part in rounds[0]}
        precision = subject.run.train.precision
        self.report.parts[name] = Parts(precision, middle, part_macs(subject), profile_by_part(subject))
        return rounds

    def sweep(self, name: str, run: RunConfig, axis: str, values: tuple[int, ...]) -> Sweep:
        """Measure costs along an axis."""
        with check_memory(values, self.device):
            costs = self.report.sweeps[name] = sweep(run, axis, values, self.device, self.seconds / 2)
        return costs
