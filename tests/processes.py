"""Several processes that train one run, quickly started and never left behind."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["dit_in_dit.training.loop", "dit_in_dit.sampling.numbered", "processes"])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _enter(rank: int, world: int, port: int, function: Callable[..., Any], arguments: tuple, told: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if world == 1:
        del os.environ["WORLD_SIZE"]
    import torch

    torch.set_num_threads(1)
    try:
        told.send((True, function(*arguments)))
    except BaseException as error:  # told to who waits
        told.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        told.close()
        os._exit(1)  # the engine's own end may wait for processes that are gone
    told.close()


class Together:
    """`world` processes that run `function(*arguments)` as torchrun would start them."""

    def __init__(self, world: int, function: Callable[..., Any], *arguments: Any) -> None:
        port, self.processes, self.pipes = free_port(), [], []
        for rank in range(world):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            what = (rank, world, port, function, arguments, theirs)
            process = CONTEXT.Process(target=_enter, args=what, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def end(self, timeout: float = 120) -> list[tuple[bool, Any]]:
        """What each gave or raised; all are gone afterwards. (False, "") for one that was killed."""
        deadline, found = time.monotonic() + timeout, []
        try:
            for pipe in self.pipes:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"a process gave nothing in {timeout} s")
                try:
                    found.append(pipe.recv())
                except EOFError:
                    found.append((False, ""))
            for process in self.processes:
                process.join(max(0.0, deadline - time.monotonic()))
                assert process.exitcode is not None, "a process did not end"
        finally:
            for process in self.processes:
                process.kill()
                process.join()
        return found


def run_together(world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """What each process gave; fails when one raised."""
    found = Together(world, function, *arguments).end(timeout)
    for good, value in found:
        assert good, value
    return [value for _, value in found]


def trained(config: Any, out: Path, resume: bool, until: int | None = None) -> list[tuple[str, int, dict]]:
    """Facts of `train` in this process, as plain values."""
    from dit_in_dit.training.loop import train

    facts = train(config, out, resume=resume, device="cpu", until=until)
    return [(fact.kind, fact.step, fact.values) for fact in facts]
