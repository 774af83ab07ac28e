"""Cases of a part of the device check: each is written to a file when it begins and when it ends."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn


NO_GPU = "no GPU here"  # the start of a reason
Values = Mapping[str, Any]


class NotHere(Exception):  # not an error: the case is skipped
    """The machine or this version of the package lacks what a case needs."""


def append_line(path: Path, line: Values) -> None:
    """Append a JSON line that survives the end of this process."""
    with path.open("a") as lines:  # one write: processes of a part append to one file
        lines.write(json.dumps(line, default=str) + "\n")
        lines.flush()
        os.fsync(lines.fileno())


class Cases:
    """Runs the cases of one process of a part, and records them.

    Args:
        seconds: no case begins later than this after the start.
        tiny: sizes for a dry run on a CPU.
        share: number of this process, and number of the part's processes.
    """

    def __init__(
        self, path: Path, part: str, device: str, seconds: float, *, tiny: bool = False, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.path, self.part, self.name, self.tiny, self.share = path, part, device, tiny, share
        self.end = time.monotonic() + seconds

    @cached_property
    def device(self) -> torch.device:
        """The device. NotHere if there is none."""
        import torch

        if self.name == "cuda" and not torch.cuda.is_available():
            raise NotHere(f"{NO_GPU}, torch {torch.__version__} sees none")
        from dit_in_dit.runtime.device import pick_device

        return pick_device(self.name)

    def add(self, row: str, case: str, measure: Callable[[], Values], *, needs: float = 0.0) -> Values:
        """Run a case and record what it returns: `says` for the table, `passed` if it is a test, and numbers.

        An error is recorded as a failure. NotHere and a package that is not installed are recorded as skipped, and so
        is a case that `needs` more seconds than are left.

        Raises:
            SystemExit: a CUDA error; the process cannot use its device any more.
        """
        began = time.monotonic()
        line = self._name(row, case)
        if began + needs > self.end:
            return self._write({**line, "state": "skipped", "why": "no time left"})
        self._write({**line, "state": "begun"})
        broken = False
        try:
            values = measure()
            ended: Values = {"state": "failed" if values.get("passed") is False else "done", **values}
        except (NotHere, ModuleNotFoundError) as error:
            ended = {"state": "skipped", "why": _missing(error)}
        except Exception as error:
            ended = {"state": "failed", "why": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            broken = "CUDA error" in str(error)
        gc.collect()
        if "torch" in sys.modules and not broken:
            sys.modules["torch"].cuda.empty_cache()
        self._write(written := {**line, **ended, "seconds": round(time.monotonic() - began, 2)})
        if broken:
            sys.exit(1)
        return written

    def skip(self, error: Exception) -> None:
        """Record that the other cases cannot run, and why."""
        self._write({**self._name("the rest", "the rest"), "state": "skipped", "why": _missing(error)})

    def _name(self, row: str, case: str) -> Values:
        return {"part": self.part, "process": self.share[0], "device": self.name, "row": row, "case": case}

    def _write(self, line: Values) -> Values:
        append_line(self.path, line)
        return line


def _missing(error: Exception) -> str:
    return f"{error.name} is not installed" if isinstance(error, ModuleNotFoundError) else str(error)


@contextmanager
def own_kernels(device: torch.device) -> Iterator[None]:
    """Within a `with` block, the package's own kernels are on."""
    import torch

    from dit_in_dit.model import kernels

    on_cuda = device.type == "cuda"
    name = torch.cuda.get_device_properties(device).name if on_cuda else device.type
    before = dict(kernels.KERNELS)
    kernels.KERNELS[name] = kernels.Kernels(fused=True, tiny_up_to=16 if on_cuda else 0)
    try:
        yield
    finally:
        kernels.KERNELS.clear()
        kernels.KERNELS.update(before)


def compile_by_block(model: nn.Module, *, tiny: bool) -> None:
    """Compile the blocks of a model in place, as train.compile does; tiny: only trace them, in a tenth of the time."""
    import torch

    from dit_in_dit.model import compiled

    torch.compiler.reset()
    compiled.BACKEND = "aot_eager" if tiny else "inductor"
    if blocks := getattr(model, "transformer_blocks", None):  # of diffusers
        for block in blocks:
            block.compile(backend=compiled.BACKEND)
    else:
        compiled.compile_blocks(model)
