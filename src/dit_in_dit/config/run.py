"""The config of a run: groups of keys with the rules between them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from dit_in_dit.config.choices import KEYS, PLUGIN_KEYS
from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.model import AUTO, InnerConfig, ModelConfig, OuterConfig, TokensConfig  # noqa: F401  # plug-ins
from dit_in_dit.config.samplers import SAMPLERS, check_sampler
from dit_in_dit.config.schema import PluginKeys, Section, key, keys


@dataclass(frozen=True)
class DiffusionConfig(Section):
    prefix: ClassVar[str] = "diffusion"
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
    split_rank: int = key(8, "split: rank of the subspace, a PCA of training patches", low=1, high=65536, added=3)
    split_scale: float = key(1.0, "split: scale s of the subspace; 1 for a PCA", low=1e-3, high=1e3, added=3)
    split_clamp: float = key(0.04, "split: least t in divisions when sampling", low=1e-6, high=1, added=3)
    frequency_weight: float = key(0.0, "weight of DeCo's loss on DCT coefficients; 0: none", low=0, high=1e6, added=3)

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
        "emoji", "emoji, mosaic, folder or .zip with a folder per class, .npz, .npy, idx, .tar shards, hf:NAME, latents"
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
    workers: int = key(0, "processes that prepare batches; 0: the training process", low=0, high=256)

    def check(self) -> None:
        if not self.source.strip():
            raise UserError("data.source is empty: name emoji, mosaic, a folder, a .zip or arrays")


@dataclass(frozen=True)
class LrScaleConfig(Section):
    prefix: ClassVar[str] = "train.lr_scale"
    outer: float = key(1.0, "factor for outer weights, and for time and label embeddings; 0: frozen", low=0, high=1000)
    inner: float = key(1.0, "factor for inner weights, and for modules between the levels; 0: frozen", low=0, high=1000)


@dataclass(frozen=True)
class TrainConfig(Section):
    prefix: ClassVar[str] = "train"
    plugins: PluginKeys = field(default=PluginKeys(), repr=False, kw_only=True)  # set by RunConfig
    steps: int = key(400_000, "optimizer steps; or set train.epochs, passes over the data", low=1, high=10**12)
    epochs: float | None = key(
        None, "passes over the training images; becomes train.steps when the run starts", low=1e-9, high=10**9, added=2
    )
    batch_size: int = key(256, "examples per forward pass", low=1, high=10**6)
    accumulate: int = key(1, "forward passes per step; a step sees batch_size * accumulate", low=1, high=10**6)
    optimizer: Literal["adamw", "adam"] = key(
        "adamw", "adamw: decoupled weight decay; adam: weight decay is added to the gradient", added=2
    )
    learning_rate: float = key(1e-4, "peak learning rate", low=0, high=10)
    lr_scale: LrScaleConfig = key(LrScaleConfig, "factors on the learning rate, by level")
    init: str | None = key(None, "run whose averaged weights this run starts from; null: random weights")
    init_blocks: tuple[int, ...] | None = key(
        None, "outer blocks to take from init, in order; null: all, or the needed number evenly spaced", low=0, high=999
    )
    weight_decay: float = key(0.0, "weight decay", low=0, high=10)
    beta2: float = key(0.999, "decay of Adam's average of squared gradients", low=0, high=0.9999999)
    warmup: int = key(0, "steps of linear learning-rate warm-up from zero", low=0, high=10**12)
    schedule: Literal["constant", "cosine"] = key("constant", "learning rate after the warm-up; cosine ends at 0")
    label_drop: float = key(0.1, "fraction of labels replaced by the null class, for guidance", low=0, high=1)
    ema: float = key(0.9999, "decay of the averaged weights; at step n at most (1+n)/(10+n)", low=0, high=0.9999999)
    clip: float = key(1.0, "largest gradient norm; 0: no clipping", low=0, high=10**9)
    noise: Literal["host", "device"] = key(
        "host",
        "training noise: host (same bits on every device), device (made where the model is, same up to rounding)",
        added=4,
    )
    precision: Literal["auto", "float32", "bfloat16"] = key(
        "auto", "autocast type; auto: bfloat16 if the device computes in it, resolved when the run starts"
    )
    compile: Literal["auto", True, False, "graphs"] = key(
        "auto",
        "compile the blocks: auto (on CUDA), true, false; graphs: and replay a step as a CUDA graph (small models)",
        was=False,
    )
    recompute: Literal["none", "inner", "outer", "both"] = key(
        "none", "levels whose blocks recompute activations in the backward pass: less memory, more time"
    )
    parallel: Literal["ddp", "fsdp"] = key(
        "ddp", "several processes: ddp (each holds all weights), fsdp (weights, average and moments are sharded)"
    )
    reduction: Literal["fast", "fixed"] = key(
        "fast", "sum of gradients: fast (in the backend's order), fixed (as a tree: same bits on 1, 2, 4 ... processes)"
    )
    timeout: int = key(600, "seconds within which a process must answer, or the job ends", low=1, high=86_400)
    skip_most: int = key(10, "most consecutive steps skipped for a non-finite loss or gradient", low=0, high=10**6)
    on_divergence: Literal["stop", "roll_back"] = key(
        "stop", "if more are skipped: stop, roll_back (to the last checkpoint, then continue with later examples)"
    )
    checkpoint_every: int = key(10_000, "steps between checkpoints; the last step always has one", low=1, high=10**12)
    keep_every: int = key(
        0, "steps between checkpoints that are never deleted; 0: only the newest two stay", low=0, high=10**12
    )
    sample_every: int = key(10_000, "steps between sample grids; 0: never", low=0, high=10**12)
    evaluate_every: int = key(1_000, "steps between held-out evaluations; 0: never", low=0, high=10**12)

    @property
    def unwritten(self) -> tuple[str, ...]:
        """Keys that plain values and YAML leave out, because another key takes their place."""
        return ("epochs",) if self.epochs is None else ("steps",)

    def check(self) -> None:
        if self.epochs is not None and self.steps != TrainConfig.steps:
            raise UserError("train.steps and train.epochs exclude each other: give one of them")
        if self.keep_every % self.checkpoint_every:
            raise UserError(
                "train.keep_every must be a multiple of train.checkpoint_every: "
                f"got {self.keep_every}, {self.checkpoint_every}"
            )
        if self.reduction == "fixed" and self.accumulate & (self.accumulate - 1):
            raise UserError(
                f"train.accumulate must be a power of two with train.reduction=fixed: got {self.accumulate}"
            )
        if self.reduction == "fixed" and self.parallel == "fsdp":
            raise UserError("train.reduction=fixed needs whole gradients: set train.parallel=ddp")
        if self.compile == "graphs" and (self.recompute, self.reduction) != ("none", "fast"):
            got = f"got {self.recompute}, {self.reduction}"
            raise UserError(f"train.compile=graphs needs train.recompute=none and train.reduction=fast: {got}")


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

    def check(self) -> None:
        if self.interval[0] > self.interval[1]:
            raise UserError(f"sample.interval must go from low to high: got {list(self.interval)}")
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
        if not PLUGIN_KEYS and not self.plugins.sections:
            return
        values = {name: value for name, _, value in keys(self)}
        names = [values[name] for name in KEYS] + [self.data.source.partition(":")[0]]
        object.__setattr__(self, "plugins", self.plugins.including(names))
        for group in ("model", "data", "train"):
            if getattr(self, group).plugins != self.plugins:
                object.__setattr__(self, group, replace(getattr(self, group), plugins=self.plugins))

    def check(self) -> None:
        check_sampler(self.diffusion.path, self.sample.sampler, self.sample.steps)
        steered = self.sample.guidance_channels
        if steered and steered > self.model.channels:
            raise UserError(
                f"sample.guidance_channels must be at most model.channels: got {steered} for {self.model.channels}"
            )
        if self.model.num_classes and self.sample.guidance != 1 and not self.train.label_drop:
            raise UserError(
                f"sample.guidance={self.sample.guidance:g} needs a trained null class: set train.label_drop above 0"
            )
        model, diffusion, size = self.model, self.diffusion, self.model.image_size
        if diffusion.split and (diffusion.path, model.learn_variance) != ("flow", False):
            got = f"got {diffusion.path}, {str(model.learn_variance).lower()}"
            raise UserError(f"diffusion.predict=split needs diffusion.path=flow, model.learn_variance=false: {got}")
        if diffusion.split and (rank := diffusion.split_rank) > (most := model.channels * model.patch_size**2):
            raise UserError(f"diffusion.split_rank must be at most {most}, the numbers of a patch: got {rank}")
        if diffusion.frequency_weight and (model.channels != 3 or any(side % 8 for side in size)):
            got = f"got {model.channels}, {list(size)}; set it to 0"
            raise UserError(f"diffusion.frequency_weight needs 3 channels and sides that are multiples of 8: {got}")

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
