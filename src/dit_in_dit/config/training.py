"""Config keys of the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dit_in_dit.config.averages import LENGTH, LONGEST, SHORTEST, check_averages
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.schema import PluginKeys, Section, key
from dit_in_dit.config.terms import TermsConfig


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
    optimizer: Literal["adamw", "adam", "muon"] = key(
        "adamw",
        "adamw: decoupled weight decay; adam: weight decay is added to the gradient; "
        "muon: orthogonalised steps for the matrices of blocks, AdamW for other weights",
        added=2,
    )
    learning_rate: float = key(1e-4, "peak learning rate", low=0, high=10)
    muon_adjust: Literal["match_rms_adamw", "original"] = key(
        "match_rms_adamw",
        "muon's rate for a matrix: times 0.2 sqrt(longer side), as large a step as AdamW's; "
        "original: times sqrt(rows/columns), at least 1",
        added=4,
    )
    muon_scale: float = key(
        1.0,
        "factor on the learning rate of muon's matrices; AdamW's weights keep train.learning_rate",
        low=0,
        high=1e6,
        added=4,
    )
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
    ema: float | tuple[float, ...] = key(
        0.9999,
        "decay of the averaged weights; at step n at most (1+n)/(10+n); a list: further averages beside the first",
        low=0,
        high=0.9999999,
    )
    ema_lengths: tuple[float, ...] | None = key(
        None,
        "further averages, by length relative to the run (EDM2), such as [0.05, 0.1]; null: none",
        low=SHORTEST,
        high=LONGEST,
        added=4,
    )
    ema_snapshot_every: int = key(
        0,
        "steps between copies of train.ema_lengths that are never deleted (command average); 0: none",
        low=0,
        high=10**12,
        added=4,
    )
    dropout: float = key(
        0.0, "share of the outputs of each block's mixing and MLP that training sets to zero", low=0, high=0.9, added=4
    )
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
    token_drop: float = key(
        0.0, "fraction of patches that bypass most outer blocks in training (TREAD); 0: none", low=0, high=0.95, added=4
    )
    token_drop_blocks: tuple[int, int] | None = key(
        None,
        "token_drop: first and last outer block, from 0, that patches bypass; null: all but the first and last two",
        low=0,
        high=999,
        added=4,
    )
    token_drop_steps: int | None = key(
        None, "token_drop: steps with it; later steps are dense (as in SPRINT); null: all", low=1, high=10**12, added=4
    )
    recompute: Literal["none", "inner", "outer", "both", "selective"] = key(
        "none",
        "levels whose blocks recompute activations in the backward pass: less memory, more time; selective: both "
        "levels, all but products and attention",
    )
    parallel: Literal["ddp", "fsdp"] = key(
        "ddp", "several processes: ddp (each holds all weights), fsdp (weights, average and moments are sharded)"
    )
    shard: int = key(
        0,
        "with parallel=fsdp: processes that hold one sharded copy (HSDP), such as the 8 of a machine; 0: all",
        low=0,
        high=10**6,
        added=4,
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
    save: Literal["sync", "async"] = key(
        "sync",
        "checkpoints: sync (training waits), async (a thread writes a copy in host memory while training continues)",
        added=4,
    )
    sample_every: int = key(10_000, "steps between sample grids; 0: never", low=0, high=10**12)
    evaluate_every: int = key(1_000, "steps between held-out evaluations; 0: never", low=0, high=10**12)
    terms: TermsConfig = key(TermsConfig, "weights of loss terms beside the objective's", added=4)

    @property
    def unwritten(self) -> tuple[str, ...]:
        """Keys that plain values and YAML leave out, because another key takes their place, or no term is on."""
        names = ("epochs",) if self.epochs is None else ("steps",)
        return names if self.terms != TermsConfig() else (*names, "terms")

    @property
    def decays(self) -> tuple[float, ...]:
        """The decays of `ema`; the first is that of the run's average."""
        return self.ema if isinstance(self.ema, tuple) else (self.ema,)

    @property
    def further_averages(self) -> tuple[str, ...]:
        """Names of the averages beside the first (config.averages)."""
        return (*map(str, self.decays[1:]), *(f"{LENGTH}{length}" for length in self.ema_lengths or ()))

    def check(self) -> None:
        if self.epochs is not None and self.steps != TrainConfig.steps:
            raise UserError("train.steps and train.epochs exclude each other: give one of them")
        if self.keep_every % self.checkpoint_every:
            raise UserError(
                "train.keep_every must be a multiple of train.checkpoint_every: "
                f"got {self.keep_every}, {self.checkpoint_every}"
            )
        check_averages(self.decays, self.ema_lengths, self.ema_snapshot_every, self.checkpoint_every)
        if self.reduction == "fixed" and self.accumulate & (self.accumulate - 1):
            raise UserError(
                f"train.accumulate must be a power of two with train.reduction=fixed: got {self.accumulate}"
            )
        if self.reduction == "fixed" and self.parallel == "fsdp":
            raise UserError("train.reduction=fixed needs whole gradients: set train.parallel=ddp")
        if self.shard and self.parallel != "fsdp":
            raise UserError(f"train.shard={self.shard} needs train.parallel=fsdp: got {self.parallel}")
        if self.compile == "graphs" and (self.recompute, self.reduction) != ("none", "fast"):
            got = f"got {self.recompute}, {self.reduction}"
            raise UserError(f"train.compile=graphs needs train.recompute=none and train.reduction=fast: {got}")
        if self.compile == "graphs" and self.token_drop_steps is not None:
            raise UserError("train.compile=graphs replays steps of one kind: set train.token_drop_steps=null")
