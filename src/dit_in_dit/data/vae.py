"""VAEs of the `diffusers` library behind one interface: AutoencoderKL, and autoencoders without a posterior."""

from __future__ import annotations

import hashlib
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.data.formats.latents import LOG_VARIANCE, SD_SCALE

CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "VQModel", "AutoencoderRAE")
# Errors of diffusers on damaged files.
FAILURES = (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, NameError)
WEIGHTS = "diffusion_pytorch_model"  # stem of diffusers' files of weights, before the variant


def variant_of(folder: Path) -> str | None:
    """The only variant (such as fp16) of the weights in a folder; None if a folder has plain weights or no weights.

    Raises:
        UserError: there are several variants.
    """
    names = [path.name for path in folder.glob(f"{WEIGHTS}*")]
    single = (re.fullmatch(rf"{WEIGHTS}(?:\.(\w+))?\.(?:safetensors|bin)", name) for name in names)
    several = (re.fullmatch(rf"{WEIGHTS}\.(?:safetensors|bin)\.index(?:\.(\w+))?\.json", name) for name in names)
    variants = {match[1] for match in (*single, *several) if match}
    if None in variants or not variants:
        return None
    if len(variants) > 1:
        raise UserError(
            f"{folder} has weights of several variants ({', '.join(sorted(variants))}): make a copy with one"
        )
    return str(variants.pop())


def load_vae(name: str, device: torch.device) -> Any:
    """Load a float32 VAE from a folder or a Hub id, which holds a VAE, or a pipeline with a VAE in `vae/`.

    Raises:
        UserError: the VAE cannot be loaded, or its class is not in CLASSES.
    """
    diffusers: Any = import_module("diffusers")  # imported here: it takes seconds
    problem = ""
    for inside in (None, "vae"):
        try:
            kind = diffusers.AutoencoderKL.load_config(name, subfolder=inside).get("_class_name", CLASSES[0])
        except FAILURES as error:  # report the first error
            problem = problem or _line(error)
            continue
        if kind in CLASSES and hasattr(diffusers, kind):
            vae = _load(getattr(diffusers, kind), name, inside).requires_grad_(False).to(device).eval()
            if kind == "AutoencoderRAE":  # images in [-1, 1], not [0, 1], and the channels' name, as in other classes
                vae.encoder_mean.mul_(2).sub_(1)
                vae.encoder_std.mul_(2)
                vae.register_to_config(latent_channels=vae.config.encoder_hidden_size)
            return vae
        problem = f"it is a {truncate(kind, 40)}, known are {', '.join(CLASSES)}"
    raise UserError(f"no VAE (folder or hub id) at {name!r}: {problem}")


def _load(kind: Any, name: str, inside: str | None) -> Any:
    """A VAE of a `diffusers` class. Its fp16 weights are read if the folder or repository has no other weights."""
    folder, problem = Path(name, inside or ""), ""
    for variant in (variant_of(folder),) if folder.is_dir() else (None, "fp16"):
        options = {"subfolder": inside, "variant": variant, "use_safetensors": True, "low_cpu_mem_usage": False}
        try:
            return kind.from_pretrained(name, **options)
        except FAILURES as error:
            problem = problem or _line(error)
    raise UserError(f"no {kind.__name__} (folder or hub id) at {name!r}: {problem}")


def _line(error: Exception) -> str:
    if isinstance(error, NameError):  # of diffusers, where AutoencoderRAE lacks its encoder's classes
        return "it needs the package transformers: pip install transformers"
    return " ".join(str(error).split())[:80]


def latent_constants(vae: Any) -> tuple[list[float], list[float]]:
    """Mean and scale of a VAE's latents from its config, for all channels or per channel. The default is Stable
    Diffusion's.
    """
    config = vae.config
    if type(vae).__name__ == "AutoencoderRAE":  # it normalises its latents itself
        return [0.0], [1.0]
    scale = float(config.get("scaling_factor") or SD_SCALE)
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean and deviation:
        return [float(each) for each in mean], [scale / float(each) for each in deviation]
    return [float(config.get("shift_factor") or 0)], [scale]


@torch.inference_mode()
def downsampling_factor(vae: Any) -> int:
    """Pixels per latent pixel along a side. It is measured by decoding, because each class names this factor
    differently.
    """
    side = int(vae.num_patches**0.5) if hasattr(vae, "num_patches") else 4  # an AutoencoderRAE has one size
    images: Tensor = vae.decode(torch.zeros(1, vae.config.latent_channels, side, side, device=vae.device)).sample
    return images.shape[-1] // side


def weights_sha256(vae: Any) -> str:
    """SHA-256 of a VAE's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.inference_mode()
def posterior_moments(vae: Any, images: Tensor) -> Tensor:
    """Mean and log variance (n, 2C, h, w) of the posterior, on the CPU, for images (n, 3, H, W) in [-1, 1]. An encoder
    without a posterior gives its latents and the smallest variance."""
    encoded = vae.encode(images.to(vae.device))[0]
    if isinstance(encoded, Tensor):
        return torch.cat([encoded, torch.full_like(encoded, LOG_VARIANCE[0])], 1).cpu()
    return torch.cat([encoded.mean, encoded.logvar], 1).cpu()
