"""Training, sampling and feeding as users run them: waits, bits after a stop, samples per second, noise and loaders."""

from __future__ import annotations

import hashlib
import tempfile
import time
import warnings
from collections import Counter, deque
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_in_dit.benchmark.device.cases import Cases, NotHere, Values, compile_by_block
from dit_in_dit.benchmark.device.rates import seconds_of
from dit_in_dit.benchmark.device.steps import bfloat16_run
from dit_in_dit.benchmark.timing import synchronize, trainer_step
from dit_in_dit.config.files import override
from dit_in_dit.config.presets import preset
from dit_in_dit.data.coerce import as_source
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.sampling.numbered import sample_batches
from dit_in_dit.training import batches as feeding
from dit_in_dit.training.loop import train

HEUN_CALLS = 99  # network calls of 50 steps of Heun's method


def measure_waits(cases: Cases) -> None:
    """Three updates of a small model: where the host waits for the device, and milliseconds a step."""
    for compiled in ("false", "true", "graphs"):
        cases.add("emoji", f"compile={compiled}", partial(_waits, compiled, cases.device, cases.tiny), needs=3)


def _waits(compiled: str, device: torch.device, tiny: bool) -> Values:
    if device.type != "cuda" and compiled != "false":
        raise NotHere("needs CUDA")
    sets = [f"train.compile={compiled}", *["train.batch_size=2"] * tiny]
    step = trainer_step(preset("emoji", *sets), device)
    step()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(3):
                step()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    waits = Counter(f"{Path(each.filename).name}:{each.lineno}" for each in seen if "synchron" in str(each.message))
    seconds = seconds_of(step, device)
    says = f"compile={compiled} {1000 * seconds:.2f} ms a step, "
    says += f"{waits.total()} waits in 3" if device.type == "cuda" else "waits not counted"
    where = ", ".join(f"{count} in {place}" for place, count in waits.most_common(5))
    return {"says": says, "why": f"the host waits: {where}", "waits": waits, "ms": 1000 * seconds, "passed": not waits}


def measure_runs(cases: Cases) -> None:
    """A run that stops and resumes against one that does not: log and checkpoint, bit for bit."""
    plan: dict[str, tuple[bool | None, list[str]]] = {  # whether bits are promised by the mode
        "deterministic": (True, []),
        "reduction=fixed": (False, ["train.reduction=fixed"]),
        "deterministic, compiled": (True, ["train.compile=true"]),
        "deterministic, noise=device": (True, ["train.noise=device"]),
        "fast (no promise)": (None, []),
    }
    for name, (mode, sets) in plan.items():
        if cases.tiny and "compiled" in name:
            continue  # the compiler of a CPU takes a minute
        cases.add("stop and resume", name, partial(_resumes, name, mode, sets, cases), needs=3)


def _resumes(name: str, deterministic: bool | None, sets: list[str], cases: Cases) -> Values:
    small = ["train.batch_size=8", "model.outer.width=32", "model.stages=outer inner"] if cases.tiny else []
    every = ["train.sample_every=0", "train.evaluate_every=0", "train.warmup=0", "train.steps=8"]
    config = preset("emoji", "train.checkpoint_every=8", "data.held_out=0", *every, *small, *sets)
    draw = np.random.default_rng(0)
    data = draw.integers(0, 256, (64, 32, 32, 3), np.uint8), np.arange(64) % config.model.num_classes
    how: dict[str, Any] = {"device": cases.name, "data": data, "deterministic": bool(deterministic)}
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder) / "whole", Path(folder) / "parts"
        for run, options in ((whole, {}), (parts, {"until": 4}), (parts, {"resume": True})):
            deque(train(config, run, **how, **options), maxlen=0)
        files = [
            [run / "log.jsonl", *sorted((run / "checkpoints" / "0000008").glob("*.safetensors"))]
            for run in (whole, parts)
        ]
        assert len(files[0]) == 3
        sums = [[hashlib.sha256(file.read_bytes()).hexdigest() for file in some] for some in files]
    different = [file.name for file, one, two in zip(files[0], *sums, strict=True) if one != two]
    says = f"{name} {'equal' if not different else 'different'}"
    passed = not different or deterministic is None
    return {"says": says, "why": f"different: {', '.join(different)}", "passed": passed}


def measure_drawing(cases: Cases) -> None:
    """Guided samples of DiT-XL/2, with noise and scheduler: network calls, and hours for 50,000 samples."""
    plan = (("bfloat16", "compiled"), ("float32", "eager"), ("bfloat16", "eager"), ("float32", "compiled"))
    for precision, way in plan:
        measure = partial(_draws, precision, way, cases)
        cases.add("guided XL/2", f"{precision}, {way}", measure, needs=10 if way == "compiled" else 5)


def _draws(precision: str, way: str, cases: Cases) -> Values:
    size, steps = (2, 2) if cases.tiny else (64, 4)
    sets = ["sample.guidance=1.5", "sample.sampler=euler", f"sample.steps={steps}", f"sample.micro_batch={size}"]
    sets.append(f"sample.precision={precision}")
    run = override(bfloat16_run("dit-xl2", tiny=cases.tiny), sets)
    model = NestedDiT(run.model).to(cases.device).eval().requires_grad_(False)
    if way == "compiled":
        compile_by_block(model, tiny=cases.tiny)

    for _ in range(2):  # the first compiles
        began = time.perf_counter()
        deque(sample_batches(model, run, range(size)), maxlen=0)  # images on the CPU: the device has finished
        per_call = (time.perf_counter() - began) / (size * steps)
    hours = 50_000 * HEUN_CALLS * per_call / 3600
    says = f"{precision}, {way}: {1 / per_call:,.0f} calls/s, {hours:.1f} h"
    return {"says": says, "calls_per_second": 1 / per_call, "hours_50k_heun_50": hours}


def measure_feeding(cases: Cases) -> None:
    """Copies to the device, and whole batches by place of the noise, size of the images and number of workers."""
    side, count = (32, 8) if cases.tiny else (256, 256)
    cases.add("batches", "copies", partial(_copies, (count, 3, side, side), cases.device))
    for noise in ("host", "device"):
        for workers in (0,) if cases.tiny else (8, 0):
            measure = partial(_fed, noise, workers, side, count, cases.device)
            cases.add("batches", f"noise={noise}, {workers} workers", measure, needs=4)


def _copies(shape: tuple[int, ...], device: torch.device) -> Values:
    """Bytes per second from pinned memory."""
    rates = {}
    for name, dtype in (("uint8", torch.uint8), ("float32", torch.float32)):
        source = torch.zeros(shape, dtype=dtype)
        if device.type == "cuda":
            source = source.pin_memory()
        target = torch.empty(shape, dtype=dtype, device=device)
        rates[name] = source.nbytes / seconds_of(partial(target.copy_, source, non_blocking=True), device, 0.2)
    return {"says": ", ".join(f"{name} copies {rate / 1e9:.1f} GB/s" for name, rate in rates.items()), **rates}


def _fed(noise: str, workers: int, side: int, count: int, device: torch.device) -> Values:
    size = min(count, 64)
    sets = [f"model.image_size={side}", "model.patch_size=16", f"train.batch_size={size}", f"data.workers={workers}"]
    config = preset("dit-s16", *sets, *["train.noise=device"] * (noise == "device"))
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    source = as_source((pixels, np.arange(count)), override(config, ["data.held_out=0"]))
    assert not isinstance(source, str)
    number = 3 + (2 if workers == 0 else 2 * workers)
    loader = iter(feeding.load_batches(feeding.Examples(source, config), 0, number, workers, pin=device.type == "cuda"))
    unpack = feeding.Unpacker(config.seed, device)
    try:
        unpack(next(loader))  # the workers have started
        synchronize(device)
        began = time.perf_counter()
        for batch in loader:
            unpack(batch)
        synchronize(device)
        rate = size * (number - 1) / (time.perf_counter() - began)
    finally:
        feeding.end_workers(loader)
    return {"says": f"noise={noise}, {workers} workers {rate:,.0f}/s", "images_per_second": rate}
