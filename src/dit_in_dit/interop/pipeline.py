"""Sampling as a pipeline of the `diffusers` library. Exported folders name this module and class: keep both names."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download
from torch import Tensor

from dit_in_dit.config.errors import UserError, did_you_mean
from dit_in_dit.config.run import DiffusionConfig, ModelConfig, SampleConfig
from dit_in_dit.diffusion.path import convert, make_path
from dit_in_dit.diffusion.samplers import fit_scheduler, guided
from dit_in_dit.diffusion.schedulers import is_ddpm, prediction_type, set_steps, time_of
from dit_in_dit.diffusion.variance import ancestral, split_prediction
from dit_in_dit.interop.carried import code_of, installed
from dit_in_dit.interop.guided import transformer_predict
from dit_in_dit.reporting.images import check_finite, to_image, to_pixels

OUTPUTS = ("pil", "np", "pt", "latent")


class DiTInDiTPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers has no types
    """Images from a nested DiT, by class, with any scheduler of its path.

    Args:
        transformer: a DiTInDiTTransformer2DModel.
        scheduler: of the model's path; `pipe.scheduler = Other.from_config(pipe.scheduler.config)` swaps it.
        vae: decodes latents to images; None for a model of pixels.
        id2label: class names by number, with JSON's keys: {'0': 'cat'}.
        sample: defaults of a call, keys of a run's `sample`: steps, guidance, guidance_channels, interval.
        null_class: whether the model was also trained with dropped labels, which guidance needs.
    """

    model_cpu_offload_seq = "transformer->vae"
    scheduler: Any
    _optional_components = ["vae"]  # noqa: RUF012  # diffusers changes neither
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: dict[str, str] | None = None,
        sample: dict[str, Any] | None = None,
        null_class: bool = True,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label, sample=sample, null_class=null_class)
        self.labels = {name: int(number) for number, name in (id2label or {}).items()}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str | None] | None = None,
        *,
        batch_size: int | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guide: ModelMixin | None = None,
        guide_scale: float | None = None,
        guide_interval: tuple[float, float] | None = None,
        internal_guidance: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            class_labels: numbers or names, one for all images or one for each; None: no class.
            batch_size: number of images; default: the number of labels, generators or latents, or one.
            num_images_per_prompt: images of each label, one after the other; multiplies `batch_size`.
            num_inference_steps: steps of the scheduler.
            sigmas: t of each step, falling in (0, 1], for a model of path flow; default: the scheduler's own.
            guidance_scale: classifier-free guidance; 1 is none.
            guidance_interval: times t between which guidance is applied.
            guide: weak transformer of the same images for autoguidance, with `guide_scale` and `guide_interval`.
            internal_guidance: scale of guidance by the model's own weak head, also within `guide_interval`; 1 is none.
            generator: source of the noise. In a list, generator i gives the noise of image i. If the rest of
                the batch changes, only the last bits of image i can change.
            latents: the initial noise (N, C, H, W), of variance one.
            eta: DDIM's eta, the scale of its added noise.
            output_type: pil, np (N, H, W, C) or pt (N, C, H, W) in [0, 1], or latent (N, C, H, W), not decoded.
            return_dict: false: return a tuple with the images.
            callback_on_step_end: called after each step with the pipeline, the step's number, its timestep and the
                tensors; a tensor that it returns replaces the current one. `pipe._interrupt = True` skips later steps.
            callback_on_step_end_tensor_inputs: tensors given to the callback; only `latents` is known.

        Raises:
            UserError: a value is invalid, or the scheduler does not fit the model's path.
        """
        steps = num_inference_steps if num_inference_steps or sigmas is None else len(sigmas)
        weak = {"guide_scale": guide_scale, "guide_interval": guide_interval, "internal_guidance": internal_guidance}
        how = self._how(steps=steps, guidance=guidance_scale, interval=guidance_interval, **weak)
        if output_type not in OUTPUTS:
            raise UserError(
                f"output_type {str(output_type)[:40]!r} is unknown{did_you_mean(str(output_type), OUTPUTS)}"
            )
        shape = self._shape()
        if output_type != "latent" and self.vae is None and shape[0] not in (1, 3):
            raise UserError(f"latents of {shape[0]} channels need a VAE: give vae=, or take output_type='latent'")
        wanted_tensors = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        if unknown := set(wanted_tensors) - set(self._callback_tensor_inputs):
            raise UserError(f"callbacks only get {', '.join(self._callback_tensor_inputs)}: got {sorted(unknown)}")
        count = _count(class_labels, batch_size, num_images_per_prompt, generator, latents)
        device = self._execution_device
        y = self._numbers(class_labels, count, num_images_per_prompt, device)
        if self.null and not self.config.null_class and (how.guidance != 1 or y is None or (y == self.null).any()):
            raise UserError("this model has no null class: give class_labels, and guidance_scale=1")
        if how.internal_guidance != 1 and "internal_guidance" not in (self.config.sample or {}):
            raise UserError("this model has no trained weak head: give internal_guidance=1")
        diffusion = DiffusionConfig.from_dict(self.transformer.config.diffusion)
        self.scheduler = fit_scheduler(self.scheduler, diffusion.path, how.steps)
        set_steps(self.scheduler, how.steps, sigmas)
        x = self._noise((count, *shape), generator, latents, device)

        path, predict = make_path(diffusion), transformer_predict(self.transformer, guide, how)
        predict = guided(predict, self.null, how)
        wanted = prediction_type(self.scheduler)
        scale = getattr(self.scheduler, "scale_model_input", lambda x, timestep: x)
        options = self._step_options(generator, eta)
        self._interrupt = False
        with self.progress_bar(total=len(self.scheduler.timesteps)) as progress:
            for number, timestep in enumerate(self.scheduler.timesteps):
                if self._interrupt:
                    continue
                t = torch.full((count,), time_of(self.scheduler, diffusion.path, number), device=device)
                x_t = scale(x, timestep)
                output, fraction = split_prediction(predict(x_t, t, y), x_t)
                step = convert(path, output, x_t, t, given=diffusion.predict, wanted=wanted)
                if is_ddpm(self.scheduler):
                    x = self._ancestral(step, fraction, x, number, generator)
                else:
                    x = self.scheduler.step(step, timestep, x, **options).prev_sample
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(wanted_tensors, x)
                    x = (callback_on_step_end(self, number, timestep, tensors) or {}).get("latents", x)
                progress.update()
        images = self._finish(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # ------------------------------------------------------------------------------- parts of a call

    @property
    def null(self) -> int:
        """The label that means no class: it equals the number of classes."""
        return int(self.transformer.config.model["num_classes"])

    def _shape(self) -> tuple[int, int, int]:
        """C, H, W."""
        return ModelConfig.from_dict(self.transformer.config.model).image_shape

    def _how(self, **arguments: Any) -> SampleConfig:
        """Steps and guidance of the call, with the defaults."""
        arguments = {name: value for name, value in arguments.items() if value is not None}
        return SampleConfig.from_dict({**(self.config.sample or {}), **arguments})

    def _numbers(self, labels: Any, count: int, per_label: int, device: torch.device) -> Tensor | None:
        """Class numbers (count,) of labels; None without labels."""
        if labels is None:
            return None
        if not self.null:
            raise UserError("this model was trained without labels: give no class_labels")
        each = [labels] * count if _is_one(labels) else [label for label in labels for _ in range(per_label)]
        return torch.tensor([self._number(label) for label in each], device=device)

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Class numbers of class names."""
        return [self._number(name) for name in ([label] if isinstance(label, str) else label)]

    def _number(self, label: int | str | None) -> int:
        if label is None:
            return self.null
        if isinstance(label, str):
            if label not in self.labels:
                raise UserError(f"unknown class {label[:40]!r}{did_you_mean(label, self.labels)}")
            return self.labels[label]
        if not 0 <= int(label) <= self.null:
            raise UserError(f"class numbers go from 0 to {self.null - 1}, {self.null} means no class: got {label}")
        return int(label)

    def _noise(self, shape: tuple[int, ...], generator: Any, latents: Tensor | None, device: torch.device) -> Tensor:
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise UserError(f"latents must be {shape}: got {tuple(latents.shape)}")
        return latents.to(device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1)

    def _ancestral(self, image: Tensor, fraction: Tensor | None, x: Tensor, number: int, generator: Any) -> Tensor:
        """DDPM's step as in `sample`, with a learned variance if the model has one. The `diffusers` step adds noise to
        the final image if the last time is not 0.
        """
        timesteps = [*self.scheduler.timesteps.tolist(), -1]
        if fraction is None and self.scheduler.config.variance_type.startswith("fixed_small"):
            fraction = torch.full_like(x, -1)
        noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return ancestral(image, fraction, x, int(timesteps[number]), int(timesteps[number + 1]), noise)

    def _step_options(self, generator: Any, eta: float) -> dict[str, Any]:
        """Further arguments of this scheduler's step."""
        known = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in {"generator": generator, "eta": eta}.items() if name in known}

    def _finish(self, x: Tensor, output_type: str) -> Any:
        """Decode, and return images in the output type."""
        check_finite(x)
        if output_type == "latent":
            return x
        if self.vae is not None:
            x = self.vae.decode(self._unscaled(x).to(self.vae.dtype), return_dict=False)[0].float()
            check_finite(x)
        if output_type == "pil":
            return [to_image(pixels) for pixels in to_pixels(x.cpu())]
        x = (x / 2 + 0.5).clamp(0, 1)
        return x if output_type == "pt" else x.permute(0, 2, 3, 1).cpu().numpy()

    def _unscaled(self, x: Tensor) -> Tensor:
        """Latents in the VAE's own scale."""
        config = self.vae.config
        x = x / config.scaling_factor + (config.get("shift_factor") or 0)
        if config.get("latents_mean") and config.get("latents_std"):
            mean, std = (torch.tensor(config[f"latents_{name}"]).view(1, -1, 1, 1).to(x) for name in ("mean", "std"))
            x = x * std + mean
        return x

    # --------------------------------------------------------------------------------------- folders

    def save_config(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write model_index.json, which names the code beside it: the folder works without this package."""
        super().save_config(save_directory, **options)
        name, code = code_of(type(self))
        (Path(save_directory) / f"{name}.py").write_text(code)
        path = Path(save_directory) / self.config_name
        index = json.loads(path.read_text()) | {"_class_name": [name, type(self).__name__]}
        model = type(getattr(self.transformer, "_orig_mod", self.transformer))  # before torch.compile
        index["transformer"] = [code_of(model)[0], model.__name__]
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    @classmethod
    def load_config(cls, *arguments: Any, **options: Any) -> Any:
        """model_index.json with installed classes in place of the folder's: no code of the folder is run."""
        config = super().load_config(*arguments, **options)
        return (installed(config[0]), *config[1:]) if isinstance(config, tuple) else installed(config)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **changes: Any) -> DiTInDiTPipeline:
        """A pipeline with the parts and defaults of another, which it shares, except for `changes`."""
        own = {name: pipeline.config[name] for name in ("id2label", "sample", "null_class")}
        return cls(**{**pipeline.components, **own, **changes})

    @classmethod
    def download(cls, pretrained_model_name: str, **options: Any) -> str:
        """Download a repository of the Hub; return its local folder."""
        known = ("cache_dir", "force_download", "token", "revision", "local_files_only")
        wanted = {name: options[name] for name in known if options.get(name) is not None}
        return snapshot_download(pretrained_model_name, allow_patterns=["*.json", "*.safetensors", "*.py"], **wanted)


DiTInDiTPipeline.__init__.__annotations__.clear()  # diffusers 0.35 fails on annotations that are strings


def _is_one(labels: Any) -> bool:
    return isinstance(labels, str) or np.ndim(labels) == 0


def _count(labels: Any, batch_size: int | None, per_label: int, generator: Any, latents: Tensor | None) -> int:
    """Number of images to generate; UserError when arguments disagree."""
    lengths = {
        "class_labels": None if labels is None or _is_one(labels) else len(labels) * per_label,
        "batch_size": batch_size and batch_size * per_label,
        "generator": len(generator) if isinstance(generator, list) else None,
        "latents": None if latents is None else len(latents),
    }
    counts = {name: count for name, count in lengths.items() if count is not None}
    if len(set(counts.values())) > 1 or min(per_label, *counts.values(), 1) < 1:
        raise UserError(f"how many images? {', '.join(f'{name}: {count}' for name, count in counts.items())}")
    return next(iter(counts.values()), per_label)
