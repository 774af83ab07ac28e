"""Export of runs as a static web page that samples in the browser, by ONNX and onnxruntime-web."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.samplers import check_sampler
from dit_in_dit.config.strict_json import has_form, read_json
from dit_in_dit.diffusion.sampler_table import sampler_table
from dit_in_dit.inspection import cost
from dit_in_dit.interop.export_pipeline import onnx_program
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs import atomic
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.runtime.seeding import PURPOSES

PAGE = ("index.html", "page.js", "worker.js", "sampler.js", "noise.js")
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")  # of the npm package; no more is loaded
NOTICE = "LICENSE-onnxruntime-web.txt"
INSTALL = "run `npm install onnxruntime-web`, then give --runtime node_modules/onnxruntime-web"
STEPS = (5, 10, 20, 25, 50)  # offered beside the run's own number
SMALL = 256  # elements; smaller tensors keep float32, as a cast would cost more than it saves


def export_web(
    runs: Sequence[Path],
    out: Path,
    runtime: Path | None,
    *,
    averaged: bool | str = True,
    half: bool = True,
    licence: str = "unknown",
) -> int:
    """Write a folder for any static server: a page, the runs' networks and onnxruntime-web. Returns its bytes.

    Args:
        runs: one run, or two that are shown beside each other, from the same noise.
        runtime: folder of the npm package onnxruntime-web, whose files are copied.
        averaged: the averaged weights; false: the trained ones; a name: that average (config.averages).
        half: store large weights in float16; the browser computes in float32.
        licence: the Hub's name of the weights' licence.

    Raises:
        UserError: the npm package is missing, `out` exists, a run cannot be sampled in a browser, or two runs do not
            fit together.
    """
    atomic.check_free(out)
    package = _check_runtime(runtime)
    opened = [Checkpoint.open(run) for run in runs]
    _check_pair(runs, opened)
    models = [_model(run, saved) for run, saved in zip(runs, opened, strict=True)]
    with atomic.folder(out) as beside:
        for number, (run, saved) in enumerate(zip(runs, opened, strict=True)):
            net = saved.model(torch.device("cpu"), averaged=averaged)
            if half:
                _round_weights(net)
            program = onnx_program(net, str(run))
            if half:
                _store_halves(program)
            models[number]["file"] = f"model-{number}.onnx"
            (beside / f"model-{number}.onnx").write_bytes(program.SerializeToString())
        (beside / "models.json").write_text(json.dumps({"purpose": PURPOSES["sample"], "models": models}))
        for name in PAGE:
            (beside / name).write_text((files("dit_in_dit.interop") / "web" / name).read_text(encoding="utf-8"))
        for name in RUNTIME:
            shutil.copyfile(package / "dist" / name, beside / name)
        _write_notices(package, beside, out.resolve().name, licence)
        return sum(path.stat().st_size for path in beside.iterdir())


def _check_runtime(runtime: Path | None) -> Path:
    """The npm package's folder; UserError if it is missing or lacks a file."""
    if runtime is None:
        raise UserError(f"--format web needs the npm package onnxruntime-web: {INSTALL}")
    missing = [f"dist/{name}" for name in RUNTIME if not (runtime / "dist" / name).is_file()]
    if missing or not (runtime / "package.json").is_file():
        name = missing[0] if missing else "package.json"
        raise UserError(f"--runtime {truncate(runtime)} has no {name}: {INSTALL}")
    return runtime


def _check_pair(runs: Sequence[Path], opened: Sequence[Checkpoint]) -> None:
    """UserError if two runs cannot start from the same noise and class."""
    first, *others = opened
    for run, other in zip(runs[1:], others, strict=True):
        if other.config.model.image_shape != first.config.model.image_shape or other.classes != first.classes:
            raise UserError(
                f"--beside {truncate(run)} must have the image size, channels and classes of {truncate(runs[0])}: "
                "give a run of the same data"
            )


def _model(run: Path, saved: Checkpoint) -> dict[str, Any]:
    """What the page must know of a run: shapes, classes, defaults of sampling, and the sampler's tables."""
    config, how = saved.config, saved.config.sample
    model = config.model
    if model.channels not in (1, 3):
        raise UserError(f"--format web needs a run on images: {truncate(run)} has {model.channels} channels of latents")
    if how.internal_guidance != 1:
        raise UserError(f"--format web has no internal guidance: set sample.internal_guidance=1 in {truncate(run)}")
    parameters, macs = (count(model)["total"] for count in (cost.parameters, cost.macs))
    guidable = model.num_classes > 0 and config.train.label_drop > 0
    return {
        "name": run.resolve().name,
        "about": f"{parameters / 1e6:.2f} M parameters, {macs / 1e6:.1f} M MACs per image and network call",
        "shape": model.image_shape,
        "classes": saved.classes[: model.num_classes],
        "null": model.num_classes if guidable else None,
        "sampler": how.sampler,
        "steps": how.steps,
        "guidance": how.guidance,
        "guidance_channels": how.guidance_channels or model.channels,
        "interval": how.interval,
        "tables": _tables(config),
    }


def _tables(config: RunConfig) -> dict[int, dict[str, Any]]:
    """The sampler's tables by number of steps; UserError if the sampler has none for the run's own number."""
    tables, how = {}, config.sample
    for steps in sorted({*STEPS, how.steps}):
        try:
            check_sampler(config.diffusion.path, how.sampler, steps)
        except UserError:
            if steps == how.steps:
                raise
            continue  # offered numbers only: this path does not support it
        tables[steps] = sampler_table(config.diffusion, how, steps)._asdict()
    return tables


@torch.no_grad()
def _round_weights(net: NestedDiT) -> None:
    """Round the weights to float16, in float32 tensors; UserError if one is too large."""
    for name, weight in net.named_parameters():
        rounded = weight.half()
        if not rounded.isfinite().all():
            raise UserError(f"{name} has a value too large for float16: use --precision float32")
        weight.copy_(rounded)


def _store_halves(program: Any) -> None:
    """Store tensors that float16 holds exactly in float16, each with a cast to float32 before its uses.

    Computed tables, such as positions, are not exact and keep float32.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph, casts = program.graph, []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < SMALL:
            continue
        values, name = numpy_helper.to_array(tensor), tensor.name
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if np.array_equal(halves.astype(np.float32), values):
            tensor.CopyFrom(numpy_helper.from_array(halves, f"{name}.half"))
            casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _write_notices(package: Path, out: Path, title: str, licence: str) -> None:
    """The licence of onnxruntime-web beside its files, and a README that the Hub shows for a static Space."""
    about = read_json(package / "package.json")
    if not has_form(about, {"license": str, "version": str}) or about["license"] != "MIT":
        raise UserError(f"{truncate(package)}/package.json does not say that onnxruntime-web is under MIT: {INSTALL}")
    own = next((package / name for name in ("LICENSE", "LICENSE.txt") if (package / name).is_file()), None)
    text = own.read_text(encoding="utf-8") if own else (files("dit_in_dit.interop") / "web" / NOTICE).read_text()
    (out / NOTICE).write_text(f"{', '.join(RUNTIME)}: onnxruntime-web {about['version']}\n\n{text}")
    (out / "README.md").write_text(
        f"---\ntitle: {json.dumps(title)}\nsdk: static\nlicense: {json.dumps(licence)}\n---\n\n"
        "A diffusion transformer that samples in the browser. Any static server shows this folder:\n"
        "`python -m http.server`, then open the address that it prints.\n\n"
        f"onnxruntime-web is under the MIT licence ({NOTICE}); the page is under Apache-2.0.\n"
    )
