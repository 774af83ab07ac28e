"""Deterministic algorithms on CUDA; by default, PyTorch prefers faster algorithms there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dit_in_dit.config.errors import UserError

WORKSPACE, SIZES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # with these cuBLAS is deterministic


@contextmanager
def deterministic(device: torch.device, *, on: bool) -> Iterator[None]:
    """Use PyTorch's deterministic algorithms while a run trains on CUDA; other devices are unchanged.

    Enter this context before anything is on the device: cuBLAS reads the workspace size only at its first product.

    Raises:
        UserError: CUDA was used before, without the workspace that cuBLAS needs to be deterministic.
    """
    if not on or device.type != "cuda":
        yield
        return
    if os.environ.get(WORKSPACE) not in SIZES:
        started = torch.cuda.is_initialized() and torch.cuda.max_memory_allocated(device)  # type: ignore[no-untyped-call]
        if started:
            raise UserError(f"the same bits on CUDA need {WORKSPACE}={SIZES[0]} before CUDA starts: set it and restart")
        os.environ[WORKSPACE] = SIZES[0]
    filling: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = False  # only a debugging aid, and slow
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        filling.fill_uninitialized_memory = before[1]
