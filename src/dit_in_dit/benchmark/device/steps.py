"""Training steps of the published sizes: milliseconds, images per second, memory, share of the product rate."""

from __future__ import annotations

import gc
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from dit_in_dit.benchmark.device.cases import Cases, NotHere, Values, compile_by_block, configured, own_kernels
from dit_in_dit.benchmark.device.rates import seconds_of
from dit_in_dit.benchmark.subjects import BenchmarkSubject, Make, diffusers_dit, nested
from dit_in_dit.benchmark.timing import best_product, peak_bytes, synchronize
from dit_in_dit.config.files import override
from dit_in_dit.config.run import RunConfig
from dit_in_dit.inspection import cost

BATCHES = (256, 128, 64, 32, 16)  # the first whose step fits into the memory
WAYS = {  # compiled, own kernels
    "eager": (False, False),
    "own kernels": (False, True),
    "compiled": (True, False),
    "compiled, own kernels": (True, True),
}
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
    """DiT-XL/2 beside the same model of diffusers, in one process and of one batch."""
    run = bfloat16_run("dit-xl2", tiny=cases.tiny)
    batches = (4,) if cases.tiny else BATCHES[1:]
    makes = {"ours": nested, "diffusers": diffusers_dit}
    for whose, way in (("ours", "compiled"), ("diffusers", "eager"), ("ours", "eager"), ("diffusers", "compiled")):
        measure = partial(_step, run, cases.device, way, batches, cases.tiny, makes[whose], 0.0, f"{whose}, ")
        cases.add("dit-xl2", f"{whose}, {way}", measure, needs=10 if way == "compiled" else 5)


def bfloat16_run(name: str, *, tiny: bool) -> RunConfig:
    """A published size in bfloat16; tiny: with one block a level."""
    run = configured(name, "train.precision=bfloat16")
    if not tiny:
        return run
    stages = "outer" if "in" not in name.split("-") else "outer inner" if name.endswith("16") else "inner outer"
    inner = ["model.inner.width=32", "model.inner.num_heads=2", "model.inner.sub_patch=4"] if "in" in name else []
    return override(run, [*TINY, f"model.stages={stages}", *inner])


def _measure(cases: Cases, plan: list[tuple[str, str]]) -> None:
    product = best_product(cases.device, torch.bfloat16)
    for name, way in plan:
        run, batches = bfloat16_run(name, tiny=cases.tiny), (4,) if cases.tiny else BATCHES
        measure = partial(_step, run, cases.device, way, batches, cases.tiny, nested, product)
        cases.add(name, way, measure, needs=10 if "compiled" in way else 4)


def _step(
    run: RunConfig,
    device: torch.device,
    way: str,
    batches: tuple[int, ...],
    tiny: bool,
    make: Make,
    product: float = 0.0,
    whose: str = "",
) -> Values:
    """The step of the largest batch that fits."""
    for batch in batches:
        try:
            return _timed(override(run, [f"train.batch_size={batch}"]), device, way, tiny, make, product, whose)
        except torch.OutOfMemoryError:
            pass  # outside this block, the error and the tensors that it holds are gone
        gc.collect()
        torch.cuda.empty_cache()
    raise NotHere(f"not even a batch of {batches[-1]} fits")


def _timed(
    run: RunConfig, device: torch.device, way: str, tiny: bool, make: Make, product: float, whose: str
) -> Values:
    compiled, own = WAYS[way]
    with own_kernels(device) if own else nullcontext():
        subject = BenchmarkSubject(override(run, ["train.compile=false"]), device, make)
        if compiled:
            compile_by_block(getattr(subject.model, "model", subject.model), tiny=tiny)
        began = time.perf_counter()
        subject.step()
        synchronize(device)
        first = time.perf_counter() - began
        seconds = seconds_of(subject.step, device, 0.1 if tiny else 1.5)
        memory = peak_bytes(subject.step, device)
    batch = run.train.batch_size
    flops = 2 * cost.FORWARDS_PER_STEP * subject.macs * batch / seconds
    values: dict[str, Any] = {
        "seconds_per_step": seconds,
        "batch": batch,
        "images_per_second": batch / seconds,
        "first_step": first,
    }
    values |= {"peak_bytes": memory, "macs": subject.macs, "flops": flops, "precision": run.train.precision}
    says = f"{whose}{way} {1000 * seconds:.1f} ms/{batch}, {batch / seconds:,.0f}/s, {(memory or 0) / 1e9:.0f} GB"
    if product:
        values["share"] = flops / 2 / product
        says += f", share {values['share']:.2f}"
    return {**values, "says": says}
