"""The config of a run: groups of keys with the rules between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from dit_in_dit.config.choices import KEYS, PLUGIN_KEYS
from dit_in_dit.config.emoji import named_styles
from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.model import AUTO, InnerConfig, ModelConfig, OuterConfig, TokensConfig  # noqa: F401  # plug-ins
from dit_in_dit.config.rules import check_augment_labels, check_internal_guidance
from dit_in_dit.config.samplers import SAMPLERS, check_sampler
from dit_in_dit.config.schema import PluginKeys, Section, key, keys
from dit_in_dit.config.time_shift import Shift, check_shift, shift_factor
from dit_in_dit.config.token_drop import TokenDrop, find_token_drop
from dit_in_dit.config.training import TrainConfig


@dataclass(frozen=True)
class DiffusionConfig(Section):
    prefix: ClassVar[str] = "diffusion"
    sizes: Mapping[str, int] | None = field(default=None, repr=False, compare=False, kw_only=True)  # set by RunConfig
    path: Literal["flow", "ddpm"] = key(
        "flow", "flow: x_t = (1-t) x + t e (rectified flow); ddpm: DiT's linear 1000-step schedule"
    )
    predict: Literal["velocity", "image", "noise", "split"] = key(
        "velocity", "quantity that the model predicts; split (AsymFlow): velocity in a subspace of patches, else image"
    )
    weight: Literal["prediction", "velocity", "image", "noise", "min_snr"] = key(
        "prediction", "quantity whose squared error is the loss; min_snr: image error x min(SNR, 5)"
    )
    time: Literal["uniform", "logit_normal"] = key("uniform", "distribution of training times")
    time_mean: float = key(0.0, "logit_normal: mean of the logit; above 0: more noise", low=-20, high=20)
    time_std: float = key(1.0, "logit_normal: standard deviation of the logit", low=1e-3, high=20)
    time_shift: Shift = key(
        1.0,
        "t of training becomes s t / (1 + (s-1) t); s above 1: more noise; s is a number, tokens (SD3: sqrt(patches / "
        "256)) or dimension (RAE: sqrt(numbers / 4096)); path flow",
        low=1e-3,
        high=1e3,
        added=4,
    )
    split_rank: int = key(8, "split: rank of the subspace, a PCA of training patches", low=1, high=65536, added=3)
    split_scale: float = key(1.0, "split: scale s of the subspace; 1 for a PCA", low=1e-3, high=1e3, added=3)
    split_clamp: float = key(0.04, "split: least t in divisions when sampling", low=1e-6, high=1, added=3)
    frequency_weight: float = key(0.0, "weight of DeCo's loss on DCT coefficients; 0: none", low=0, high=1e6, added=3)

    def check(self) -> None:
        check_shift("diffusion.time_shift", self.time_shift, self.path)

    @property
    def shift(self) -> float:
        """The factor s of the shift of training times."""
        return shift_factor(self.time_shift, self.sizes)

    @property
    def split(self) -> tuple[int, float, float] | None:
        """Rank, scale and clamp if the model predicts `split`."""
        return (self.split_rank, self.split_scale, self.split_clamp) if self.predict == "split" else None

    @property
    def unwritten(self) -> tuple[str, ...]:
        """Keys of split and frequency at their defaults: YAML of other objectives stays as it was."""
        names = ("split_rank", "split_scale", "split_clamp", "frequency_weight")
        return tuple(name for name in names if getattr(self, name) == getattr(DiffusionConfig, name))


@dataclass(frozen=True)
class DataConfig(Section):
    prefix: ClassVar[str] = "data"
    plugins: PluginKeys = field(default=PluginKeys(), repr=False, kw_only=True)  # set by RunConfig
    source: str = key(
        "emoji",
        "emoji, emoji:styles (or of noto, twemoji, fluent, tones, joined by +), mosaic, folder or .zip with a "
        "folder per class, .npz, .npy, idx, .tar shards, hf:NAME, latents",
    )
    split: str = key("train", "hf, idx: split of the dataset")
    image_column: str = key("image", "hf: column of the images (or CIFAR's img)")
    label_column: str = key("label", "hf: column of the labels; not read with model.num_classes=0")
    flip: bool = key(False, "mirror training images left to right, each with probability 1/2")
    held_out: float = key(0.1, "fraction of image families that training never sees", low=0, high=0.9)
    vae: str | None = key(None, "latents: folder or hub id of the VAE; null: the VAE that encoded them")
    latent_mean: tuple[float, ...] | None = key(
        None, "latents: subtracted first; one number, or one per channel; null: the VAE's"
    )
    latent_scale: tuple[float, ...] | None = key(
        None, "latents: multiplied afterwards; null: the VAE's (0.18215 for Stable Diffusion)", low=1e-6, high=1e6
    )
    posterior: Literal["sample", "mean"] = key("sample", "latents: sample (new noise per training example), mean")
    corrupt: Literal["error", "skip"] = key("error", "unreadable image files: error (stop), skip (leave out and count)")
    balance: Literal["none", "class"] = key(
        "none", "order of the images: none (each once per epoch), class (each class equally often)", added=4
    )
    augment: float = key(
        0.0,
        "probability of each geometric transform of a training image; the network gets its labels (EDM: 0.12); 0: off",
        low=0,
        high=1,
        added=4,
    )
    augment_kind: Literal["edm", "exact"] = key(
        "edm",
        "edm: flips, scale, rotation, anisotropic scale, translation; exact: flips, quarter turns, whole pixels",
        added=4,
    )
    workers: int = key(0, "processes that prepare batches; 0: the training process", low=0, high=256)

    def check(self) -> None:
        if not self.source.strip():
            raise UserError("data.source is empty: name emoji, mosaic, a folder, a .zip or arrays")
        named_styles(self.source)
        if self.augment and self.flip:
            raise UserError(
                f"data.augment={self.augment:g} flips images itself, with labels for the network: set data.flip=false"
            )

    @property
    def style_labels(self) -> int:
        """Number of labels that give an image's style: one per style but the first; 0: the source has one style."""
        return max(0, len(named_styles(self.source)[0]) - 1)

    @property
    def augment_labels(self) -> int:
        """Number of labels that give an image's augmentation and style; 0: none."""
        return ({"edm": 9, "exact": 6}[self.augment_kind] if self.augment else 0) + self.style_labels


@dataclass(frozen=True)
class SampleConfig(Section):
    prefix: ClassVar[str] = "sample"
    sampler: str = key(
        "heun", "euler, heun (path flow); ddpm (ancestral; path ddpm); ddim (euler on path flow), dpm++, unipc (both)"
    )
    steps: int = key(50, "sampler steps", low=1, high=1000)
    spacing: Literal["trailing", "leading", "linspace"] | None = key(
        None, "spacing of ddpm-path steps, named as in diffusers; null: linspace for sampler ddpm, else trailing"
    )
    guidance: float = key(1.0, "scale of classifier-free guidance; 1: none", low=0, high=100)
    guidance_channels: int | None = key(
        None, "number of leading channels that are guided; null: all (the official DiT code: 3 of 4)", low=1, high=4096
    )
    interval: tuple[float, float] = key((0.0, 1.0), "times t between which guidance is applied", low=0, high=1)
    micro_batch: int = key(
        8, "images per forward pass; another number changes last bits; 8: on CUDA more if they fit", low=1, high=4096
    )
    precision: Literal["auto", "float32", "bfloat16"] = key(
        "auto", "autocast type; auto: train.precision on CUDA, float32 on other devices", added=4
    )
    guide_scale: float = key(
        2.0, "scale of autoguidance, if --guide names a weak model; 1: none", low=0, high=100, added=4
    )
    internal_guidance: float = key(
        1.0, "scale of guidance by the model's own weak head (train.terms.internal); 1: none", low=0, high=100, added=4
    )
    guide_interval: tuple[float, float] = key(
        (0.0, 1.0), "times t between which autoguidance and internal guidance are applied", low=0, high=1, added=4
    )

    @property
    def unwritten(self) -> tuple[str, ...]:
        """Keys of guidance by a weak model at their defaults: YAML without it stays as it was."""
        names = ("guide_scale", "internal_guidance", "guide_interval")
        return tuple(name for name in names if getattr(self, name) == getattr(SampleConfig, name))

    time_shift: Shift | None = key(
        None,
        "shift of the sampler's times, as diffusion.time_shift; null: that of training",
        low=1e-3,
        high=1e3,
        added=4,
    )

    def shift(self, diffusion: DiffusionConfig) -> float:
        """The factor s of the shift of the sampler's times."""
        return diffusion.shift if self.time_shift is None else shift_factor(self.time_shift, diffusion.sizes)

    def check(self) -> None:
        for name in ("interval", "guide_interval"):
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"sample.{name} must go from low to high: got {[low, high]}")
        if self.sampler not in SAMPLERS:
            raise UserError(
                f"sample.sampler must be one of {', '.join(SAMPLERS)} (or name its plug-in with --plugin): "
                f"got {truncate(self.sampler, 60)!r}"
            )
        if self.spacing and self.spacing not in (known := SAMPLERS[self.sampler].spacings):
            raise UserError(
                f"sample.spacing={self.spacing} does not fit sampler {self.sampler}: use {' or '.join(known) or 'null'}"
            )


@dataclass(frozen=True)
class RunConfig(Section):
    """Everything that decides a run, as groups of keys; a notebook shows those that are not at their default.

    >>> dd.RunConfig.from_dict({"seed": 3, "model": {"patch_size": 4}}).model.patch_size
    4
    """

    seed: int = key(0, "seed from which every random number of the run follows", low=0, high=2**63 - 1)
    model: ModelConfig = key(ModelConfig, "the network")
    diffusion: DiffusionConfig = key(DiffusionConfig, "noise, target and loss")
    data: DataConfig = key(DataConfig, "the images")
    train: TrainConfig = key(TrainConfig, "the training loop")
    sample: SampleConfig = key(SampleConfig, "sampling of images")
    plugins: PluginKeys = key(PluginKeys(), "keys of plug-in classes, by registered name (--plugin)", added=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.split != self.diffusion.split:
            object.__setattr__(self, "model", replace(self.model, split=self.diffusion.split))
        if self.data.augment_labels and not self.model.augment_labels:
            object.__setattr__(self, "model", replace(self.model, augment_labels=self.data.augment_labels))
        if isinstance(self.diffusion.time_shift, str) or isinstance(self.sample.time_shift, str):
            sizes = {"tokens": self.model.patches, "dimension": math.prod(self.model.image_shape)}
            object.__setattr__(self, "diffusion", replace(self.diffusion, sizes=sizes))
        if not PLUGIN_KEYS and not self.plugins.sections:
            return
        values = {name: value for name, _, value in keys(self)}
        names = [values[name] for name in KEYS] + [self.data.source.partition(":")[0]]
        object.__setattr__(self, "plugins", self.plugins.including(names))
        for group in ("model", "data", "train"):
            if getattr(self, group).plugins != self.plugins:
                object.__setattr__(self, group, replace(getattr(self, group), plugins=self.plugins))

    def check(self) -> None:
        find_token_drop(self.train, self.model)
        check_sampler(self.diffusion.path, self.sample.sampler, self.sample.steps)
        shift = self.diffusion.time_shift if self.sample.time_shift is None else self.sample.time_shift
        check_shift("sample.time_shift", shift, self.diffusion.path, self.sample.sampler)
        steered = self.sample.guidance_channels
        if steered and steered > self.model.channels:
            raise UserError(
                f"sample.guidance_channels must be at most model.channels: got {steered} for {self.model.channels}"
            )
        if self.model.num_classes and self.sample.guidance != 1 and not self.train.label_drop:
            raise UserError(
                f"sample.guidance={self.sample.guidance:g} needs a trained null class: set train.label_drop above 0"
            )
        if self.data.balance == "class" and not self.model.num_classes:
            raise UserError("data.balance=class needs labels: set model.num_classes=auto, or data.balance=none")
        check_augment_labels(self.model, self.data.augment_kind, self.data.augment_labels, self.data.style_labels)
        model, diffusion, size = self.model, self.diffusion, self.model.image_size
        if diffusion.split and (diffusion.path, model.learn_variance) != ("flow", False):
            got = f"got {diffusion.path}, {str(model.learn_variance).lower()}"
            raise UserError(f"diffusion.predict=split needs diffusion.path=flow, model.learn_variance=false: {got}")
        if diffusion.split and (rank := diffusion.split_rank) > (most := model.channels * model.patch_size**2):
            raise UserError(f"diffusion.split_rank must be at most {most}, the numbers of a patch: got {rank}")
        weight, scale = self.train.terms.internal, self.sample.internal_guidance
        check_internal_guidance(model, diffusion.predict, weight, scale)
        if diffusion.frequency_weight and (model.channels != 3 or any(side % 8 for side in size)):
            got = f"got {model.channels}, {list(size)}; set it to 0"
            raise UserError(f"diffusion.frequency_weight needs 3 channels and sides that are multiples of 8: {got}")

    @property
    def token_drop(self) -> TokenDrop | None:
        """Outer blocks that see fewer patches in training; None: none do."""
        return find_token_drop(self.train, self.model)

    @property
    def lasting_token_drop(self) -> TokenDrop | None:
        """`token_drop` if all steps have it, else None: the memory that a run needs follows from it."""
        return self.token_drop if self.train.token_drop_steps is None else None

    @property
    def global_batch(self) -> int:
        """Examples per optimizer step."""
        return self.train.batch_size * self.train.accumulate

    def resolve_epochs(self, images: int | None, epochs: float | None = None) -> RunConfig:
        """The config with the train.steps of `epochs` or train.epochs; `images` to train on are endless if None."""
        if (epochs := epochs or self.train.epochs) is None:
            return self
        if images is None:
            raise UserError(f"train.epochs needs data with an end, and {self.data.source} has none: set train.steps")
        steps = max(1, round(epochs * images / self.global_batch))
        return replace(self, train=replace(self.train, steps=steps, epochs=None))
