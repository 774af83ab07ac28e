"""Training steps of the published sizes: milliseconds, images per second, memory, share of the product rate."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from functools import partial

import torch

from dit_in_dit.benchmark.device.cases import Cases, NotHere, Values, compile_by_block, own_kernels
from dit_in_dit.benchmark.device.rates import seconds_of
from dit_in_dit.benchmark.subjects import BenchmarkSubject, Make, diffusers_dit, nested
from dit_in_dit.benchmark.timing import best_product, peak_bytes
from dit_in_dit.config.files import override
from dit_in_dit.config.presets import preset
from dit_in_dit.config.run import RunConfig
from dit_in_dit.inspection import cost

BATCHES = (256, 128, 64, 32, 16)  # the first whose step fits into the memory
TINY = (
    *("model.image_size=16", "model.patch_size=8", "model.outer.width=32", "model.outer.num_heads=4"),
    *("model.depth=null", "train.batch_size=4"),
)


def measure_pixels(cases: Cases) -> None:
    """DiT-B/16 and its nested model on 256x256 pixels; then XL/16."""
    ways = ("compiled", "eager", "own kernels")
    plan = [(name, way) for way in ways for name in ("dit-b16", "dit-in-dit-b16")]
    plan += [(name, "compiled") for name in ("dit-xl16", "dit-in-dit-xl16")]
    _measure(cases, [*plan, ("dit-in-dit-xl16", "own kernels")])


def measure_latents(cases: Cases) -> None:
    """DiT-XL/2 and the reference arrangement on latents of 256x256 pixels."""
    plan = [(name, way) for way in ("compiled", "eager", "own kernels") for name in ("dit-xl2", "dit-in-dit-xl2")]
    _measure(cases, [*plan, ("dit-in-dit-xl2", "compiled, own kernels")])


def measure_beside(cases: Cases) -> None:
    """DiT-XL/2 beside the same model of diffusers, in one process."""
    makes = {"ours": nested, "diffusers": diffusers_dit}
    for whose, way in (("ours", "compiled"), ("diffusers", "eager"), ("ours", "eager"), ("diffusers", "compiled")):
        step = partial(_step, cases, bfloat16_run("dit-xl2", tiny=cases.tiny), way, makes[whose], f"{whose}, {way}")
        cases.add("dit-xl2", f"{whose}, {way}", step, needs=10 if way == "compiled" else 5)


def bfloat16_run(name: str, *, tiny: bool) -> RunConfig:
    """A published size in bfloat16; tiny: with one block a level."""
    run = preset(name, "train.precision=bfloat16")
    if not tiny:
        return run
    stages = "outer" if "in" not in name.split("-") else "outer inner" if name.endswith("16") else "inner outer"
    inner = ["model.inner.width=32", "model.inner.num_heads=2", "model.inner.sub_patch=4"] if "in" in name else []
    return override(run, [*TINY, f"model.stages={stages}", *inner])


def _measure(cases: Cases, plan: list[tuple[str, str]]) -> None:
    product = best_product(cases.device, torch.bfloat16)
    for name, way in plan:
        step = partial(_step, cases, bfloat16_run(name, tiny=cases.tiny), way, nested, way, product)
        cases.add(name, way, step, needs=10 if "compiled" in way else 4)


def _step(cases: Cases, run: RunConfig, way: str, make: Make, says: str, product: float = 0.0) -> Values:
    """The step of the largest batch that fits; `share` is that of `product` MACs a second."""
    for batch in (4,) if cases.tiny else BATCHES:
        sized = override(run, ["train.compile=false", f"train.batch_size={batch}"])
        try:
            with own_kernels(cases.device) if "own" in way else nullcontext():
                seconds, peak, macs = _timed(cases, BenchmarkSubject(sized, cases.device, make), "compiled" in way)
        except torch.OutOfMemoryError:
            continue  # outside this block, the error and the tensors that it holds are gone
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        rate, share = batch / seconds, product and cost.FORWARDS_PER_STEP * macs * batch / seconds / product
        says += f" {1000 * seconds:.1f} ms/{batch}, {rate:,.0f}/s, {(peak or 0) / 1e9:.0f} GB, {share:.2f}"
        values = {"seconds_per_step": seconds, "batch": batch, "images_per_second": rate, "peak_bytes": peak}
        return {**values, "macs": macs, "share": share, "says": says}
    raise NotHere("not even the smallest batch fits")


def _timed(cases: Cases, subject: BenchmarkSubject, compiled: bool) -> tuple[float, int | None, int]:
    """Seconds of a step, its peak memory, and MACs of a forward pass per image."""
    if compiled:
        compile_by_block(getattr(subject.model, "model", subject.model), tiny=cases.tiny)
    seconds = seconds_of(subject.step, cases.device, 0.1 if cases.tiny else 1.5)
    return seconds, peak_bytes(subject.step, cases.device), subject.macs
