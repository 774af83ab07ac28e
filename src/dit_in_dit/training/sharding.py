"""Sharding of models and tensors by FSDP2. Imports are local: PyTorch's sharded tensors take seconds to import."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import torch
from torch import Tensor, nn

from dit_in_dit.config.errors import UserError
from dit_in_dit.model.nested import NestedDiT


def shard(model: NestedDiT) -> None:
    """Shard a model by FSDP2: each block is a group, and all other parameters form one. Every process holds an equal
    part of a group, and the whole group only while the group computes.

    Raises:
        UserError: the model is on the CPU, and this version of PyTorch shards on GPUs only.
    """
    from torch.distributed.fsdp import fully_shard

    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and not hasattr(torch.cpu.Stream, "record_event"):  # PyTorch before 2.7
        raise UserError(
            f"train.parallel=fsdp on a CPU needs PyTorch 2.7 or later: got {torch.__version__}; update PyTorch"
        )
    for block in (*model.outer_blocks, *model.inner_blocks):
        fully_shard(block)
    # By default the last group stays whole after the forward pass, for the backward pass, which an average lacks.
    if any(weight.requires_grad for weight in model.parameters()):
        fully_shard(model)
    else:
        fully_shard(model, reshard_after_forward=True)


def shard_terms(terms: nn.ModuleDict) -> None:
    """Shard the parameters of each loss term by FSDP2, as a group of their own."""
    from torch.distributed.fsdp import fully_shard

    for term in terms.values():
        if any(True for _ in term.parameters()):
            fully_shard(term)


def local_part(tensor: Tensor) -> Tensor:
    """Part of a tensor that this process holds; the whole tensor if it is not sharded. Shares memory."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor; a sharded one is gathered from all processes."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(tensor: Tensor, like: Any) -> Tensor:
    """Copy of a whole tensor with the device and sharding of `like`."""
    if not hasattr(like, "device_mesh"):
        return tensor.to(like.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    placed = tensor.to(like.device)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None).clone()


def replicate_like(tensor: Tensor, like: Any) -> Tensor:
    """A scalar for use with `like` in an optimizer: replicated over the processes if `like` is sharded."""
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim)


class GatheredTensors(UserDict[str, Tensor]):
    """Tensors by name, each gathered from all processes when it is read: a process holds one whole tensor at a time.

    All processes must read every tensor once, in the same order: rank 0 while it writes the file, the others in
    `Session._save`. `data` gives dtypes and shapes without a gather.
    """

    def __getitem__(self, name: str) -> Tensor:
        return full_tensor(self.data[name])
