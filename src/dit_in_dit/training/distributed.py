"""Processes that train one run together, on PyTorch's own engine: who is there, what they agree on, and what is done
when one does not answer."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from dit_in_dit.config.errors import UserError
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runtime.process import world_size

T = TypeVar("T")
ROLL_CALL = 3.0  # seconds in which a process that lives says so, after the engine has given up


class ProcessLostError(UserError):
    """Another process of the run ended or does not answer."""

    code = 1


class Process:
    """One process, alone: what `join` gives without a launcher. Process `rank` of `size`; process 0 leads."""

    rank, size = 0, 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def led(self, action: Callable[[], T]) -> T:
        """What `action` gives in process 0, for all; its UserError is raised in all."""
        return action()

    def gather(self, rows: Tensor) -> Tensor:
        """(size, ...) from each process's tensor of the same shape, on its device."""
        return rows[None]

    def agree(self, signal: int, due: bool) -> tuple[int, bool]:
        """The greatest signal and whether anyone was due, the same for all. With several processes it answers for the
        previous call, so nobody waits."""
        return signal, due

    def add(self, tensors: list[Tensor]) -> None:
        """Sum over processes in place, in a fixed tree."""

    def total(self, number: Tensor) -> Tensor:
        """The sum over processes."""
        return number

    @contextmanager
    def watched(self) -> Iterator[None]:
        """LostError instead of the engine's own words when another process is lost."""
        yield


class ProcessGroup(Process):
    """One of several processes, as torchrun or Slurm started them."""

    def __init__(self, timeout: int) -> None:
        self.rank, self.size, self.timeout = dist.get_rank(), dist.get_world_size(), timeout
        self.control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self.asked: tuple[dist.Work, Tensor] | None = None
        self.places: list[tuple[str, int]] = [("", 0)] * self.size
        dist.all_gather_object(self.places, (socket.gethostname(), os.getpid()), group=self.control)
        # A busy machine may take long to connect; a roll call is short.
        self.store = TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=timeout)
        )
        self.store.set_timeout(timedelta(seconds=ROLL_CALL))

    def led(self, action: Callable[[], T]) -> T:
        box: list[T | UserError | None] = [None]
        if self.leads:
            try:
                box = [action()]
            except UserError as error:
                box = [error]
        dist.broadcast_object_list(box, group=self.control)
        if isinstance(box[0], UserError):
            box[0].quiet = not self.leads  # one line, not one from each
            raise box[0]
        return box[0]  # type: ignore[return-value]

    def gather(self, rows: Tensor) -> Tensor:
        found = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(found, rows.contiguous(), group=self.control if rows.device.type == "cpu" else None)
        return torch.stack(found)

    def agree(self, signal: int, due: bool) -> tuple[int, bool]:
        before, given = self.asked, torch.tensor([signal, int(due)])
        self.asked = (dist.all_reduce(given, dist.ReduceOp.MAX, group=self.control, async_op=True), given)
        if before is None:
            return 0, False
        before[0].wait()
        return int(before[1][0]), bool(before[1][1])

    def add(self, tensors: list[Tensor]) -> None:
        # In round k each adds what the process 2^k away has. Two numbers have one sum, whichever comes first: all end
        # with the same bits, those of the tree over micro-batches that a single process climbs alone.
        mine = torch.cat([tensor.flatten() for tensor in tensors])
        for distance in (2**k for k in range(self.size.bit_length() - 1)):
            theirs, other = torch.empty_like(mine), self.rank ^ distance
            swap = [dist.P2POp(dist.isend, mine, other), dist.P2POp(dist.irecv, theirs, other)]
            for work in dist.batch_isend_irecv(swap):
                work.wait()
            mine = mine + theirs
        parts = torch.split(mine, [tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])

    def total(self, number: Tensor) -> Tensor:
        number = number.clone()
        dist.all_reduce(number)
        return number

    @contextmanager
    def watched(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise self._lost() from None

    def _lost(self) -> ProcessLostError:
        """Who does not answer a roll call; ended where it can be, so that its job ends too."""
        atexit.unregister(leave)  # it would wait for them once more
        missing = self._missing()
        names = []
        for rank in missing:
            host, process = self.places[rank]
            names.append(f"process {rank} of {self.size} (pid {process} on {host})")
            if host == socket.gethostname():
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(process, signal.SIGKILL)  # a stopped one hears nothing else
        who = ", ".join(names[:4]) or "a process"
        lost = ProcessLostError(
            f"{who} ended or did not answer within {self.timeout} s: start the job again with --resume"
        )
        lost.quiet = self.rank != min({*range(self.size)} - {*missing}, default=self.rank)
        return lost

    def _missing(self) -> list[int]:
        """Processes that do not answer in time; process 0, which may keep the list, when there is no list."""
        try:
            self.store.set(f"here/{self.rank}", "yes")
            deadline = time.monotonic() + ROLL_CALL
            while missing := [rank for rank in range(self.size) if not self.store.check([f"here/{rank}"])]:
                if time.monotonic() > deadline:
                    return missing
                time.sleep(0.1)
        except RuntimeError:
            return [0]
        return []


def leave() -> None:
    """End the group of processes, unless whoever uses the library did so."""
    if dist.is_initialized():
        dist.destroy_process_group()


def join(device: torch.device, timeout: int) -> Process:
    """This process among those that the launcher started; alone when it started no other.

    Args:
        device: where gradients lie: NCCL sums them on CUDA, gloo elsewhere. A CUDA device has its number.
        timeout: seconds in which each must answer the others.
    """
    if world_size() == 1:
        return Process()
    if not dist.is_initialized():
        # NCCL guesses a process's GPU from its rank where it is not named, and complains of a group that nobody ends.
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), device_id=bound)
        atexit.register(leave)
    return ProcessGroup(timeout)


# ------------------------------------------------------------------------------------------ sharding
# PyTorch's sharded tensors take seconds to import: only who shards waits for them.


def shard(model: NestedDiT) -> None:
    """FSDP2: every block's parameters, and all others together, in equal parts over the processes, at all times but
    while they are needed.

    Raises:
        UserError: the model is on the CPU, and this version of PyTorch shards on GPUs alone.
    """
    from torch.distributed.fsdp import fully_shard

    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and not hasattr(torch.cpu.Stream, "record_event"):  # before 2.7
        raise UserError(f"train.parallel=fsdp on a CPU needs PyTorch 2.7 or later: this is {torch.__version__}")
    for block in (*model.outer_blocks, *model.inner_blocks):
        fully_shard(block)
    # By default the last group stays whole after a forward pass, for the backward pass to come: an average has none.
    if any(weight.requires_grad for weight in model.parameters()):
        fully_shard(model)
    else:
        fully_shard(model, reshard_after_forward=True)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: all of it, unless it is sharded. Shares memory."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor; of a sharded one, gathered from all processes."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def spread(tensor: Tensor, like: Any) -> Tensor:
    """A copy of a whole tensor, on the device of `like`, and sharded as it is."""
    if not hasattr(like, "device_mesh"):
        return tensor.to(like.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    placed = tensor.to(like.device)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None).clone()


def everywhere(tensor: Tensor, like: Any) -> Tensor:
    """A scalar as the optimizer wants it beside `like`."""
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim)


class Whole(Mapping[str, Tensor]):
    """Tensors by name, each gathered from all processes when it is read: no process holds more than one of them whole.

    All processes must read each tensor once, in one order: process 0 as it writes the file, the others in
    `Session._save`. Type and shape of a tensor stand in `tensors` and cost nothing.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return full_tensor(self.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
