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
from dit_in_dit.benchmark.subjects import Make, check_other_dit, first_written, nested
from dit_in_dit.benchmark.suite import Suite
from dit_in_dit.benchmark.sweep import sweep_configs
from dit_in_dit.benchmark.timing import time_alternately, trainer_step
from dit_in_dit.config.files import override
from dit_in_dit.config.run import RunConfig
from dit_in_dit.diffusion.samplers import denoise, guided

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
        ratios = measured["plain DiT"].step.ratios(measured[other].step)
        bench.add(f"plain DiT / {other}, eager", "training step", ratios, 0.95)


def _compiled(bench: Bench, run: RunConfig, on_cuda: bool) -> None:
    eager = override(run, ["train.compile=false"])
    subjects = {f"{name}, compiled": (run, make) for name, make in {"plain DiT": nested, **bench.others}.items()}
    subjects |= {f"{other}, eager": (eager, make) for other, make in bench.others.items()}
    measured = bench.compare(subjects, 1.5)
    ours = measured["plain DiT, compiled"].step
    for other in bench.others:
        compiled, uncompiled = (ours.ratios(measured[f"{other}, {how}"].step) for how in ("compiled", "eager"))
        bench.add(f"plain DiT / {other}, both compiled", "training step", compiled, 0.90)
        bench.add(f"plain DiT compiled / {other} eager", "training step", uncompiled, 0.75 if on_cuda else None)


def _path(bench: Bench, suite: Suite, name: str) -> None:
    run, limit = suite.paths[name]
    rounds, macs = bench.parts(name, run), bench.report.parts[name].macs
    ratios = tuple(seconds_per_mac(seconds, macs, INNER) / seconds_per_mac(seconds, macs, OUTER) for seconds in rounds)
    bench.add(f"inner / outer path, {name}", "time per MAC, forward and backward", ratios, limit)


def _last(bench: Bench, suite: Suite, name: str) -> None:
    run, plain, limit = suite.last[name]
    twin = bench.twin(plain, run)
    subjects = {f"inner last, {name}": (run, nested), f"its plain twin, {name}": (twin, nested)}
    ours, other = bench.compare(subjects).values()
    how = f"training step; MACs {ours.macs / other.macs:.3f}x"
    bench.add(f"inner last / plain twin, {name}", how, ours.step.ratios(other.step), limit)


def _reference(bench: Bench, suite: Suite) -> None:
    run = suite.reference
    subjects = {
        "reference": (run, nested),
        "reference, inner recomputed": (override(run, ["train.recompute=inner"]), nested),
        "reference as first written": (run, first_written),
    }
    ours, saving, first = bench.compare(subjects, 2.0).values()
    bench.add("reference / first written", "training step", ours.step.ratios(first.step), 0.90)
    for name, one, limit in (("reference", ours, 0.95), ("inner recomputed", saving, 0.50)):
        kept = (one.kept_bytes / first.kept_bytes,)
        bench.add(f"{name} / first written, memory", "bytes kept for backward", kept, limit)
    price = saving.step.ratios(ours.step)
    bench.add("inner recomputed / reference", "training step: the price of that memory", price, 1.2)


def _training(bench: Bench, suite: Suite) -> None:
    run = suite.sampled
    steps = {"trainer": trainer_step(run, bench.device), "bare": bench.subject(run).step}
    trainer, bare = time_alternately(steps, bench.device, bench.seconds / 2).values()
    bench.add("trainer's step / bare step", "the former clips, averages and notes norms", trainer.ratios(bare))


def _sampling(bench: Bench, suite: Suite) -> None:
    run = override(suite.sampled, ["sample.guidance=2", f"sample.steps={SAMPLER_STEPS}"])
    subject = bench.subject(run)
    call, calls = subject.model.eval(), 0
    x, t, y = subject.inputs
    twice = (torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, run.model.num_classes)]))
    predict = guided(call, run.model.num_classes, run.sample)

    def counted(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        return predict(x, t, y)

    def inferring(work: Callable[[], object]) -> Callable[[], object]:
        return torch.inference_mode()(subject.autocast()(work))

    inferring(lambda: denoise(counted, run.diffusion, run.sample, x, y))()
    work = {
        "guided": inferring(lambda: predict(x, t, y)),
        "twice": inferring(lambda: call(*twice)),
        # As many calls as the loop makes, because rare disturbances of the machine hit long work more often.
        "steps": inferring(lambda: [predict(x, t, y) for _ in range(calls)]),
        "loop": inferring(lambda: denoise(predict, run.diffusion, run.sample, x, y)),
    }
    times = time_alternately(work, bench.device, bench.seconds)
    guided_step, loop = times["guided"].ratios(times["twice"]), times["loop"].ratios(times["steps"])
    bench.add("guided step / forward of twice the batch", f"batch {len(x)}, without gradients", guided_step, 1.02)
    how = f"{run.sample.sampler}, {run.sample.steps} steps, over {calls} guided steps"
    bench.add("sampling loop / its guided steps", how, loop, 1.03)


def _growth(bench: Bench, suite: Suite, mixer: str) -> None:
    run = override(suite.growth, [f"model.inner.mixer={mixer}"])
    for axis, values, what in (("S", suite.sub_patches, "sub-patches"), ("image", suite.images, "image area")):
        costs = bench.sweep(f"{what}, mixer {mixer}", run, axis, values)
        exponents, how = costs.exponents("inner"), "exponent of time, forward and backward"
        bench.add(f"inner path against {what}, {mixer}", how, exponents, 1.05)
    how = "exponent; outer attention is quadratic"
    bench.add(f"whole step against image area, {mixer}", how, costs.exponents("step"))


def _attention(bench: Bench, suite: Suite) -> None:
    tokens, width, heads = suite.groups
    dtype = torch.bfloat16 if suite.on_cuda else torch.float32
    for length in (4, 16, 64):
        copy, forward, trained = group_times(length, tokens, width, heads, dtype, bench.device, bench.seconds / 6)
        sdpa, trained_sdpa = forward.pop("SDPA"), trained.pop("SDPA")
        for way, times in forward.items():
            wanted = suite.on_cuda and length == 4 and way == "the model's"
            what = f"attention within S={length}, {way}"
            bench.add(f"copy bound / {what}", "forward", copy.ratios(times), 0.7 if wanted else None, at_least=True)
            bench.add(f"SDPA / {what}", "forward", sdpa.ratios(times), 2.0 if wanted else None, at_least=True)
            ratios = trained_sdpa.ratios(trained[way])
            bench.add(f"SDPA / {what}, trained", "forward and backward", ratios, at_least=True)


def _rate(bench: Bench, suite: Suite, name: str) -> None:
    run, limit = suite.rates[name]
    (measured,) = bench.compare({name: (run, nested)}).values()
    macs, best = measured.step_macs * measured.batch, bench.report.products[measured.precision]
    shares = tuple(macs / seconds / best for seconds in measured.step.rounds)
    bench.add(f"share of the matrix rate, {name}", "training step", shares, limit, at_least=True)


def comparison(runs: Mapping[str, RunConfig], beside: Sequence[str], bench: Bench) -> Iterator[Experiment]:
    """Experiments for any configs: compare each config with the models of `beside`, then measure it part by part.

    `beside` names plain (the plain twin), first-written, diffusers, official. UserError if a config cannot be compared.
    """
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
        yield name, _bound(_beside, bench, subjects)
        yield f"{name}, parts", _bound(bench.parts, name, run)


def _beside(bench: Bench, subjects: Mapping[str, tuple[RunConfig, Make]]) -> None:
    measured = bench.compare(subjects)
    name, *others = measured
    for other in others:
        how = f"training step; MACs {measured[name].macs / measured[other].macs:.3f}x"
        ratios = measured[name].step.ratios(measured[other].step)
        bench.add(f"{name} /{other.removeprefix(name + ':')}", how, ratios)


def run_sweeps(
    runs: Mapping[str, RunConfig], asked: Mapping[str, tuple[int, ...]], bench: Bench
) -> Iterator[Experiment]:
    """Experiments on the growth of costs along axes; UserError if a value gives no valid config."""
    for name, run in runs.items():
        for axis, values in asked.items():
            sweep_configs(run, axis, values)  # checks the values
            yield f"{name} over {axis}", _bound(bench.sweep, f"{name} over {axis}", run, axis, values)
