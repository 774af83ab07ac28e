"""The experiments that measure speed: the experiments of a suite, and experiments for any config."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dit_in_dit.benchmark.attention import group_times
from dit_in_dit.benchmark.bench import Bench
from dit_in_dit.benchmark.first_written import check_first_written
from dit_in_dit.benchmark.parts import INNER, OUTER, seconds_per_mac
from dit_in_dit.benchmark.report import Goal
from dit_in_dit.benchmark.subjects import Make, check_other_dit, first_written, nested
from dit_in_dit.benchmark.suite import Suite
from dit_in_dit.benchmark.sweep import sweep_configs
from dit_in_dit.benchmark.timing import Times, interleave, stopwatch, trainer_step
from dit_in_dit.config.files import override
from dit_in_dit.config.run import RunConfig
from dit_in_dit.diffusion.samplers import denoise, guided
from dit_in_dit.inspection.cost import FORWARDS_PER_STEP

Experiment = tuple[str, Callable[[], None]]
SAMPLER_STEPS = 8


def run_experiments(suite: Suite, bench: Bench) -> Iterator[Experiment]:
    """The suite's experiments: for each, its name and a function that measures it and fills the report."""
    others = " and ".join(bench.others)
    yield f"plain DiT beside {others}", _bound(_plain, bench, suite)
    if suite.compiled:
        yield f"plain DiT beside {others}, compiled", _bound(_compiled, bench, suite.compiled, suite.on_cuda)
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


def _bound(experiment: Callable[..., object], *arguments: object) -> Callable[[], None]:
    def run() -> None:
        torch.compiler.reset()  # earlier compilations count towards a limit
        experiment(*arguments)
        gc.collect()  # models are in reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    return run


def _plain(bench: Bench, suite: Suite) -> None:
    subjects = {name: (suite.plain, make) for name, make in {"plain DiT": nested, **bench.others}.items()}
    measured = bench.compare(subjects)
    for other in bench.others:
        goal = Goal(f"plain DiT / {other}, eager", "training step", 0.95)
        bench.add(goal, measured["plain DiT"].step.ratios(measured[other].step))


def _compiled(bench: Bench, run: RunConfig, on_cuda: bool) -> None:
    eager = override(run, ["train.compile=false"])
    subjects = {f"{name}, compiled": (run, make) for name, make in {"plain DiT": nested, **bench.others}.items()}
    subjects |= {f"{other}, eager": (eager, make) for other, make in bench.others.items()}
    measured = bench.compare(subjects, 1.5)
    ours = measured["plain DiT, compiled"].step
    for other in bench.others:
        goal = Goal(f"plain DiT / {other}, both compiled", "training step", 0.90)
        bench.add(goal, ours.ratios(measured[f"{other}, compiled"].step))
        goal = Goal(f"plain DiT compiled / {other} eager", "training step", 0.75 if on_cuda else None)
        bench.add(goal, ours.ratios(measured[f"{other}, eager"].step))


def _path(bench: Bench, suite: Suite, name: str) -> None:
    run, limit = suite.paths[name]
    rounds, macs = bench.parts(name, run), bench.report.parts[name].macs
    ratios = tuple(seconds_per_mac(seconds, macs, INNER) / seconds_per_mac(seconds, macs, OUTER) for seconds in rounds)
    bench.add(Goal(f"inner / outer path, {name}", "time per MAC, forward and backward", limit), ratios)


def _last(bench: Bench, suite: Suite, name: str) -> None:
    run, plain, limit = suite.last[name]
    twin = bench.twin(plain, run)
    subjects = {f"inner last, {name}": (run, nested), f"its plain twin, {name}": (twin, nested)}
    ours, other = bench.compare(subjects).values()
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
    bench.add(Goal("reference / first written", "training step", 0.90), ours.step.ratios(first.step))
    bench.add(
        Goal("reference / first written, memory", "bytes kept for backward", 0.95),
        (ours.kept_bytes / first.kept_bytes,),
    )
    goal = Goal("inner recomputed / first written, memory", "bytes kept for backward", 0.50)
    bench.add(goal, (saving.kept_bytes / first.kept_bytes,))
    goal = Goal("inner recomputed / reference", "training step: the price of that memory", 1.2)
    bench.add(goal, saving.step.ratios(ours.step))


def _training(bench: Bench, suite: Suite) -> None:
    run = suite.sampled
    steps = {"trainer": trainer_step(run, bench.device), "bare": bench.subject(run).step}
    turns = {name: stopwatch(step, bench.device) for name, step in steps.items()}
    trainer, bare = (Times(tuple(rounds)) for rounds in interleave(turns, bench.seconds / 2).values())
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
        # As many calls as the loop makes, because rare disturbances of the machine hit long work more often.
        "steps": inferring(lambda: [predict(x, t, y) for _ in range(calls)]),
        "loop": inferring(lambda: denoise(predict, run.diffusion, run.sample, x, y)),
    }
    times = {name: Times(tuple(rounds)) for name, rounds in interleave(turns, bench.seconds).items()}
    goal = Goal("guided step / forward of twice the batch", f"batch {len(x)}, without gradients", 1.02)
    bench.add(goal, times["guided"].ratios(times["twice"]))
    how = f"{run.sample.sampler}, {run.sample.steps} steps, over {calls} guided steps"
    bench.add(Goal("sampling loop / its guided steps", how, 1.03), times["loop"].ratios(times["steps"]))


def _growth(bench: Bench, suite: Suite, mixer: str) -> None:
    run = override(suite.growth, [f"model.inner.mixer={mixer}"])
    for axis, values, what in (("S", suite.sub_patches, "sub-patches"), ("image", suite.images, "image area")):
        costs = bench.sweep(f"{what}, mixer {mixer}", run, axis, values)
        goal = Goal(f"inner path against {what}, {mixer}", "exponent of time, forward and backward", 1.05)
        bench.add(goal, costs.exponents("inner"))
    goal = Goal(f"whole step against image area, {mixer}", "exponent; outer attention is quadratic")
    bench.add(goal, costs.exponents("step"))


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
    (measured,) = bench.compare({name: (run, nested)}).values()
    macs, best = FORWARDS_PER_STEP * measured.macs * measured.batch, bench.report.products[measured.precision]
    shares = tuple(macs / seconds / best for seconds in measured.step.rounds)
    bench.add(Goal(f"share of the matrix rate, {name}", "training step", limit, at_least=True), shares)


def comparison(runs: Mapping[str, RunConfig], beside: Sequence[str], bench: Bench) -> list[Experiment]:
    """Experiments for any configs: compare each config with the models of `beside`, then measure it part by part.

    Args:
        beside: names of models to compare with: plain (the plain twin), first-written, diffusers, official.

    Raises:
        UserError: a config cannot be compared with a model of `beside`.
    """
    todo: list[Experiment] = []
    for name, run in runs.items():
        plain = override(run, ["model.use_inner=false"])
        subjects: dict[str, tuple[RunConfig, Make]] = {name: (run, nested)}
        if "plain" in beside and run.model.blocks("inner"):
            subjects[f"{name}: plain twin"] = bench.twin(plain, run), nested
        if "first-written" in beside:
            check_first_written(run.model)
            subjects[f"{name}: as first written"] = run, first_written
        for whose, make in bench.others.items():
            if whose.split()[0] in beside:
                check_other_dit(plain.model, whose)
                subjects[f"{name}: {whose}, plain"] = plain, make
        todo.append((name, _bound(_beside, bench, subjects)))
        todo.append((f"{name}, parts", _bound(bench.parts, name, run)))
    return todo


def _beside(bench: Bench, subjects: Mapping[str, tuple[RunConfig, Make]]) -> None:
    measured = bench.compare(subjects)
    name, *others = measured
    for other in others:
        how = f"training step; MACs {measured[name].macs / measured[other].macs:.3f}x"
        goal = Goal(f"{name} /{other.removeprefix(name + ':')}", how)
        bench.add(goal, measured[name].step.ratios(measured[other].step))


def run_sweeps(runs: Mapping[str, RunConfig], asked: Mapping[str, tuple[int, ...]], bench: Bench) -> list[Experiment]:
    """Experiments on the growth of costs along axes; UserError if a value gives no valid config."""
    todo: list[Experiment] = []
    for name, run in runs.items():
        for axis, values in asked.items():
            sweep_configs(run, axis, values)
            todo.append((f"{name} over {axis}", _bound(bench.sweep, f"{name} over {axis}", run, axis, values)))
    return todo
