"""The weak model of autoguidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.run import RunConfig
from dit_in_dit.model.nested import NestedDiT


@dataclass(frozen=True, eq=False)
class Guide:
    """A weak model of the same images: smaller, or trained for fewer steps (Karras et al. 2024)."""

    name: str  # in errors
    net: NestedDiT
    config: RunConfig
    classes: tuple[str, ...]
    sha256: str = ""  # of the file of its weights

    def checked(self, config: RunConfig, classes: tuple[str, ...]) -> RunConfig:
        """The config. UserError if this model cannot guide a model of this config and these classes."""
        own, name = self.config, truncate(self.name)
        keys: dict[str, Callable[[RunConfig], object]] = {
            "image size and channels": lambda each: "x".join(map(str, each.model.image_shape)),
            "data.latent_mean and latent_scale": lambda each: [each.data.latent_mean, each.data.latent_scale],
            "diffusion.path": lambda each: each.diffusion.path,
        }
        for what, value in keys.items():
            if value(own) != value(config):
                raise UserError(f"the guide must have the model's {what}, {value(config)}: {name} has {value(own)}")
        if own.model.num_classes and self.classes != classes:  # a model without classes guides without them
            raise UserError(
                f"the guide must have the model's {len(classes)} classes in their order, or none: "
                f"{name} has {len(self.classes)}, {truncate(', '.join(self.classes), 60)}"
            )
        if own.model.num_classes and config.sample.guidance != 1 and not own.train.label_drop:
            raise UserError(f"{name} has no null class, which guidance needs: give --guidance 1, or another guide")
        return config
