"""The nested DiT as a model of the `diffusers` library. Exported folders name this module and class: keep both."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DiffusionConfig, ModelConfig
from dit_in_dit.interop.carried import code_of
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.model.stages import InnerStage, OuterStage, run_block


class DiTInDiTTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]  # diffusers has no types
    """A NestedDiT, with what it predicts and on which path. Its config has the keys of a run's config.yaml.

    Args:
        model: the keys of `model`.
        diffusion: the keys `path`, `predict` and `split_...` of `diffusion`.

    Raises:
        UserError: a key or a value is unknown.
    """

    _no_split_modules = _repeated_blocks = ["Block", "MlpBlock"]  # noqa: RUF012  # diffusers changes neither
    _supports_gradient_checkpointing = True
    gradient_checkpointing = False

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, model: dict[str, Any], diffusion: dict[str, Any]) -> None:
        super().__init__()
        self.nested = NestedDiT(replace(ModelConfig.from_dict(model), split=DiffusionConfig.from_dict(diffusion).split))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        weak: bool = False,
    ) -> Transformer2DModelOutput | tuple[Tensor, ...]:
        """Predict from noisy images (N, C, H, W), times (N,) in [0, 1] (not 0 to 1000; 1 is pure noise) and classes
        (N,). The class `num_classes`, or None for all images, means no class. Computes in the weights' type; the output
        has the images' type. `weak`: return a tuple, the prediction and the weak prediction (see NestedDiT). UserError
        for other times."""
        if not torch.compiler.is_compiling() and not 0 <= timestep.min() <= timestep.max() <= 1:
            raise UserError(f"timestep is t from 0 to 1: got {timestep.max():g}; divide steps of 0 to 1000 by 1000")
        half = self.dtype if self.dtype in (torch.float16, torch.bfloat16) else None
        with torch.autocast(hidden_states.device.type, dtype=half, enabled=half is not None):
            if weak:
                pair = self.nested(hidden_states, timestep, class_labels, weak=True)
                return tuple(output.to(hidden_states.dtype) for output in pair)
            sample = self.nested(hidden_states, timestep, class_labels).to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func: Any = run_block) -> None:
        """Called by `enable_gradient_checkpointing`: blocks recompute their activations in the backward pass."""
        self.gradient_checkpointing = enable
        for stage in self.nested.stages:
            if isinstance(stage, OuterStage | InnerStage):
                stage.run = gradient_checkpointing_func if enable else run_block

    def save_config(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write the config and code that works without this package, also by `AutoModel` (diffusers >= 0.38)."""
        name, code = code_of(type(self))
        super().save_config(save_directory, **options)
        (Path(save_directory) / f"{name}.py").write_text(code)
        path = Path(save_directory) / self.config_name
        config = json.loads(path.read_text()) | {"auto_map": {"AutoModel": f"{name}.{type(self).__name__}"}}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def load_config(cls, *arguments: Any, **options: Any) -> Any:
        """The config without `auto_map`, which only `AutoModel` reads."""
        config = super().load_config(*arguments, **options)
        (config[0] if isinstance(config, tuple) else config).pop("auto_map", None)
        return config
