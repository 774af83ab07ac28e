"""Export of a run as a folder of the `diffusers` library: weights, scheduler, model card, and code that does not need
this package.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin

from dit_in_dit.config.averages import weights_name
from dit_in_dit.config.choices import check_travels
from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.schema import keys, to_dict
from dit_in_dit.data.sources import fill_latent_keys
from dit_in_dit.data.vae import latent_constants, load_vae
from dit_in_dit.diffusion.schedulers import make_scheduler
from dit_in_dit.interop.card import card, evaluation_of
from dit_in_dit.interop.pipeline import DiTInDiTPipeline
from dit_in_dit.interop.transformer import DiTInDiTTransformer2DModel
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs import atomic
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.runs.tensors import check_weights

READ = ("path", "predict", "split_rank", "split_scale", "split_clamp")  # only keys that are used
DEFAULTS = ("steps", "guidance", "guidance_channels", "interval")


def export(
    run: Path, out: Path, *, averaged: bool | str = True, vae: str | None = None, licence: str = "unknown"
) -> None:
    """Write the run's newest checkpoint as the folder `out`, complete or not at all.

    Args:
        averaged: the averaged weights; false: the trained ones; a name: that average (config.averages).
        vae: folder or Hub name of the VAE that decodes the latents; None: the run's own.
        licence: the Hub's name of the weights' licence.

    Raises:
        UserError: there is no such run, `out` exists, or the VAE does not fit the latents.
    """
    atomic.check_free(out)
    saved = Checkpoint.open(run)
    model, config, classes = saved.model(torch.device("cpu"), averaged=averaged), saved.config, list(saved.classes)
    check_weights(model.state_dict(), str(run))
    check_travels({name: value for name, _, value in keys(config)})
    pipe = pipeline_of(model, config, classes, vae=_open_vae(vae, config))
    pictures = sorted((run / "samples").glob("*.png"))
    evaluation, figure = evaluation_of(run, saved.sha256(averaged=averaged))
    text = card(
        out.resolve().name,
        config,
        saved.step,
        classes,
        sum(p.numel() for p in model.parameters()),
        evaluation,
        weights=weights_name(averaged),
        decoded=pipe.vae is not None,
        licence=licence,
        picture="samples.png" if pictures else None,
        scores="scores.png" if figure else None,
    )
    with atomic.folder(out) as beside:
        pipe.save_pretrained(beside)
        if pictures:
            shutil.copyfile(pictures[-1], beside / "samples.png")
        if figure:
            shutil.copyfile(figure, beside / "scores.png")
        (beside / "README.md").write_text(text)


def export_onnx(run: Path, out: Path, *, averaged: bool | str = True) -> None:
    """Write the network as an ONNX program: x (N, C, H, W), t (N,) and y (N,), for any N, to `prediction`. UserError if
    there is no such run, `out` exists, or a package is missing.
    """
    atomic.check_free(out)
    program = onnx_program(Checkpoint.open(run).model(torch.device("cpu"), averaged=averaged), str(run))
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic.file(out) as file:
        file.write(program.SerializeToString())


@torch.no_grad()
def onnx_program(model: NestedDiT, run: str) -> Any:
    """The `ModelProto` of a network, with its weights. UserError, which names the `run`, if a package is missing."""
    check_weights(model.state_dict(), run)
    inputs = {"x": torch.zeros(2, *model.config.image_shape), "t": torch.full((2,), 0.5)}
    inputs |= {"y": torch.zeros(2, dtype=torch.int64)} if model.config.num_classes else {}
    if find_spec("onnxscript") is None:
        raise UserError("ONNX needs the packages onnx and onnxscript: pip install 'dit-in-dit[onnx]'")
    options: dict[str, Any] = {"dynamo": True, "verbose": False, "output_names": ["prediction"]}
    options |= {"dynamic_shapes": {name: {0: torch.export.Dim("batch", max=2**16)} for name in inputs}}
    try:
        program: Any = torch.onnx.export(model, kwargs=inputs, input_names=list(inputs), **options)
    except Exception as error:  # of PyTorch before 2.7, or an operation of a user's class
        raise UserError(f"PyTorch {torch.__version__} cannot export {run} as ONNX: {truncate(error, 60)}") from error
    return program.model_proto


def pipeline_of(model: NestedDiT, config: RunConfig, classes: list[str], *, vae: Any = None) -> DiTInDiTPipeline:
    """A pipeline with the defaults of the config; it holds the model itself, not a copy."""
    diffusion = {key: value for key, value in to_dict(config.diffusion).items() if key in READ}
    how = config.sample
    scheduler = make_scheduler(config.diffusion, how.sampler, how.spacing, how.shift(config.diffusion))
    if not isinstance(scheduler, SchedulerMixin):
        raise UserError(
            f"sample.sampler={config.sample.sampler} has no `diffusers` scheduler, which an exported folder needs: "
            "train with a built-in sampler"
        )
    with torch.device("meta"):  # without weights: the model's are used
        transformer = DiTInDiTTransformer2DModel(to_dict(config.model), diffusion)
    transformer.nested = model
    return DiTInDiTPipeline(
        transformer.eval(),
        scheduler,
        vae,
        id2label={str(number): name for number, name in enumerate(classes)} if config.model.num_classes else None,
        sample={key: to_dict(config.sample)[key] for key in DEFAULTS} | _weak(config),
        null_class=config.train.label_drop > 0,
    )


def _weak(config: RunConfig) -> dict[str, Any]:
    """Defaults of internal guidance, if the weak head was trained."""
    how = config.sample
    used = {"internal_guidance": how.internal_guidance, "guide_interval": list(how.guide_interval)}
    return used if config.train.terms.internal else {}


def _open_vae(name: str | None, config: RunConfig) -> Any:
    """The named VAE or the run's; its config gets the run's mean and scale of latents. None without a VAE."""
    data = fill_latent_keys(config.data)
    if (name := name or data.vae) is None:
        return None
    vae, channels = load_vae(name, torch.device("cpu")), config.model.channels
    if type(vae).__name__ == "AutoencoderRAE":  # without scale and shift, and with images in [0, 1]
        raise UserError(f"the VAE {name} is an AutoencoderRAE, which a pipeline does not take: sample from the run")
    if vae.config.latent_channels != channels:
        raise UserError(
            f"the VAE {name} has latents of {vae.config.latent_channels} channels, the model {channels}: "
            "give the VAE that encoded the data"
        )
    own_mean, own_scale = latent_constants(vae)
    mean, scale = data.latent_mean or own_mean, data.latent_scale or own_scale
    if len(mean) == len(scale) == 1:
        vae.register_to_config(scaling_factor=scale[0], shift_factor=mean[0], latents_mean=None, latents_std=None)
    else:
        means = [float(each) for each in mean] * (channels // len(mean))
        deviations = [1 / each for each in scale] * (channels // len(scale))
        vae.register_to_config(scaling_factor=1.0, shift_factor=None, latents_mean=means, latents_std=deviations)
    return vae
