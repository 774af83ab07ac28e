"""Optimizers by name, the learning rate by step, and the state as tensors by parameter name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.training.muon import MuonAdamW, matrix_groups
from dit_in_dit.training.sharding import local_part, replicate_like, shard_like

Groups = list[dict[str, Any]]  # `params`, and `scale`, the factor on their learning rate
Named = Iterable[tuple[str, Tensor]]  # (name, parameter)
PREFIX, NUMBER, GROUP = "optimizer.", "optimizer_number.", "optimizer_group."  # prefixes of names in a checkpoint


def _adam(kind: Callable[..., Optimizer], groups: Groups, train: TrainConfig) -> Optimizer:
    """Adam or AdamW; fused where the device has a fused step, which can skip itself without waiting for the device."""
    fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
    return kind(groups, betas=(0.9, train.beta2), weight_decay=train.weight_decay, fused=fused)


def _muon(groups: Groups, train: TrainConfig) -> Optimizer:
    """Muon for groups with `parts`, AdamW for others."""
    return _adam(partial(MuonAdamW, adjust=train.muon_adjust, scale=train.muon_scale), groups, train)


OPTIMIZERS: dict[str, Callable[[Groups, TrainConfig], Optimizer]] = {
    "adamw": partial(_adam, torch.optim.AdamW),  # decoupled weight decay (Loshchilov & Hutter 2019)
    "adam": partial(_adam, torch.optim.Adam),  # weight decay is added to the gradient (Kingma & Ba 2015)
    "muon": _muon,  # matrices of blocks: orthogonalised steps (Jordan et al. 2024); others: AdamW
}


def configured(train: TrainConfig, model: nn.Module, groups: Groups) -> Optimizer:
    """The optimizer of train.optimizer for parameter groups of a model."""
    return OPTIMIZERS[train.optimizer](matrix_groups(groups, model) if train.optimizer == "muon" else groups, train)


def learning_rate(train: TrainConfig, step: int) -> float:
    """Learning rate of optimizer step `step` (from 0), which depends only on the step."""
    if step < train.warmup:
        return train.learning_rate * (step + 1) / train.warmup
    if train.schedule == "constant":
        return train.learning_rate
    progress = (step - train.warmup) / max(1, train.steps - train.warmup)
    return train.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def check_optimizer(optimizer: object, weights: Iterable[Tensor]) -> None:
    """Check that a user's function returned an optimizer of all weights, in the groups that it received. Raises
    UserError."""
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"the optimizer must be a torch.optim.Optimizer: got {type(optimizer).__name__}; return one")
    if not all("scale" in group for group in optimizer.param_groups):
        raise UserError("the optimizer lost the factors on the learning rate (`scale`): pass all groups unchanged")
    taken = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    if lost := sum(weight.requires_grad and id(weight) not in taken for weight in weights):
        raise UserError(f"the optimizer lacks {lost} of the model's weights: pass all groups unchanged")


def is_fused(optimizer: Optimizer) -> bool:
    """Whether `step()` reads `found_inf` on the device, and does nothing if it is 1."""
    return all(group.get("fused") for group in optimizer.param_groups)


def is_trained(state: Iterable[str]) -> bool:
    """Whether a checkpoint's tensor names include training state; a run cannot resume from weights alone."""
    return any(name.startswith((PREFIX, "run.")) for name in state)


def state_of(optimizer: Optimizer, parameters: Named) -> dict[str, Tensor]:
    """State of the optimizer as tensors by name, sharded as the parameters are.

    `optimizer.KEY.PARAMETER` is a tensor of the state, `optimizer_number.KEY.PARAMETER` a Python number of the state,
    and `optimizer_group.GROUP.KEY` a number of a parameter group that differs from the optimizer's default.
    """
    tensors = {}
    for name, parameter in parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{PREFIX}{key}.{name}"] = value
            elif value is not None:
                tensors[f"{NUMBER}{key}.{name}"] = _as_tensor(value)
    for number, group in enumerate(optimizer.param_groups):
        for key, default in optimizer.defaults.items():
            if key != "lr" and type(group[key]) in (int, float) and group[key] != default:
                tensors[f"{GROUP}{number}.{key}"] = _as_tensor(group[key])
    return tensors


def _as_tensor(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else torch.int64)


def restore_state(optimizer: Optimizer, parameters: Named, state: Mapping[str, Tensor]) -> None:
    """Restore the state that `state_of` returned; tensors are copied."""
    known = dict(parameters)
    optimizer.state.clear()
    for full in state:
        kind, _, rest = full.partition(".")
        first, _, name = rest.partition(".")
        if f"{kind}." == PREFIX:
            value = _placed(state[full], first, known[name], fused=is_fused(optimizer))
            optimizer.state[known[name]][first] = value
        elif f"{kind}." == NUMBER:
            optimizer.state[known[name]][first] = state[full].item()
        elif f"{kind}." == GROUP:
            optimizer.param_groups[int(first)][name] = state[full].item()


def _placed(value: Tensor, key: str, parameter: Tensor, *, fused: bool) -> Tensor:
    """Copy of a state tensor on the device that PyTorch's optimizers expect: the parameter's device, or the CPU
    for the step count of an optimizer without a fused step."""
    if key != "step" and value.shape == parameter.shape:
        return shard_like(value, parameter)
    device = "cpu" if key == "step" and not fused else local_part(parameter).device
    return replicate_like(value.to(device, copy=True), parameter)


def reached_by_gradient(optimizer: Optimizer, parameter: Tensor) -> Tensor | None:
    """Mask of a parameter's elements that a gradient has reached: elements with a non-zero moment.

    None if the optimizer keeps no tensor of the parameter's shape.
    """
    tensors = [value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor)]
    moments = [value != 0 for value in tensors if value.shape == parameter.shape]
    return torch.stack(moments).any(0) if moments else None


def adam_direction(optimizer: Optimizer, parameter: Tensor) -> Tensor | None:
    """Adam's or Muon's step divided by the learning rate, from the moments; None for other optimizers."""
    if isinstance(optimizer, MuonAdamW) and (direction := optimizer.direction(parameter)) is not None:
        return direction
    state, betas = optimizer.state.get(parameter, {}), optimizer.param_groups[0].get("betas")
    if not betas or not {"step", "exp_avg", "exp_avg_sq"} <= state.keys():
        return None
    step = float(state["step"])
    first, second = state["exp_avg"] / (1 - betas[0] ** step), state["exp_avg_sq"] / (1 - betas[1] ** step)
    return first / (second.sqrt() + 1e-8)
