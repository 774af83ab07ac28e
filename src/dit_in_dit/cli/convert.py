"""`import` and `export`: published weights as runs, and runs in formats of other libraries."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from dit_in_dit.cli.options import Commands, add_average, chosen_average, whole_number
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.program import format_stages
from dit_in_dit.runs.folder import read_config
from dit_in_dit.runs.pretrained import find_run

FORMATS = ("official", "diffusers", "diffusers-dit", "pipeline", "run", "onnx", "web")
PRECISIONS = ("float32", "bfloat16", "float16")


def add(commands: Commands) -> None:
    """Add the commands."""
    take = commands.add("import", _import, "make a run from published weights: of official code, or of diffusers' DiT")
    about = "a checkpoint of a model in docs/field.md, a diffusers folder, or USER/NAME[@REVISION] of the Hub"
    take.add_argument("source", type=Path, metavar="FILE", help=about)
    take.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder")
    take.add_argument(
        "--kind",
        choices=("dit", "sit", "repa"),
        help="dit, sit and repa files look the same (default: from the file's args or name, otherwise dit)",
    )
    take.add_argument("--num-heads", type=whole_number, help="attention heads, if the size is not a published one")
    take.add_argument(
        "--num-classes",
        type=lambda text: 0 if text == "0" else whole_number(text),
        help="number of classes, if the file does not hold it; a label table with this many rows has no null class; "
        "0: the only row is the null class",
    )
    take.add_argument("--average", metavar="KEY", help="averaged weights, if there are several (default: model_ema1)")
    size = "size of images, if the weights do not show it"
    take.add_argument("--image-size", type=whole_number, nargs=2, metavar=("HEIGHT", "WIDTH"), help=size)
    take.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the run; repeatable")

    give = commands.add("export", _export, "write a run's weights in another format")
    give.add_argument("run_folder", type=find_run, metavar="RUN")
    give.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="official: a .pt file with the names of the official code; diffusers-dit: a folder of "
        "DiTTransformer2DModel (for plain DiT with path ddpm); "
        "pipeline: a folder for DiffusionPipeline.from_pretrained, for any run; diffusers: diffusers-dit if it "
        "computes the run's outputs, else pipeline; run: an inference-only copy, averaged weights in half the bytes; "
        "onnx: the network alone, a file for onnxruntime; web: a page that samples in the browser, a folder for any "
        "static server",
    )
    give.add_argument("--out", type=Path, help="the file or folder")
    give.add_argument("--push", metavar="USER/NAME", help="upload the folder to the Hugging Face Hub")
    give.add_argument("--private", action="store_true", help="--push: create a private repository")
    give.add_argument("--raw", action="store_true", help="use trained weights instead of averaged weights")
    add_average(give)
    give.add_argument("--vae", help="pipeline: the VAE of a run on latents, a folder or a hub id")
    give.add_argument(
        "--licence", default="unknown", help="pipeline, run, web: licence of the weights, by the hub's name"
    )
    give.add_argument("--precision", choices=PRECISIONS, default="float16", help="run, web: precision of the weights")
    give.add_argument("--runtime", type=Path, metavar="DIR", help="web: folder of the npm package onnxruntime-web")
    give.add_argument("--beside", type=find_run, metavar="RUN2", help="web: a second run, from the same noise")


def _import(options: argparse.Namespace) -> None:
    from dit_in_dit.interop import official
    from dit_in_dit.interop.import_run import import_run

    config = import_run(
        options.source,
        options.out,
        kind=options.kind,
        heads=options.num_heads,
        classes=options.num_classes,
        size=options.image_size and tuple(options.image_size),
        average=options.average,
        settings=options.set,
    )
    model = config.model
    kind = official.kind_of(model)
    name = official.title(kind) if kind else "nested DiT" if model.blocks("inner") else "DiT"
    size = "x".join(map(str, (*model.image_size, model.channels)))
    print(
        f"{name} of {size}, p={model.patch_size}, D={model.outer.width}, {model.outer.num_heads} heads, "
        f"{format_stages(model.program)}, {model.num_classes} classes, "
        f"variance {'learned' if model.learn_variance else 'not learned'}: in {options.out}"
    )


def _export(options: argparse.Namespace) -> None:
    from dit_in_dit.interop import hub, import_run

    run, notes = options.run_folder, list[str]()
    averaged = chosen_average(options, read_config(run))
    equal = options.format == "diffusers" and import_run.fits_diffusers(run, exactly=True)
    if not (options.out or options.push):
        raise UserError("name what to write: --out PATH, --push USER/NAME, or both")
    if options.push and options.format == "web":
        raise UserError("--push makes a repository of a model: give --out, and upload the folder as a static Space")
    if options.format != "web" and (options.runtime or options.beside):
        raise UserError(f"--runtime and --beside are of --format web: leave them out with --format {options.format}")
    if options.push and options.format in ("official", "onnx"):
        raise UserError(f"--push uploads a folder, not a file: leave out --format {options.format}")
    with TemporaryDirectory() as place:
        out = options.out or Path(place, options.push.rpartition("/")[2])
        if options.format == "official":
            notes = import_run.export_official(run, out, averaged=averaged)
        elif options.format == "diffusers-dit" or equal:
            notes = import_run.export_diffusers(run, out, averaged=averaged)
        elif options.format == "run":
            if options.raw:
                raise UserError("--format run holds averaged weights: leave out --raw")
            from dit_in_dit.interop.release import export_release

            export_release(run, out, options.precision, averaged=averaged, licence=options.licence, name=options.push)
        elif options.format == "onnx":
            from dit_in_dit.interop.export_pipeline import export_onnx

            export_onnx(run, out, averaged=averaged)
        elif options.format == "web":
            notes = [_export_web(options, out, averaged)]
        else:
            from dit_in_dit.interop.export_pipeline import export

            export(run, out, averaged=averaged, vae=options.vae, licence=options.licence)
        url = hub.push_folder(out, options.push, private=options.private) if options.push else out
    for note in notes:
        print(f"note: {note}")
    print(f"{run} as {url}")


def _export_web(options: argparse.Namespace, out: Path, averaged: bool | str) -> str:
    """Write the page; returns a line about its size."""
    from dit_in_dit.interop.export_web import export_web

    if options.precision == "bfloat16":
        raise UserError("--format web has weights in float16 or float32: choose one of them")
    half, runs = options.precision == "float16", [options.run_folder, *filter(None, [options.beside])]
    size = export_web(runs, out, options.runtime, averaged=averaged, half=half, licence=options.licence)
    return f"{size / 1e6:.1f} MB; `python -m http.server --directory {out}` shows the page"
