"""The contract of a refactor: one SHA-256 for everything that users and old files rely on.

    python scripts/contract.py --record contract.json      before
    python scripts/contract.py --compare contract.json     after: prints what differs, exit code 1 where anything does

Names go through the command line and the public API alone, so that the script runs before and after any move. Sums
depend on the processor and on the versions of libraries: both tables are made on one machine, with one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import inspect
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import dit_in_dit
from dit_in_dit.cli import main

ROOT = Path(__file__).parents[1]
Table = Iterator[tuple[str, str]]

MODEL = (
    "model.image_size=16 model.patch_size=4 model.num_classes=9 model.outer.width=32 model.outer.num_heads=4 "
    "model.inner.sub_patch=2 model.inner.width=16 model.inner.num_heads=2"
)
TRAIN = (
    "seed=20 data.flip=true train.steps=20 train.batch_size=4 train.accumulate=2 train.learning_rate=3e-3 "
    "train.warmup=5 train.schedule=cosine train.weight_decay=0.01 train.precision=float32 train.ema=0.9 "
    "train.evaluate_every=10 train.sample_every=10 train.checkpoint_every=10 sample.steps=4 sample.guidance=2"
)
GOLDEN = (
    "data.source=mosaic model.stages='inner outer inner' model.inner.fuse=gate diffusion.predict=image "
    "diffusion.weight=velocity diffusion.time=logit_normal diffusion.time_mean=0.4"
)
DDPM = (
    "data.source=mosaic model.stages='inner*2 outer*2' diffusion.path=ddpm diffusion.predict=noise "
    "model.learn_variance=true sample.sampler=ddpm"
)
RICH = (
    "data.source=mosaic model.stages='outer inner outer inner' model.inner.spread=interpolate model.inner.embed=conv "
    "model.inner.mixer=conv model.inner.condition=patch model.inner.aggregate=attention model.qk_norm=true"
)
LATENTS = "model.image_size=8 model.channels=4 model.stages='outer*2 inner*2' data.source=latents data.vae=vae"
FIXED = GOLDEN + " train.reduction=fixed"
SHARDED = GOLDEN + " train.parallel=fsdp"
SAMPLERS = {"golden": ("euler", "heun", "ddim", "dpm++", "unipc"), "ddpm": ("ddpm", "ddim", "dpm++", "unipc")}


def digest(*parts: bytes | str) -> str:
    """SHA-256 of parts, in hexadecimal digits."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.encode() if isinstance(part, str) else part)
    return whole.hexdigest()


def run(*arguments: str) -> str:
    """What a command prints; RuntimeError where its exit code is above 1."""
    out, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        try:
            code = main(list(arguments))
        except SystemExit as end:
            code = end.code
    if code not in (0, 1, None):
        raise RuntimeError(f"{' '.join(arguments)}: exit code {code}\n{out.getvalue()}{said.getvalue()}")
    return out.getvalue()


def settings(text: str) -> list[str]:
    """`--set` for each KEY=VALUE of a text; a value in quotes may hold spaces."""
    pairs = re.findall(r"([\w.]+)=('[^']*'|\S+)", text)
    keys = [word for name, value in pairs for word in ("--set", f"{name}={value.strip(chr(39))}")]
    return ["--config", "base.yaml", *keys]


def tensors(path: Path) -> str:
    """Names, shapes, types and bytes of the tensors of a file."""
    parts: list[bytes | str] = []
    for name, tensor in sorted(load_file(path).items()):
        parts += [name, str(tensor.dtype), str(tuple(tensor.shape))]
        parts.append(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest(*parts)


def pickled(path: Path) -> str:
    """The same of a file of torch.save: tensors in dictionaries, one in another or not."""
    parts: list[bytes | str] = []

    def walk(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value):
                walk(f"{name}/{key}", value[key])
        elif isinstance(value, torch.Tensor):
            parts.extend([name, str(value.dtype), str(tuple(value.shape)), value.numpy().tobytes()])

    walk("", torch.load(path, weights_only=True))
    if not parts:
        raise RuntimeError(f"{path} holds no tensor")
    return digest(*parts)


def shape_of(value: Any) -> Any:
    """A JSON value with types in place of values: what a format promises of its keys."""
    if isinstance(value, dict):
        return {name: shape_of(inner) for name, inner in value.items()}
    return [shape_of(inner) for inner in value[:1]] if isinstance(value, list) else type(value).__name__


def json_form(path: Path) -> str:
    return digest(json.dumps(shape_of(json.loads(path.read_text())), sort_keys=True))


def of_folder(name: str, folder: Path) -> Table:
    """What a folder holds: names of files, tensors, pixels, JSON. Code files carry a hash of their text in their
    names, which stands as HASH here."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    names = [re.sub(r"[0-9a-f]{8,}", "HASH", str(path.relative_to(folder))) for path in files]
    yield f"{name}: files", digest("\n".join(sorted(names)))
    for path, shown in zip(files, names, strict=True):
        if path.suffix == ".safetensors":
            yield f"{name}: {shown}", tensors(path)
        elif path.suffix == ".pt":
            yield f"{name}: {shown}", pickled(path)
        elif path.suffix == ".png":
            yield f"{name}: {shown}", digest(np.asarray(Image.open(path)).tobytes())
        elif path.name in ("log.jsonl", "scheduler_config.json"):
            yield f"{name}: {shown}", digest(path.read_bytes())
        elif path.name == "config.yaml":
            yield f"{name}: {shown}", digest(keys_alone(path.read_text()))
        elif path.suffix == ".json":
            yield f"{name}: {shown}, keys and types", json_form(path)


def make_vae(folder: Path) -> None:
    """A small VAE of diffusers, with weights of one seed."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4, sample_size=16, **blocks)
    vae.save_pretrained(folder)


def make_images(folder: Path) -> None:
    """Ninety images of 16x16 in nine class folders."""
    draw = np.random.default_rng(0)
    for number in range(90):
        place = folder / "abcdefghi"[number % 9]
        place.mkdir(parents=True, exist_ok=True)
        coarse = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((16, 16), Image.Resampling.BICUBIC).save(place / f"{number}.png")


def together(*arguments: str) -> None:
    """A command on two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, "-m", "dit_in_dit", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


def runs() -> Table:
    """Six runs of 20 steps: logs, configs, weights, sample grids."""
    make_vae(Path("vae"))
    make_images(Path("images"))
    run("encode", "--data", "images", "--vae", "vae", "--out", "latents", "--size", "16", "--device", "cpu")
    yield from of_folder("encode", Path("latents"))
    for name, keys in {"golden": GOLDEN, "ddpm": DDPM, "rich": RICH, "latents": LATENTS}.items():
        run("train", *settings(f"{MODEL} {TRAIN} {keys}"), "--out", f"runs/{name}", "--device", "cpu")
    for name, keys in {"fixed": FIXED, "fsdp": SHARDED}.items():
        together("train", *settings(f"{MODEL} {TRAIN} {keys}"), "--out", f"runs/{name}", "--device", "cpu")
    for folder in sorted(Path("runs").iterdir()):
        yield from of_folder(f"train {folder.name}", folder)
    run("verify-resume", "runs/golden")  # RuntimeError where anything differs


def samples() -> Table:
    """Eight samples by each sampler, and what is measured of samples."""
    for name, samplers in SAMPLERS.items():
        for sampler in samplers:
            out = f"samples/{name}-{sampler.replace('+', 'p')}"
            run("sample", f"runs/{name}", "-n", "8", "--sampler", sampler, "--steps", "4", "--out", out)
            yield from of_folder(f"sample {name} {sampler}", Path(out))
    run("evaluate", "runs/golden", "-n", "20", "--out", "evaluations/golden")
    run("evaluate", "emoji", "-n", "100", "--out", "evaluations/emoji")
    for name in ("golden", "emoji"):
        for path in sorted(Path(f"evaluations/{name}").rglob("metrics.json")):
            values = json.loads(path.read_text())
            yield f"evaluate {name}: scores", digest(json.dumps(values["scores"], sort_keys=True))
            yield f"evaluate {name}: metrics.json, keys and types", json_form(path)
    run("maps", "runs/rich", "--num", "2", "--out", "maps")
    yield from of_folder("maps", Path("maps"))


def exports() -> Table:
    """Weights given away and taken back."""
    for name, kinds in {
        "golden": ("pipeline", "run"),
        "ddpm": ("pipeline",),
        "latents": ("pipeline",),
    }.items():
        for kind in kinds:
            vae = ["--vae", "vae"] if name == "latents" and kind == "pipeline" else []
            run("export", f"runs/{name}", "--format", kind, "--out", f"exports/{name}-{kind}", *vae)
            yield from of_folder(f"export {name} {kind}", Path(f"exports/{name}-{kind}"))
    keys = f"{MODEL} {TRAIN} data.source=mosaic model.stages='outer*2' model.channels=4 diffusion.path=ddpm"
    keys = keys.replace("num_classes=9", "num_classes=9 model.time_embed=diffusers") + " diffusion.predict=noise"
    make_images(Path("few"))
    plain = f"{keys} model.learn_variance=true sample.sampler=ddim".replace("data.source=mosaic", "data.source=latents")
    plain = plain.replace("model.image_size=16", "model.image_size=8").replace("data.flip=true", "data.flip=false")
    run("train", *settings(plain), "--out", "plain", "--device", "cpu")
    official = plain.replace("time_embed=diffusers", "time_embed=dit")
    run("train", *settings(official), "--out", "official", "--device", "cpu")
    for kind, source, out in (
        ("official", "official", "dit.pt"),
        ("diffusers-dit", "plain", "dit"),
        ("diffusers", "plain", "own"),
    ):
        run("export", source, "--format", kind, "--out", f"exports/{out}")
        path = Path(f"exports/{out}")
        yield from [(f"export {kind}", pickled(path))] if path.is_file() else of_folder(f"export {kind}", path)
    run("import", "exports/dit.pt", "--num-heads", "4", "--out", "imported/dit")
    yield from of_folder("import official", Path("imported/dit"))


def texts() -> Table:
    """What commands print as JSON or YAML for every preset, and their options."""
    presets = list(dit_in_dit.presets.NAMES)
    yield "presets", digest("\n".join(presets))
    for preset in presets:
        yield f"config {preset}", digest(keys_alone(run("config", "--preset", preset)))
        yield f"inspect {preset}", digest(run("inspect", "--preset", preset, "--json"))
    small = settings(f"{MODEL} {GOLDEN}")
    matched = json.loads(run("match", "--like", "emoji", "--preset", "emoji-dit", "--json"))
    matched["costs"].pop("time", None)  # measured
    yield "match", digest(json.dumps(matched))
    yield "recipe", digest(run("recipe", "dit-in-dit-b2", "--gpus", "8", "--json"))
    yield "inspect golden", digest(run("inspect", *small, "--json"))
    commands = re.findall(r"^    ([\w-]+)(?:  |\n)", run("--help"), flags=re.MULTILINE)
    for command in commands:
        for word in sorted(set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", usage(command)))):
            yield f"{command} {word}", digest(word)


def usage(*command: str) -> str:
    """The first paragraph of a command's help."""
    return run(*command, "--help").split("\n\n")[0]


ADDED = {"  optimizer: adamw", "    norm: layer"}  # keys that came after the record, at their default


def keys_alone(text: str) -> str:
    """YAML without its comments, which are prose, and without keys added since."""
    lines = [line.split(" #")[0].rstrip() for line in text.splitlines() if not line.lstrip().startswith("#")]
    return "\n".join(line for line in lines if line not in ADDED)


def studies() -> Table:
    """Plans of all studies that come with the package, and the report of an old one."""
    for name in re.findall(r"^([\w-]+)  ", run("study", "list"), flags=re.MULTILINE):
        yield f"study show {name}", digest(keys_alone(run("study", "show", name)))
    shutil.copytree(ROOT / "tests" / "old" / "study", "old-study")
    run("study", "report", "old-study")
    for path in sorted(Path("old-study").glob("*.csv")):
        yield f"study report: {path.name}", digest(path.read_bytes())
    planned = run("study", "plan", "ablation", "--set", "budget.steps=10").splitlines()
    width = next(line.index("ms/step") - 3 for line in planned if "ms/step" in line)  # what follows is measured
    yield "study plan ablation", digest("\n".join(line[:width].rstrip() for line in planned))


def parameters() -> Table:
    """Names and shapes of all parameters, and the first output, of every arrangement."""
    model_class, inner_class = type(dit_in_dit.RunConfig().model), type(dit_in_dit.RunConfig().model.inner)
    small = {"image_size": (16, 8), "patch_size": 4, "num_classes": 5, "depth": None}
    choices = {
        "aggregate": ("mean", "weighted", "attention", "concat"),
        "mixer": ("patch", "window", "image", "conv", "none"),
        "condition": ("image", "patch", "sub_patch"),
        "spread": ("add", "interpolate"),
        "fuse": ("add", "gate", "replace"),
        "embed": ("linear", "conv"),
    }
    for stages in ("inner*2 outer*2", "(inner outer)*2", "outer*2 inner*2", "inner outer*2 inner"):
        for values in itertools.product(*choices.values()):
            keys = dict(zip(choices, values, strict=True))
            inner = inner_class(sub_patch=2, width=16, num_heads=2, window=1, **keys)
            outer = replace(dit_in_dit.RunConfig().model.outer, width=32, num_heads=4)
            yield from one_model(
                f"{stages}, {' '.join(values)}", model_class(stages=stages, outer=outer, inner=inner, **small)
            )
    plain = replace(dit_in_dit.RunConfig().model, stages="outer*2", outer=outer, **small)
    yield from one_model("outer*2", plain)


def one_model(name: str, config: Any) -> Table:
    torch.manual_seed(0)
    model = dit_in_dit.NestedDiT(config)
    parts: list[bytes | str] = []
    for parameter_name, parameter in model.named_parameters():
        parts += [parameter_name, str(tuple(parameter.shape)), parameter.detach().numpy().tobytes()]
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    x = torch.randn(2, 3, *config.image_size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        out = model(x, torch.tensor([0.3, 0.7]), torch.tensor([1, 5]))
    yield f"model: {name}", digest(*parts, out.numpy().tobytes())


def public() -> Table:
    """Signatures of the public API; additions are allowed, so each has a line."""
    for name in sorted(dit_in_dit.__all__):
        thing = getattr(dit_in_dit, name)
        if inspect.ismodule(thing):
            yield (
                f"public {name}",
                digest(" ".join(n for n in sorted(vars(thing)) if n in ("get", "NAMES", "PRESETS", "macs"))),
            )
        elif inspect.isclass(thing) and issubclass(thing, Exception):
            yield f"public {name}", digest(" ".join(base.__name__ for base in thing.__mro__))
        else:
            names = [f"{p.name} {p.kind}" for p in inspect.signature(thing).parameters.values()]
            yield f"public {name}", digest("\n".join(names))


PARTS = (texts, public, parameters, runs, samples, exports, studies)


def table() -> dict[str, str]:
    """Everything, in a folder of its own that is gone afterwards."""
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("base.yaml").write_text("seed: 20\n")
        try:
            for part in PARTS:
                print(f"{part.__name__} ...", file=sys.stderr, flush=True)
                found |= dict(part())
        finally:
            os.chdir(home)
    return found


def main_() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, metavar="FILE")
    parser.add_argument("--compare", type=Path, metavar="FILE")
    asked = parser.parse_args()
    found = table()
    if asked.record:
        asked.record.write_text(json.dumps(found, indent=0) + "\n")
    if not asked.compare:
        print("\n".join(f"{value}  {name}" for name, value in found.items()))
        return 0
    before = json.loads(asked.compare.read_text())
    lost = [f"gone     {name}" for name in before if name not in found]
    lost += [f"differs  {name}" for name in before if name in found and found[name] != before[name]]
    lost += [f"new      {name}" for name in found if name not in before]
    print("\n".join(lost) or f"all {len(before)} are equal")
    return int(any(not line.startswith("new") for line in lost))


if __name__ == "__main__":
    sys.exit(main_())
