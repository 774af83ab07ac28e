"""The experiments that measure speed: a suite's, and those on any config."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dit_in_dit.benchmark.attention import group_times
from dit_in_dit.benchmark.first_written import check_first_written
from dit_in_dit.benchmark.parts import INNER, OUTER, part_macs, part_seconds, parted, per_mac, profiled
from dit_in_dit.benchmark.report import BenchmarkReport, Goal, Parts, Ratio
from dit_in_dit.benchmark.subjects import (
    BenchmarkSubject,
    Make,
    Measurements,
    check_theirs,
    diffusers_dit,
    first_written,
    measure_subjects,
    nested,
    official_dit,
)
from dit_in_dit.benchmark.suite import Suite
from dit_in_dit.benchmark.sweep import Sweep, configs, sweep
from dit_in_dit.benchmark.timing import Times, best_product, enough_memory, in_turns, stopwatch, trainer_step
from dit_in_dit.config.files import override
from dit_in_dit.config.run import RunConfig
from dit_in_dit.diffusion.samplers import denoise, guided
from dit_in_dit.inspection.cost import FORWARDS_PER_STEP
from dit_in_dit.runtime.device import resolve_precision

Experiment = tuple[str, Callable[[], None]]
Twin = Callable[[RunConfig, RunConfig], RunConfig]  # (plain, like) -> plain of equal MACs
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROFILE_STEPS = 3
SAMPLER_STEPS = 8
BUSY = 0.3  # processes that run already, for each core


class Bench:
    """Measures, and keeps what it finds in `report`.

    Args:
        seconds: of measuring, for each comparison.
        twin: makes a plain config cost what another one does; here, because matching belongs to studies.
        dit: a checkout of facebookresearch/DiT, to compare with the official code.

    Raises:
        UserError: the checkout holds no DiT.
    """

    def __init__(self, command: str, device: torch.device, seconds: float, twin: Twin, dit: Path | None = None) -> None:
        self.device, self.seconds, self.twin = device, seconds, twin
        self.report = BenchmarkReport(command, device)
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        if load > BUSY * cores:
            self.report.notes.append(f"a load of {load:.1f} on {cores} cores before the start: others use the machine")
        self.theirs: dict[str, Make] = {"diffusers": diffusers_dit}
        if dit:
            self.theirs["official DiT"] = official_dit(dit)

    def measure_product(self, run: RunConfig) -> None:
        """The best matrix product in the precision of a run: the best of all that were measured, with each model."""
        precision = resolve_precision(run, self.device).train.precision
        speed = best_product(self.device, DTYPES[precision])
        self.report.products[precision] = max(speed, self.report.products.get(precision, 0.0))

    def subject(self, run: RunConfig, make: Make = nested) -> BenchmarkSubject:
        """A model in training."""
        self.measure_product(run)
        return BenchmarkSubject(run, self.device, make)

    def compare(self, subjects: Mapping[str, tuple[RunConfig, Make]], longer: float = 1.0) -> dict[str, Measurements]:
        """Measure subjects in turns, for `longer` times the usual seconds."""
        with enough_memory(subjects, self.device):
            made = {name: self.subject(run, make) for name, (run, make) in subjects.items()}
            found = measure_subjects(made, longer * self.seconds)
        self.report.subjects |= found
        return found

    def add(self, goal: Goal, rounds: tuple[float, ...]) -> None:
        """A ratio, round by round, and what is wanted of it."""
        self.report.ratios.append(Ratio(goal, rounds))

    def parts(self, name: str, run: RunConfig) -> list[dict[str, float]]:
        """Seconds by part, round by round; what is compiled is compiled block by block."""
        self.measure_product(run)
        subject = parted(run, self.device)
        rounds = in_turns({name: partial(part_seconds, subject)}, self.seconds / 2)[name]
        middle = {part: Times(tuple(r.get(part, 0.0) for r in rounds)).seconds for part in rounds[0]}
        self.report.parts[name] = Parts(
            resolve_precision(run, self.device).train.precision,
            middle,
            part_macs(subject),
            profiled(subject, PROFILE_STEPS),
        )
        return rounds

    def sweep(self, name: str, run: RunConfig, axis: str, values: tuple[int, ...]) -> Sweep:
        """Costs along an axis."""
        with enough_memory(values, self.device):
            found = self.report.sweeps[name] = sweep(run, axis, values, self.device, self.seconds / 2)
        return found


def experiments(suite: Suite, bench: Bench) -> Iterator[Experiment]:
    """What the suite measures: a name, and a function that measures it and adds to the report."""
    theirs = " and ".join(bench.theirs)
    yield f"plain DiT beside {theirs}", _bound(_plain, bench, suite)
    if suite.compiled:
        yield f"plain DiT beside {theirs}, compiled", _bound(_compiled, bench, suite.compiled, suite.on_cuda)
    for name in suite.paths:
        yield f"inner and outer path, {name}", _bound(_path, bench, suite, name)
    for name in suite.last:
        yield f"inner last and its twin, {name}", _bound(_last, bench, suite, name)
    yield "reference and as first written", _bound(_reference, bench, suite)
    yield "training loop", _bound(_training, bench, suite)
    yield "sampling", _bound(_sampling, bench, suite)
    for mixer in ("patch", "conv"):
        yield f"growth, mixer {mixer}", _bound(_growth, bench, suite, mixer)
    yield "attention within groups", _bound(_attention, bench, suite)
    for name in suite.rates:
        yield f"rate, {name}", _bound(_rate, bench, suite, name)


def _bound(experiment: Callable[..., object], *given: object) -> Callable[[], None]:
    def run() -> None:
        torch.compiler.reset()  # what was compiled before counts against a limit
        experiment(*given)
        gc.collect()  # models hold themselves in circles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    return run


def _plain(bench: Bench, suite: Suite) -> None:
    subjects = {name: (suite.plain, make) for name, make in {"plain DiT": nested, **bench.theirs}.items()}
    found = bench.compare(subjects)
    for theirs in bench.theirs:
        goal = Goal(f"plain DiT / {theirs}, eager", "training step", 0.95)
        bench.add(goal, found["plain DiT"].step.ratios(found[theirs].step))


def _compiled(bench: Bench, run: RunConfig, on_cuda: bool) -> None:
    eager = override(run, ["train.compile=false"])
    subjects = {f"{name}, compiled": (run, make) for name, make in {"plain DiT": nested, **bench.theirs}.items()}
    subjects |= {f"{theirs}, eager": (eager, make) for theirs, make in bench.theirs.items()}
    found = bench.compare(subjects, 1.5)
    ours = found["plain DiT, compiled"].step
    for theirs in bench.theirs:
        goal = Goal(f"plain DiT / {theirs}, both compiled", "training step", 0.90)
        bench.add(goal, ours.ratios(found[f"{theirs}, compiled"].step))
        goal = Goal(f"plain DiT compiled / {theirs} eager", "training step", 0.75 if on_cuda else None)
        bench.add(goal, ours.ratios(found[f"{theirs}, eager"].step))


def _path(bench: Bench, suite: Suite, name: str) -> None:
    run, limit = suite.paths[name]
    rounds, macs = bench.parts(name, run), bench.report.parts[name].macs
    ratios = tuple(per_mac(seconds, macs, INNER) / per_mac(seconds, macs, OUTER) for seconds in rounds)
    bench.add(Goal(f"inner / outer path, {name}", "time per MAC, forward and backward", limit), ratios)


def _last(bench: Bench, suite: Suite, name: str) -> None:
    run, plain, limit = suite.last[name]
    twin = bench.twin(plain, run)
    found = bench.compare({f"inner last, {name}": (run, nested), f"its plain twin, {name}": (twin, nested)})
    ours, other = found.values()
    how = f"training step; MACs {ours.macs / other.macs:.3f}x"
    bench.add(Goal(f"inner last / plain twin, {name}", how, limit), ours.step.ratios(other.step))


def _reference(bench: Bench, suite: Suite) -> None:
    run = suite.reference
    subjects = {
        "reference": (run, nested),
        "reference, inner recomputed": (override(run, ["train.recompute=inner"]), nested),
        "reference as first written": (run, first_written),
    }
    ours, saving, first = bench.compare(subjects, 2.0).values()
    kept, less = (found.kept / first.kept for found in (ours, saving))
    bench.add(Goal("reference / first written", "training step", 0.90), ours.step.ratios(first.step))
    bench.add(Goal("reference / first written, memory", "bytes kept for backward", 0.95), (kept,))
    goal = Goal("inner recomputed / first written, memory", "bytes kept for backward", 0.50)
    bench.add(goal, (less,))
    goal = Goal("inner recomputed / reference", "training step: the price of that memory", 1.2)
    bench.add(goal, saving.step.ratios(ours.step))


def _training(bench: Bench, suite: Suite) -> None:
    run = suite.sampled
    steps = {"trainer": trainer_step(run, bench.device), "bare": bench.subject(run).step}
    found = in_turns({name: stopwatch(step, bench.device) for name, step in steps.items()}, bench.seconds / 2)
    trainer, bare = (Times(tuple(rounds)) for rounds in found.values())
    bench.add(Goal("trainer's step / bare step", "the former clips, averages and notes norms"), trainer.ratios(bare))


def _sampling(bench: Bench, suite: Suite) -> None:
    run = override(suite.sampled, ["sample.guidance=2", f"sample.steps={SAMPLER_STEPS}"])
    subject = bench.subject(run)
    call, calls = subject.call.eval(), 0
    x, t, y = subject.inputs
    twice = (torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, run.model.num_classes)]))
    predict = guided(call, run.model.num_classes, run.sample)

    def counted(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        return predict(x, t, y)

    def inferring(work: Callable[[], object]) -> Callable[[], float]:
        def inside() -> None:
            with torch.inference_mode(), subject.autocast():
                work()

        return stopwatch(inside, bench.device)

    with torch.inference_mode(), subject.autocast():
        denoise(counted, run.diffusion, run.sample, x, y)
    turns = {
        "guided": inferring(lambda: predict(x, t, y)),
        "twice": inferring(lambda: call(*twice)),
        # As long as the loop: what disturbs a machine now and then falls on long work rather than on short.
        "steps": inferring(lambda: [predict(x, t, y) for _ in range(calls)]),
        "loop": inferring(lambda: denoise(predict, run.diffusion, run.sample, x, y)),
    }
    times = {name: Times(tuple(found)) for name, found in in_turns(turns, bench.seconds).items()}
    goal = Goal("guided step / forward of twice the batch", f"batch {len(x)}, without gradients", 1.02)
    bench.add(goal, times["guided"].ratios(times["twice"]))
    how = f"{run.sample.sampler}, {run.sample.steps} steps, over {calls} guided steps"
    bench.add(Goal("sampling loop / its guided steps", how, 1.03), times["loop"].ratios(times["steps"]))


def _growth(bench: Bench, suite: Suite, mixer: str) -> None:
    run = override(suite.growth, [f"model.inner.mixer={mixer}"])
    for axis, values, what in (("S", suite.sub_patches, "sub-patches"), ("image", suite.images, "image area")):
        found = bench.sweep(f"{what}, mixer {mixer}", run, axis, values)
        goal = Goal(f"inner path against {what}, {mixer}", "exponent of time, forward and backward", 1.05)
        bench.add(goal, found.exponents("inner"))
    goal = Goal(f"whole step against image area, {mixer}", "exponent; outer attention is quadratic")
    bench.add(goal, found.exponents("step"))


def _attention(bench: Bench, suite: Suite) -> None:
    tokens, width, heads = suite.groups
    dtype = torch.bfloat16 if suite.on_cuda else torch.float32
    for length in (4, 16, 64):
        copy, forward, trained = group_times(length, tokens, width, heads, dtype, bench.device, bench.seconds / 6)
        sdpa, trained_sdpa = forward.pop("SDPA"), trained.pop("SDPA")
        for way, times in forward.items():
            wanted = suite.on_cuda and length == 4 and way == "the model's"
            what = f"attention within S={length}, {way}"
            goal = Goal(f"copy bound / {what}", "forward", 0.7 if wanted else None, at_least=True)
            bench.add(goal, copy.ratios(times))
            goal = Goal(f"SDPA / {what}", "forward", 2.0 if wanted else None, at_least=True)
            bench.add(goal, sdpa.ratios(times))
            goal = Goal(f"SDPA / {what}, trained", "forward and backward", None, at_least=True)
            bench.add(goal, trained_sdpa.ratios(trained[way]))


def _rate(bench: Bench, suite: Suite, name: str) -> None:
    run, limit = suite.rates[name]
    (found,) = bench.compare({name: (run, nested)}).values()
    best = bench.report.products[found.precision]
    shares = tuple(FORWARDS_PER_STEP * found.macs * found.batch / seconds / best for seconds in found.step.rounds)
    bench.add(Goal(f"share of the matrix rate, {name}", "training step", limit, at_least=True), shares)


# ------------------------------------------------------------------------------- anything else


def comparison(runs: Mapping[str, RunConfig], beside: Sequence[str], bench: Bench) -> list[Experiment]:
    """Experiments on any configs: each beside its plain twin, as first written and other people's, then its parts.

    Args:
        beside: of plain, first-written, diffusers, official.

    Raises:
        UserError: a config cannot stand beside what is asked for.
    """
    found: list[Experiment] = []
    for name, run in runs.items():
        plain = override(run, ["model.use_inner=false"])
        subjects: dict[str, tuple[RunConfig, Make]] = {name: (run, nested)}
        if "plain" in beside and run.model.blocks("inner"):
            subjects[f"{name}: plain twin"] = bench.twin(plain, run), nested
        if "first-written" in beside:
            check_first_written(run.model)
            subjects[f"{name}: as first written"] = run, first_written
        for whose, make in bench.theirs.items():
            if whose.split()[0] in beside:
                check_theirs(plain.model, whose)
                subjects[f"{name}: {whose}, plain"] = plain, make
        found.append((name, _bound(_beside, bench, subjects)))
        found.append((f"{name}, parts", _bound(bench.parts, name, run)))
    return found


def _beside(bench: Bench, subjects: Mapping[str, tuple[RunConfig, Make]]) -> None:
    found = bench.compare(subjects)
    name, *others = found
    for other in others:
        how = f"training step; MACs {found[name].macs / found[other].macs:.3f}x"
        bench.add(Goal(f"{name} /{other.removeprefix(name + ':')}", how), found[name].step.ratios(found[other].step))


def sweeps(runs: Mapping[str, RunConfig], asked: Mapping[str, tuple[int, ...]], bench: Bench) -> list[Experiment]:
    """Experiments on how cost grows. Raises UserError where a value makes no config."""
    found: list[Experiment] = []
    for name, run in runs.items():
        for axis, values in asked.items():
            configs(run, axis, values)
            found.append((f"{name} over {axis}", _bound(bench.sweep, f"{name} over {axis}", run, axis, values)))
    return found
