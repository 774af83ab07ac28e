"""Feature networks of the standard metrics: torch-fidelity's Inception, and DINOv2. Needs the extra `eval`.

The user provides the files of weights; nothing is downloaded.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dit_in_dit.config.errors import UserError
from dit_in_dit.data.dinov2 import IMAGENET_DEVIATION, IMAGENET_MEAN, not_importable, read_dinov2
from dit_in_dit.reporting.images import Pixels
from dit_in_dit.runs.integrity import file_sha256
from dit_in_dit.runtime.precision import use_full_float32

SPATIAL_CHANNELS = 7  # of ADM's spatial features: 17 * 17 * 7 = 2023 numbers, about as many as the pooled ones
DINOV2_SIDE = 224  # pixels; Stein et al. 2023


@dataclass(frozen=True)
class Network:
    """Maps images (N, H, W, C), uint8, to features (N, d), float32, by kind.

    DINOv2 has `pool`; Inception has `pool`, `spatial` and `logits`.
    """

    name: str
    identity: dict[str, str]  # the package's version and the SHA-256 of the weights, on which features depend
    compute: Callable[[Pixels], dict[str, Tensor]]  # the network on images of three channels

    def __call__(self, pixels: Pixels) -> dict[str, NDArray[np.float32]]:
        """Features of each image; grey images are repeated to three channels. UserError if a feature is not finite."""
        with torch.inference_mode():
            features = {kind: values.float().cpu().numpy() for kind, values in self.compute(to_rgb(pixels)).items()}
        if not all(np.isfinite(values).all() for values in features.values()):
            raise UserError(f"{self.name} features are not finite: the file of weights is damaged; get the file again")
        return features


def to_rgb(images: Pixels) -> Pixels:
    """Images (N, H, W, 3); grey images are repeated."""
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def open_network(name: str, weights: Path | None, device: torch.device) -> Network:
    """Open `inception` or `dinov2` with the weights at `weights` (None, for Inception only: torch-fidelity's own copy).

    Raises:
        UserError: a package or the weights are missing, or do not fit.
    """
    use_full_float32()  # else features depend on the device
    return {"inception": _inception, "dinov2": _dinov2}[name](weights, device)


def _inception(path: Path | None, device: torch.device) -> Network:
    """Inception of 2015 as the published FIDs use it (Heusel et al. 2017), with torch-fidelity's resize and graph.

    `pool`: (N, 2048). `logits`: (N, 1008), without the bias, as ADM's evaluator and torch-fidelity take them for the
    Inception Score. `spatial`: (N, 2023), the first channels of `mixed_6/conv` of the original graph, rows before
    columns before channels (sFID: Nash et al. 2021, as in ADM's evaluator).
    """
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except (ImportError, RuntimeError) as error:  # torchvision made for another torch raises RuntimeError
        raise not_importable("torch-fidelity", "torch_fidelity", error) from None
    cache = Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rpartition("/")[2])
    path = path or cache
    if not path.is_file():
        raise UserError(
            f"no Inception weights at {path}: get {URL_INCEPTION_V3} and put it at {cache}, or give --weights FILE"
        )
    # torch-fidelity unpickles its file without restriction: give it one that is written here.
    safe = io.BytesIO()
    torch.save(_tensors(path), safe)
    safe.seek(0)
    try:
        extractor = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], safe)
    except RuntimeError:
        raise UserError(f"{path} does not hold the weights of torch-fidelity's Inception: give another file") from None
    extractor.to(device).eval()
    hooked: dict[str, Tensor] = {}

    def keep(_: nn.Module, __: tuple[Tensor], output: Tensor) -> None:
        hooked["spatial"] = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    extractor.Mixed_6d.branch1x1.register_forward_hook(keep)

    def compute(pixels: Pixels) -> dict[str, Tensor]:
        pool, logits = extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device))
        return {"pool": pool, "logits": logits, "spatial": hooked.pop("spatial")}

    return Network("inception", _identity("Inception", path, "torch-fidelity"), compute)


def _tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a `.pth` file by name, without running code from the file. UserError if that fails."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about damaged bytes: the error below reports them
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {str(name): tensor.clone() for name, tensor in tensors.items()}  # a clone has no other attributes
    except Exception as error:  # on damaged bytes torch raises anything from AssertionError to struct.error
        reason = getattr(error, "strerror", None) or "the file is damaged, or holds more than tensors by name"
        raise UserError(f"cannot read the weights in {path}: {reason}; get the file again") from None


def _dinov2(folder: Path | None, device: torch.device) -> Network:
    """DINOv2's class token (N, width) after the last norm; FD-DINOv2 is defined with ViT-L/14 (Stein et al. 2023)."""
    if folder is None:
        raise UserError(
            "no DINOv2 weights: give --dinov2 FOLDER with config.json and model.safetensors of facebook/dinov2-large"
        )
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"no {name} in {folder}: --dinov2 needs the files of facebook/dinov2-large")
    model = read_dinov2(folder, DINOV2_SIDE).to(device, torch.float32).eval()

    def compute(pixels: Pixels) -> dict[str, Tensor]:
        x = torch.from_numpy(_resized(pixels)).to(device).permute(0, 3, 1, 2) / 255
        mean, deviation = (x.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_DEVIATION))
        return {"pool": model((x - mean) / deviation).pooler_output}

    config = model.config
    identity = _identity("DINOv2", folder / "model.safetensors", "transformers")
    shape = (
        f"ViT, width {config.hidden_size}, {config.num_hidden_layers} layers of {config.num_attention_heads} heads, "
        f"patch {config.patch_size}"
    )
    return Network("dinov2", {**identity, "network": shape}, compute)


def _resized(pixels: Pixels) -> Pixels:
    """Images at DINOv2's size by Pillow's bicubic filter, which is antialiased."""
    size = (DINOV2_SIDE, DINOV2_SIDE)
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in pixels])


def _identity(name: str, weights: Path, package: str) -> dict[str, str]:
    return {"name": name, "sha256": file_sha256(weights), package: version(package)}
