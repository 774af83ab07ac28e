"""Every choice of the config on the device, against float64 on the CPU: outputs, losses and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache, partial
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from warnings import catch_warnings

import torch
from torch import Tensor

from dit_in_dit.benchmark.device.cases import Cases, Values, compile_by_block, own_kernels
from dit_in_dit.benchmark.device.rates import relative_error
from dit_in_dit.config.choices import KEYS, choice_names
from dit_in_dit.config.errors import LeftOutWarning, UserError
from dit_in_dit.config.files import override
from dit_in_dit.config.model import InnerConfig, ModelConfig, OuterConfig, TokensConfig
from dit_in_dit.config.run import DiffusionConfig, RunConfig
from dit_in_dit.config.samplers import SAMPLERS
from dit_in_dit.diffusion.objective import Objective
from dit_in_dit.diffusion.samplers import denoise
from dit_in_dit.model.nested import NestedDiT

# Largest relative error of an output or a gradient. Small models that were perturbed differ more than trained ones.
MOST = {"float32": 1e-3, "bfloat16": 5e-2}
WAYS = (
    *(("eager", "float32"), ("eager", "bfloat16"), ("own kernels", "float32"), ("own kernels", "bfloat16")),
    *(("compiled", "bfloat16"), ("compiled", "float32")),
)
FLOOR = 0.05  # a gradient's error is relative to its norm, or to this share of the largest gradient's norm
# 16x8 images in 8 patches of 4 sub-patches, all parts of a model in use.
SMALL = (
    *("model.image_size=[16, 8]", "model.patch_size=4", "model.num_classes=5", "model.stages=inner outer*2 inner"),
    *("model.outer.width=32", "model.outer.num_heads=4"),
    *("model.inner.sub_patch=2", "model.inner.width=16", "model.inner.num_heads=2", "diffusion.split_rank=3"),
)
# What a value may need beside it; the first that the config accepts is taken.
COMPANIONS = (
    *((), ("model.inner.width=32",), ("model.inner.condition=outer",), ("diffusion.path=ddpm",)),
    ("model.tokens.label=2",),
)
OTHERS = (  # of keys without a list of values
    *("model.bottleneck=5", "model.inner.embed_layers=2", "model.tokens.label=2 model.tokens.start=1"),
    *("model.tokens.time=1 model.outer.rope=grid", "model.num_classes=0", "diffusion.frequency_weight=1"),
    "model.qk_norm=true model.outer.rope=extent model.outer.bias=none model.inner.rope=grid model.inner.bias=mlp",
    "model.inner.mlp=hyper model.inner.modulation=none model.inner.condition=outer model.inner.head_condition=rows",
    "model.inner.modulation=post model.inner.condition=outer_per_block model.inner.mixer=compact",
)


def choices_of(section: type) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every choice of a config section: named and registered values, true and false."""
    prefix = section.prefix  # type: ignore[attr-defined]
    for name, hint in get_type_hints(section).items():
        for kind in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
            if get_origin(kind) is Literal or kind is bool:
                key, built_in = f"{prefix}.{name}", get_args(kind) or (False, True)
                for value in choice_names(key, built_in) if key in KEYS else built_in:
                    yield key, value


def every_choice() -> dict[str, RunConfig]:
    """Small configs that have, each, one more choice than the defaults; all values of all choices are there. A value
    that no companion makes valid is left out."""
    small, configs = override(RunConfig(), SMALL), {"defaults": override(RunConfig(), SMALL)}
    sections = (OuterConfig, InnerConfig, ModelConfig, TokensConfig, DiffusionConfig)
    sets = [f"{key}={str(value).lower()}" for section in sections for key, value in choices_of(section)]
    for text in [*sets, *OTHERS]:
        for companions in COMPANIONS:
            try:
                with catch_warnings(category=LeftOutWarning, action="error"):
                    config = override(small, [*text.split(), *companions])
            except (UserError, LeftOutWarning):
                continue
            if config not in configs.values():
                configs[text] = config
            break
    return configs


def measure_right(cases: Cases) -> None:
    """Every choice: eager, then with the package's own kernels, then compiled block by block."""
    device, (number, count) = cases.device, cases.share
    configs = list(every_choice().items())[number :: 29 if cases.tiny else count]
    for way, precision in WAYS:
        compiled = way == "compiled"
        for name, config in configs:
            if not (compiled and name.startswith("diffusion.")):  # of which blocks know nothing
                measure = partial(_compare, config, device, precision, way, cases.tiny)
                cases.add(f"{way}, {precision}", name, measure, needs=8 if compiled else 0)
    if number == 0:
        for sampler, rules in SAMPLERS.items():
            for path in rules.schedulers:
                cases.add("samplers, float32", f"{sampler}, {path}", partial(_sampler, sampler, path, device))
        cases.add("optimizers, float32", "all", partial(_optimizers, device))


def _model(config: RunConfig) -> NestedDiT:
    """The config's model in float64 with noise on every weight: adaLN-Zero would hide most of it."""
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = NestedDiT(config.model).double()
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
        if model.split is not None:
            model.split.basis.copy_(torch.linalg.qr(torch.randn(model.split.basis.shape, generator=draw).T)[0].T)
    return model


def _inputs(config: RunConfig, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Images, noise, times and labels; the first label is the null class."""
    draw, model = torch.Generator().manual_seed(7), config.model
    x, noise = (torch.randn(4, *model.image_shape, generator=draw).to(dtype) for _ in range(2))
    t = Objective(config.diffusion).path.snap(0.05 + 0.9 * torch.rand(4, generator=draw, dtype=torch.float64)).float()
    return x, noise, t, (model.num_classes - torch.arange(4) % (model.num_classes + 1))


def _results(config: RunConfig, model: NestedDiT, device: torch.device, precision: str) -> dict[str, Tensor]:
    """Outputs, losses, and gradients of the mean loss by parameter, on the CPU."""
    dtype = next(model.parameters()).dtype
    x, noise, t, y = (part.to(device) for part in _inputs(config, dtype))
    seen: list[Tensor] = []

    def predict(*inputs: Tensor | None) -> Tensor:
        seen.append(model(*inputs))
        return seen[-1]

    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        losses = Objective(config.diffusion).loss(predict, x, noise, t, y if config.model.num_classes else None)
    losses.mean().backward()  # type: ignore[no-untyped-call]
    gradients = {name: part.grad for name, part in model.named_parameters() if part.grad is not None}
    return {name: value.detach().cpu() for name, value in {"output": seen[0], "losses": losses, **gradients}.items()}


@cache
def _exact(config: RunConfig) -> dict[str, Tensor]:
    return _results(config, _model(config), torch.device("cpu"), "float64")


def _compare(config: RunConfig, device: torch.device, precision: str, way: str, tiny: bool) -> Values:
    model = _model(config).float().to(device)
    if way == "compiled":
        compile_by_block(model, tiny=tiny)
    with own_kernels(device) if way == "own kernels" else nullcontext():
        found = _results(config, model, device, precision)
    exact = _exact(config)
    floor = FLOOR * max(float(value.norm()) for name, value in exact.items() if name not in ("output", "losses"))
    errors = {
        name: relative_error(found[name], value, 0.0 if name in ("output", "losses") else floor)
        for name, value in exact.items()
    }
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    passed = found.keys() == exact.keys() and errors[worst] < MOST[precision]
    why = {} if passed else {"why": f"error {errors[worst]:.1e} of {worst}"}
    return {"error": errors[worst], "worst": worst, "output": errors["output"], "passed": passed, **why}


def _sampler(name: str, path: str, device: torch.device) -> Values:
    """Samples of a small model in float32, on the device and on the CPU from the same noise."""
    config = override(RunConfig(), [*SMALL, f"diffusion.path={path}", f"sample.sampler={name}", "sample.steps=10"])
    _, noise, _, y = _inputs(config, torch.float32)
    model, results = _model(config).float(), []
    for place in (torch.device("cpu"), device):
        draw = torch.Generator().manual_seed(1)
        first: list[Tensor] = [noise]

        def drawn(first: list[Tensor] = first, draw: torch.Generator = draw, place: torch.device = place) -> Tensor:
            return (first.pop() if first else torch.randn(noise.shape, generator=draw)).to(place)

        with torch.inference_mode():
            results.append(denoise(model.to(place), config.diffusion, config.sample, drawn, y.to(place)).cpu())
    error = relative_error(results[1], results[0])
    return {"error": error, "passed": error < MOST["float32"]}


def _optimizers(device: torch.device) -> Values:
    """Three steps of every optimizer in float32, against float64 on the CPU."""
    from dit_in_dit.training.optimizer import OPTIMIZERS

    errors: dict[str, float] = {}
    for name, make in OPTIMIZERS.items():
        results = []
        for place, dtype in ((torch.device("cpu"), torch.float64), (device, torch.float32)):
            draw = torch.Generator().manual_seed(0)
            weight = torch.nn.Parameter(torch.randn(4096, generator=draw).to(place, dtype))
            optimizer: Any = make([{"params": [weight], "scale": 1.0}], RunConfig().train)
            for _ in range(3):
                weight.grad = torch.randn(4096, generator=draw).to(place, dtype)
                optimizer.step()
            results.append(weight.detach().cpu())
        errors[name] = relative_error(results[1], results[0])
    return {"error": max(errors.values()), "errors": errors, "passed": max(errors.values()) < MOST["float32"]}
