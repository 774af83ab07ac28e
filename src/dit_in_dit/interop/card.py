"""The model card of an exported run: model, training, sampling and evaluation, from the run's own files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from markupsafe import Markup

from dit_in_dit.config.emoji import STYLES, named_styles
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import config_hash, replace_keys, to_yaml
from dit_in_dit.config.program import format_stages
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.strict_json import has_form, read_json
from dit_in_dit.inspection import cost
from dit_in_dit.interop.hub import is_repo_id
from dit_in_dit.reporting.templates import code, code_block, render

EVALUATION = {  # the parts of metrics.json that a card reads
    "subject": {"checkpoint": str},
    "protocol": {"images": int, "samples": dict, "reference": {"data": str}},
    "scores": dict,
}

Rows = Mapping[str, object]


def evaluation_of(run: Path, weights: str) -> tuple[dict[str, Any] | None, Path | None]:
    """The run's newest evaluation of the weights with this SHA-256, and its figure; None for what does not exist."""
    for path in sorted((run / "evaluation").glob("**/metrics.json"), reverse=True):
        with suppress(UserError):  # incomplete, or of another tool
            evaluation = read_json(path)
            if has_form(evaluation, EVALUATION) and evaluation["subject"]["checkpoint"] == weights:
                figure = path.with_name("metrics.png")
                return evaluation, figure if figure.exists() else None
    return None, None


def card(
    name: str,
    config: RunConfig,
    step: int,
    classes: list[str],
    parameters: int,
    evaluation: dict[str, Any] | None,
    *,
    weights: str = "averaged",
    decoded: bool = False,
    licence: str = "unknown",
    picture: str | None = None,
    scores: str | None = None,
    use: str | None = None,
) -> str:
    """Markdown with YAML front matter for the Hub.

    Args:
        evaluation: content of `metrics.json` for these weights.
        weights: averaged, trained, or which average (config.averages.weights_name).
        decoded: whether a VAE decodes the samples.
        licence: the Hub's name of the weights' licence.
        picture: path of an image of samples, from the card's folder.
        scores: path of the evaluation's figure, from the card's folder.
        use: section on usage, in Markdown that is not escaped; None: usage with the `diffusers` library.
    """
    model = config.model
    public = {"data.source": _public(config.data.source), "data.vae": _public(config.data.vae)}
    return render(
        "interop",
        "card.md.j2",
        front=_front_matter(name, config, evaluation, licence, "dit-in-dit" if use else "diffusers"),
        name=name,
        model=model,
        picture=picture,
        scores=scores,
        use=Markup(use or _use(config, classes)),
        rows={
            "model": _model(config, parameters),
            "training": _training(config, step),
            "sampling": _sampling(config, weights, decoded),
        },
        evaluation=evaluation and _results(evaluation),
        classes=classes if model.num_classes else (),
        config=code_block(to_yaml(replace_keys(config, public)), "yaml"),
        licensed=licence != "unknown",
    )


def _front_matter(name: str, config: RunConfig, evaluation: Any, licence: str, library: str) -> Markup:
    """YAML of the Hub's keys; `library` names the package whose classes load the folder."""
    labelled = ["class-conditional"] * bool(config.model.num_classes)
    tags = ["dit-in-dit", "diffusion-transformer", "nested-transformer", *labelled]
    task = "unconditional-image-generation"  # the Hub has no task for classes
    front: dict[str, Any] = {"license": licence, "library_name": library, "pipeline_tag": task, "tags": tags}
    if (dataset := re.match("hf:([^:@]+)", config.data.source)) and is_repo_id(dataset[1]):
        front["datasets"] = [dataset[1]]
    scores = evaluation["scores"] if evaluation else {}
    if values := {_word(key): score["value"] for key, score in scores.items() if score["value"] is not None}:
        data = _word(_public(evaluation["protocol"]["reference"]["data"]))
        metrics = [{"type": key, "name": key, "value": value} for key, value in values.items()]
        result = {"task": {"type": task}, "dataset": {"type": data, "name": data}, "metrics": metrics}
        front |= {"metrics": list(values), "model-index": [{"name": _word(name), "results": [result]}]}
    return Markup(yaml.safe_dump(front, sort_keys=False, width=1000).rstrip())


def _word(text: str | None) -> str:
    """A name without characters that YAML, Markdown or the Hub gives a meaning."""
    return re.sub(r"[^\w./ -]+", "-", str(text))


def _public(name: str | None) -> str | None:
    """The last part of a local path; other names unchanged."""
    return Path(name).name if name and (Path(name).is_absolute() or Path(name).exists()) else name


def _use(config: RunConfig, classes: list[str]) -> str:
    labels = f"[{', '.join(map(repr, classes[:2]))}]" if config.model.num_classes else "batch_size=2"
    return (
        "```python\nimport torch\nfrom diffusers import DiffusionPipeline\n\n"
        'pipe = DiffusionPipeline.from_pretrained("this folder or repository", trust_remote_code=True)\n'
        f"images = pipe({labels}, generator=[torch.Generator().manual_seed(i) for i in range(2)]).images\n"
        "```\n\nThe folder carries its code: `trust_remote_code=True` runs it (PyTorch, diffusers, einops). Where the "
        "package `dit-in-dit` is installed, "
        "`dit_in_dit.interop.pipeline.DiTInDiTPipeline.from_pretrained` needs none of it."
    )


def _model(config: RunConfig, parameters: int) -> Rows:
    model = config.model
    rows: dict[str, object] = {
        "image": f"{model.channels} channels, {model.image_size[0]} x {model.image_size[1]}",
        "classes": model.num_classes or "none",
        "stages": code(format_stages(model.program)),
        "outer": f"{model.patches} patches of {model.patch_size}, width {model.outer.width}",
    }
    if model.blocks("inner"):
        inner = model.inner
        rows["inner"] = f"{model.sub_patches} sub-patches of {inner.sub_patch} in each patch, width {inner.width}"
        choices = ("embed", "mixer", "condition", "aggregate", "fuse")
        rows["between them"] = ", ".join(f"{choice} {getattr(inner, choice)}" for choice in choices)
    macs = cost.macs(model)["total"]
    return {**rows, "parameters": f"{parameters:,}", "MACs per image and forward pass": f"{macs:,}"}


def _training(config: RunConfig, step: int) -> Rows:
    train, diffusion = config.train, config.diffusion
    name = next((name for name in vars(torch.optim) if name.lower() == train.optimizer), train.optimizer)
    credits = {"images": "; ".join(STYLES[style] for style in named_styles(config.data.source)[0])}
    return {
        "data": _public(config.data.source),
        **(credits if credits["images"] else {}),
        **({"initial weights": f"the averaged weights of {_public(train.init)}"} if train.init else {}),
        "path, prediction, loss": f"{diffusion.path}, {diffusion.predict}, {diffusion.weight}",
        "steps": f"{step:,} of {train.steps:,}",
        "examples": f"{step * config.global_batch:,} ({config.global_batch} a step)",
        "optimizer": f"{name}, learning rate {train.learning_rate:g} ({train.schedule}), decay {train.weight_decay:g}",
        "labels dropped": f"{train.label_drop:g}" if config.model.num_classes else "none",
        "precision": train.precision,
        **({"noise": "made on the device (Philox-4x32-10, Box-Muller)"} if train.noise == "device" else {}),
        "seed": config.seed,
        "SHA-256 of the config": code(config_hash(config)),
    }


def _sampling(config: RunConfig, weights: str, decoded: bool) -> Rows:
    how, vae = config.sample, Markup("in `vae`") if decoded else "none"
    guidance = f"{how.guidance:g}" if how.guidance != 1 else "none"
    if how.guidance != 1 and tuple(how.interval) != (0, 1):
        guidance += f", for t from {how.interval[0]:g} to {how.interval[1]:g}"
    if how.internal_guidance != 1:
        guidance += f"; internal guidance {how.internal_guidance:g}, for t from {how.guide_interval[0]:g} to "
        guidance += f"{how.guide_interval[1]:g}"
    return {"sampler": how.sampler, "steps": how.steps, "guidance": guidance, "weights": weights, "VAE": vae}


def _results(evaluation: dict[str, Any]) -> dict[str, Any]:
    protocol = evaluation["protocol"]
    facts = {"images": protocol["images"], **{k: _words(v) for k, v in protocol["samples"].items()}}
    facts |= {f"real images: {k}": _words(v) for k, v in protocol["reference"].items() if k != "data"}
    facts["real images: data"] = _public(protocol["reference"]["data"])
    scores = [
        {
            "name": name,
            "value": _number(score["value"]),
            "interval": _interval(score),
            "floor": _number(score.get("floor")),
        }
        for name, score in evaluation["scores"].items()
    ]
    return {"scores": scores, "warnings": evaluation.get("warnings", ()), "protocol": facts}


def _interval(score: Mapping[str, Any]) -> str:
    low, high = _number(score.get("low")), _number(score.get("high"))
    return f"{low} to {high}" if low and high else ""


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"


def _words(value: Any) -> str:
    if isinstance(value, list) and len(value) > 12:
        return f"{len(value)} values"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
