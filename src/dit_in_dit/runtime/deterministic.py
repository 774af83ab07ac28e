"""The same bits from the same numbers on CUDA, where PyTorch by default takes the faster algorithm."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dit_in_dit.config.errors import UserError

WORKSPACE, SIZES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # with these cuBLAS sums in one order


@contextmanager
def deterministic(device: torch.device, *, on: bool) -> Iterator[None]:
    """PyTorch's deterministic algorithms while a run trains on CUDA; nothing changes on other devices.

    Enter it before anything lies on the device: cuBLAS reads its workspace's size once, at its first product.

    Raises:
        UserError: CUDA has started without the workspace that cuBLAS needs for it.
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
    filling.fill_uninitialized_memory = False  # it finds reads of unset memory, and costs time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        filling.fill_uninitialized_memory = before[1]
