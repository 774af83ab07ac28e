"""The models that are timed: ours, a plainly written version of ours, and other DiT code of the same size."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_in_dit.benchmark.first_written import FirstWritten
from dit_in_dit.benchmark.timing import Times, interleave, kept_bytes, peak_bytes, stopwatch, synchronize
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import ModelConfig, RunConfig
from dit_in_dit.inspection import cost
from dit_in_dit.model.compiled import compile_blocks, uncompiled
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runtime.device import resolve_auto
from dit_in_dit.runtime.memory import keep_freed_memory
from dit_in_dit.training.routing import Routing

Make = Callable[[RunConfig], nn.Module]


def nested(run: RunConfig) -> nn.Module:
    """Our model."""
    return NestedDiT(run.model, recompute=run.train.recompute)


def first_written(run: RunConfig) -> nn.Module:
    """The plainly written version of our model, with the same weights."""
    return FirstWritten(run.model).load(NestedDiT(run.model).state_dict())


class OtherDiT(nn.Module):
    """A DiT from other code, with the call signature of our model."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.call(self.model, x, t, y)


def diffusers_dit(run: RunConfig) -> nn.Module:
    """`DiTTransformer2DModel` of `diffusers` in the size of a plain config; UserError if it cannot have this size."""
    model, outer = run.model, run.model.outer
    check_other_dit(model, "diffusers' DiT")
    dit = import_module("diffusers").DiTTransformer2DModel(  # the import takes seconds
        num_attention_heads=outer.num_heads,
        attention_head_dim=outer.width // outer.num_heads,
        in_channels=model.channels,
        num_layers=model.blocks("outer"),
        sample_size=model.image_size[0],
        patch_size=model.patch_size,
        num_embeds_ada_norm=model.num_classes,
    )
    return OtherDiT(dit, lambda m, x, t, y: m(x, (999 * t).long(), y, return_dict=False)[0])


def official_dit(checkout: Path) -> Make:
    """The `DiT` in `models.py` of a facebookresearch/DiT checkout; it needs timm. UserError if there is none, or it
    cannot be imported."""
    path = checkout / "models.py"
    spec = util.spec_from_file_location("official_dit", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"--dit: no models.py in {checkout}; give a checkout of facebookresearch/DiT")
    module = util.module_from_spec(spec)
    sys.modules["official_dit"] = module  # torch.compile looks a function's module up by name
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise UserError(f"--dit: {path} cannot be imported: {error}") from None
    if not hasattr(module, "DiT"):
        raise UserError(f"--dit: no class DiT in {path}; give a checkout of facebookresearch/DiT")

    def make(run: RunConfig) -> nn.Module:
        model = run.model
        check_other_dit(model, "the official DiT")
        dit = module.DiT(
            input_size=model.image_size[0],
            patch_size=model.patch_size,
            in_channels=model.channels,
            hidden_size=model.outer.width,
            depth=model.blocks("outer"),
            num_heads=model.outer.num_heads,
            mlp_ratio=model.outer.mlp_ratio,
            num_classes=model.num_classes,
            learn_sigma=False,
        )
        return OtherDiT(dit, lambda m, x, t, y: m(x, 999 * t, y))

    return make


def check_other_dit(model: ModelConfig, whose: str) -> None:
    """Raise UserError if the other DiT, named `whose` in the message, cannot have the config's size."""
    height, width = model.image_size
    if model.blocks("inner") or height != width or not model.num_classes or model.outer.mlp_ratio != 4:
        raise UserError(f"{whose} needs a config with square images, classes, an MLP ratio of 4 and no inner blocks")


class BenchmarkSubject:
    """A model that trains on a batch of white noise.

    Every subject takes the same step: forward, mean squared error, backward, AdamW. Averaging, clipping and data
    loading are left out, because other DiT code does none of these. With train.token_drop, patches bypass blocks in a
    step (of the first phase, if there are two), but not in `forward`.

    Args:
        run: the config. Of its `train` keys, only batch_size, precision, recompute, compile and those of token dropping
            are used.
        make: builds the model from the config.

    Raises:
        UserError: the config has train.token_drop, and the model takes no route.
    """

    def __init__(self, run: RunConfig, device: torch.device, make: Make = nested) -> None:
        self.run, self.device = resolve_auto(run, device), device
        keep_freed_memory()  # as training does
        model, train = self.run.model, self.run.train
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            self.model = make(self.run).to(device)
        draw = torch.Generator().manual_seed(run.seed)
        shape = train.batch_size, *model.image_shape
        x, target = (torch.randn(shape, generator=draw).to(device) for _ in range(2))
        t = torch.rand(train.batch_size, generator=draw).to(device)
        y = (torch.arange(train.batch_size) % max(1, model.num_classes)).to(device)
        self.inputs, self.target = (x, t, y), target
        routing = Routing(self.run, self.model)
        route = routing(0, torch.arange(train.batch_size, device=device))
        self.options = {} if route is None else {"route": route}  # other DiT code has no such argument
        if train.compile:
            compile_blocks(self.model, by_length=routing.drop is not None)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=device.type in ("cpu", "cuda"))

    @property
    def macs(self) -> int:
        """MACs of a forward pass per image. Our code counts them, also for models from other code."""
        return cost.macs(self.run.model)["total"]

    @property
    def step_macs(self) -> int:
        """MACs of a training step per image."""
        return cost.training_macs(self.run.model, self.run.token_drop)["total"]

    def autocast(self) -> torch.autocast:
        """Autocast to bfloat16 if the config's precision is bfloat16."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.train.precision == "bfloat16")

    @torch.no_grad()
    def forward(self) -> Tensor:
        """A forward pass without gradients."""
        with self.autocast():
            return self.model(*self.inputs)

    def step(self, mark: Callable[[str], None] = lambda part: None) -> None:
        """Take a training step; `mark` is called when the loss begins and when the optimizer begins."""
        with self.autocast():
            prediction = self.model(*self.inputs, **self.options)
        mark("loss")
        loss = F.mse_loss(prediction.float(), self.target)
        loss.backward()  # type: ignore[no-untyped-call]
        mark("optimizer")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def kept_bytes(self) -> int:
        """Bytes that a forward pass keeps for the backward pass, for the whole batch, without compilation."""

        def forward() -> Tensor:
            with self.autocast():
                return self.model(*self.inputs, **self.options)

        with uncompiled():
            return kept_bytes(forward, (*self.model.parameters(), *self.model.buffers(), *self.inputs))


@dataclass(frozen=True)
class Measurements:
    """The measurements of one subject; times and bytes are for the whole batch."""

    macs: int  # of a forward pass per image, with all patches
    step_macs: int  # of a training step per image
    batch: int
    precision: str
    compiled: bool
    forward: Times
    step: Times
    kept_bytes: int  # kept for the backward pass
    peak_bytes: int | None  # during a step on a CUDA device, weights of all subjects included; None on other devices
    compiling_seconds: float | None  # of the first step; None if the model is not compiled

    @property
    def images_per_second(self) -> float:
        """Images per second of training."""
        return self.batch / self.step.seconds

    @property
    def macs_per_second(self) -> float:
        """MACs per second of training, backward pass included."""
        return self.step_macs * self.images_per_second


def measure_subjects(subjects: Mapping[str, BenchmarkSubject], seconds: float) -> dict[str, Measurements]:
    """Measure the forward passes and steps of all subjects alternately, and each subject's memory."""
    turns, compiling = {}, {}
    for name, subject in subjects.items():
        began = time.perf_counter()
        subject.step()
        synchronize(subject.device)
        compiling[name] = time.perf_counter() - began if subject.run.train.compile else None
        turns[name] = _both(stopwatch(subject.forward, subject.device), stopwatch(subject.step, subject.device))
    rounds = interleave(turns, seconds)
    measured = {}
    for name, subject in subjects.items():
        forwards, steps = zip(*rounds[name], strict=True)
        train = subject.run.train
        how = subject.macs, subject.step_macs, train.batch_size, train.precision, bool(train.compile)
        memory = subject.kept_bytes(), peak_bytes(subject.step, subject.device)
        measured[name] = Measurements(*how, Times(forwards), Times(steps), *memory, compiling[name])
    return measured


def _both(forward: Callable[[], float], step: Callable[[], float]) -> Callable[[], tuple[float, float]]:
    return lambda: (forward(), step())


def measurements_dict(measured: Measurements) -> dict[str, Any]:
    """Plain values, as JSON holds them."""
    rounds = {"forward": list(measured.forward.rounds), "step": list(measured.step.rounds)}
    rates = {"images_per_second": measured.images_per_second, "macs_per_second": measured.macs_per_second}
    return {**vars(measured), **rounds, **rates}
