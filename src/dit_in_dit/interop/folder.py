"""A run as a folder of diffusers: weights, scheduler, the code that needs no package, and a model card."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from dit_in_dit import checkpoint
from dit_in_dit.config import RunConfig, UserError, to_dict
from dit_in_dit.interop.card import card, evaluation_of
from dit_in_dit.interop.pipeline import DiTInDiTPipeline
from dit_in_dit.interop.transformer import DiTInDiTTransformer2DModel
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.sampling import make_scheduler


def export(
    run: Path, out: Path, *, averaged: bool = True, vae: str | Path | None = None, licence: str = "unknown"
) -> None:
    """Write the run's newest checkpoint into `out`, which is whole or not there.

    Args:
        averaged: the averaged weights, else the trained ones.
        vae: folder or Hub name of the AutoencoderKL of a run on latents.
        licence: of the weights, as the Hub names it.

    Raises:
        UserError: there is no such run, `out` is taken, or the VAE is none for these latents.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} is there already: choose another --out")
    model, config, manifest = checkpoint.load_model(run, torch.device("cpu"), ema=averaged)
    pipe = pipeline_of(model, config, manifest["classes"], vae=_open_vae(vae, config) if vae else None)
    beside = out.with_name(out.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    pipe.save_pretrained(beside)
    file = "ema.safetensors" if averaged else "state.safetensors"
    pictures = sorted((run / "samples").glob("*.png"))
    if pictures:
        shutil.copyfile(pictures[-1], beside / "samples.png")
    text = card(
        out.resolve().name,
        config,
        manifest["step"],
        list(manifest["classes"]),
        sum(p.numel() for p in model.parameters()),
        evaluation_of(run, manifest["sha256"][file]),
        weights="averaged" if averaged else "trained",
        licence=licence,
        picture="samples.png" if pictures else None,
    )
    (beside / "README.md").write_text(text)
    if out.is_dir():
        out.rmdir()
    beside.rename(out)


def pipeline_of(
    model: NestedDiT, config: RunConfig, classes: list[str], *, vae: AutoencoderKL | None = None
) -> DiTInDiTPipeline:
    """A model as a pipeline that draws as its config says; it holds the model itself, not a copy."""
    with torch.device("meta"):  # its weights are the model's
        transformer = DiTInDiTTransformer2DModel(to_dict(config.model), to_dict(config.diffusion))
    transformer.nested = model
    return DiTInDiTPipeline(
        transformer.eval(),
        make_scheduler(config.diffusion, config.sample.sampler),
        vae,
        id2label={str(number): name for number, name in enumerate(classes)} if config.model.num_classes else None,
        sample=to_dict(config.sample),
        null_class=config.train.label_drop > 0,
    )


def _open_vae(name: str | Path, config: RunConfig) -> AutoencoderKL:
    try:
        vae = AutoencoderKL.from_pretrained(str(name))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the VAE {name}: {str(error).splitlines()[0]}") from None
    if vae.config.latent_channels != config.model.channels:
        raise UserError(
            f"the VAE {name} has latents of {vae.config.latent_channels} channels, the model {config.model.channels}: "
            "give the one that the data was encoded with"
        )
    return vae
