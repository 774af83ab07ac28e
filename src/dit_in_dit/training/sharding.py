"""Sharding of models and tensors by FSDP2. Imports are local: PyTorch's sharded tensors take seconds to import."""

from __future__ import annotations

from collections import UserDict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dit_in_dit.config.errors import UserError
from dit_in_dit.model.nested import NestedDiT


def sharding_mesh(size: int, part: int, device: torch.device, timeout: int) -> Any:
    """Device mesh (replicate, shard) of `size` processes, in which `part` consecutive ranks hold one sharded copy
    (HSDP); None if all hold one. A process must answer within `timeout` seconds."""
    if part in (0, size):
        return None
    from torch.distributed.device_mesh import DeviceMesh

    ranks = torch.arange(size).view(-1, part)
    # Groups that a mesh makes itself have the default timeout of their backend.
    limit = timedelta(seconds=timeout)
    new: Any = dist.new_subgroups_by_enumeration
    groups = [new(of.tolist(), timeout=limit)[0] for of in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def shard(model: NestedDiT, mesh: Any = None, *, bfloat16: bool = False) -> None:
    """Shard a model by FSDP2: each block is a group, and all other parameters form one. Every process holds an equal
    part of a group, and the whole group only while the group computes.

    Args:
        mesh: of `sharding_mesh`.
        bfloat16: blocks are gathered in bfloat16, for a model that computes under autocast to bfloat16. Gradients are
            summed in float32.

    Raises:
        UserError: the model is on the CPU, and this version of PyTorch shards on GPUs only.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and not hasattr(torch.cpu.Stream, "record_event"):  # PyTorch before 2.7
        raise UserError(
            f"train.parallel=fsdp on a CPU needs PyTorch 2.7 or later: got {torch.__version__}; update PyTorch"
        )
    # Inputs stay as they are: tokens and conditioning rows in float32, cast by autocast where products read them.
    low = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in (*model.outer_blocks, *model.inner_blocks):
        fully_shard(block, mesh=mesh, mp_policy=low if bfloat16 and _is_cast_whole(block) else MixedPrecisionPolicy())
    # By default the last group stays whole after the forward pass, for the backward pass, which an average lacks.
    trained = any(weight.requires_grad for weight in model.parameters())
    fully_shard(model, mesh=mesh, reshard_after_forward=None if trained else True)


def _is_cast_whole(block: nn.Module) -> bool:
    """Whether autocast casts all parameters of a block, those of products. It leaves scales of norms in float32."""
    holders = [module for module in block.modules() if next(module.parameters(recurse=False), None) is not None]
    return all(type(module) in (nn.Linear, nn.Conv2d) for module in holders)


def shard_terms(terms: nn.ModuleDict, mesh: Any) -> None:
    """Shard the parameters of each loss term by FSDP2, as a group of their own."""
    from torch.distributed.fsdp import fully_shard

    for term in terms.values():
        if any(True for _ in term.parameters()):
            fully_shard(term, mesh=mesh)


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


def gather_like(part: Tensor, like: Any) -> Tensor:
    """The whole tensor of which every process holds a part, sharded as `like`; `part` itself if `like` is not
    sharded. All processes must call."""
    if not hasattr(like, "device_mesh"):
        return part
    from torch.distributed.tensor import DTensor

    form = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, **form).full_tensor()


def part_like(tensor: Tensor, like: Any) -> Tensor:
    """This process's part of a whole tensor, sharded as `like`; `tensor` itself if `like` is not sharded."""
    return local_part(shard_like(tensor, like)) if hasattr(like, "device_mesh") else tensor


def replicate_like(tensor: Tensor, like: Any) -> Tensor:
    """A scalar for use with `like` in an optimizer: replicated over the processes if `like` is sharded."""
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim)


class GatheredTensors(UserDict[str, Tensor]):
    """Tensors by name, each gathered from all processes when it is read: a process holds one whole tensor at a time.

    All processes must read every tensor once, in the same order: rank 0 while it writes or copies them, the others in
    `Saver`. `data` gives dtypes and shapes without a gather.
    """

    def __getitem__(self, name: str) -> Tensor:
        return full_tensor(self.data[name])
