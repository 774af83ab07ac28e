"""Processes that train one run together, on torch.distributed: sums, agreement, and loss of a process."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.runtime.process import world_size

T = TypeVar("T")
BUCKET = 100  # MB of gradients that DDP sums at once on CUDA
ROLL_CALL = 3.0  # seconds in which a live process must report, after torch.distributed has given up


class ProcessLostError(UserError):
    """Another process of the run ended or does not answer."""

    code = 1


class Process:
    """The only process of a run without a launcher: `rank` 0 of `size` 1. In a group, rank 0 leads."""

    rank, size = 0, 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints for all."""
        return self.rank == 0

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and broadcast its result, or re-raise its UserError on every rank."""
        return action()

    def gather(self, rows: Tensor) -> Tensor:
        """Stack tensors of all processes into (size, ...) on the same device. All tensors have the same shape."""
        return rows[None]

    def agree(self, signal: int, due: bool) -> tuple[int, bool]:
        """Largest `signal` of all processes, and whether `due` is true in any process; the same result on every rank.
        With several processes the result is that of the previous call, so that no process waits."""
        return signal, due

    def add(self, tensors: list[Tensor]) -> None:
        """Sum tensors over processes in place, in the order of a fixed tree."""

    def total(self, number: Tensor) -> Tensor:
        """Sum of a number over processes."""
        return number

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Raise ProcessLostError instead of torch.distributed's error when another process is lost."""
        yield


class ProcessGroup(Process):
    """One of several processes, started by torchrun or Slurm."""

    def __init__(self, timeout: int) -> None:
        self.rank, self.size, self.timeout = dist.get_rank(), dist.get_world_size(), timeout
        self.control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self.asked: tuple[dist.Work, Tensor] | None = None
        self.hosts: list[tuple[str, int]] = [("", 0)] * self.size  # host name and pid, by rank
        dist.all_gather_object(self.hosts, (socket.gethostname(), os.getpid()), group=self.control)
        # A busy machine may take long to connect, but must answer a roll call soon.
        self.store = TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=timeout)
        )
        self.store.set_timeout(timedelta(seconds=ROLL_CALL))

    def on_main(self, action: Callable[[], T]) -> T:
        box: list[T | UserError | None] = [None]
        if self.is_main:
            try:
                box = [action()]
            except UserError as error:
                box = [error]
        dist.broadcast_object_list(box, group=self.control)
        if isinstance(box[0], UserError):
            box[0].quiet = not self.is_main  # one line, not one per process
            raise box[0]
        return box[0]  # type: ignore[return-value]

    def gather(self, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(gathered, rows.contiguous(), group=self.control if rows.device.type == "cpu" else None)
        return torch.stack(gathered)

    def agree(self, signal: int, due: bool) -> tuple[int, bool]:
        previous, largest = self.asked, torch.tensor([signal, int(due)])
        self.asked = (dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control, async_op=True), largest)
        if previous is None:
            return 0, False
        previous[0].wait()
        return int(previous[1][0]), bool(previous[1][1])

    def add(self, tensors: list[Tensor]) -> None:
        # In round k every process exchanges sums with the process of rank XOR 2^k. a + b == b + a, so that all end with
        # the same bits: those of the tree over micro-batches in a single process.
        total = torch.cat([tensor.flatten() for tensor in tensors])
        for distance in (2**k for k in range(self.size.bit_length() - 1)):
            received, other = torch.empty_like(total), self.rank ^ distance
            swap = [dist.P2POp(dist.isend, total, other), dist.P2POp(dist.irecv, received, other)]
            for work in dist.batch_isend_irecv(swap):
                work.wait()
            total = total + received
        parts = torch.split(total, [tensor.numel() for tensor in tensors])
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
        """Error that names the processes missing from a roll call. Missing processes on this host are killed, so
        that their job ends too."""
        atexit.unregister(leave_group)  # it would wait for the missing processes again
        missing = self._missing()
        names = []
        for rank in missing:
            host, process = self.hosts[rank]
            names.append(f"process {rank} of {self.size} (pid {process} on {host})")
            if host == socket.gethostname():
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(process, signal.SIGKILL)  # a stopped process reacts to no other signal
        who = ", ".join(names[:4]) or "a process"
        lost = ProcessLostError(
            f"{who} ended or did not answer within {self.timeout} s: start the job again with --resume"
        )
        lost.quiet = self.rank != min({*range(self.size)} - {*missing}, default=self.rank)
        return lost

    def _missing(self) -> list[int]:
        """Ranks that miss the roll call. If the store does not answer: rank 0, which may host the store."""
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


def leave_group() -> None:
    """End the process group, unless the user of the library has ended it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def join_group(device: torch.device, timeout: int) -> Process:
    """Join the processes that the launcher started; a single `Process` without a launcher.

    `device` holds the gradients; a CUDA device must have an index. NCCL sums on CUDA, gloo elsewhere. A process must
    answer within `timeout` seconds.
    """
    if world_size() == 1:
        return Process()
    if not dist.is_initialized():
        # Without device_id NCCL guesses the GPU from the rank. NCCL warns about a group that is not destroyed.
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), device_id=bound)
        atexit.register(leave_group)
    return ProcessGroup(timeout)


def check_process_count(train: TrainConfig, size: int) -> None:
    """Check that `size` processes can share the run's batches. Raises UserError."""
    if train.reduction == "fast" and train.batch_size % size:
        raise UserError(
            f"train.batch_size must be a multiple of the number of processes ({size}): got {train.batch_size}"
        )
    if train.reduction == "fixed" and (size & (size - 1) or train.accumulate % size):
        raise UserError(
            f"train.reduction=fixed needs a number of processes that is a power of two and divides train.accumulate="
            f"{train.accumulate}: got {size} processes; change their number, or raise train.accumulate"
        )
    if train.shard and size > 1 and size % train.shard:
        raise UserError(f"train.shard must divide the number of processes ({size}): got {train.shard}")
    if train.compile == "graphs" and size > 1:
        raise UserError(f"train.compile=graphs needs a single process: got {size}; set train.compile=true")


def data_parallel(module: nn.Module, device: torch.device) -> DistributedDataParallel:
    """DDP of a module: every process holds all weights, and the means of gradients are exchanged."""
    known = signature(DistributedDataParallel).parameters  # PyTorch 2.14 renames the first
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {sync: False, "gradient_as_bucket_view": True}
    if device.type == "cuda":  # elsewhere the sums would change in the last bits
        options["bucket_cap_mb"] = BUCKET
    return DistributedDataParallel(module, **options)
