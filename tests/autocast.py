"""CUDA's autocast policy on a CPU: which operators compute in half precision, in float32, in the widest type."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"


@cache
def listed(policy: str) -> frozenset[str]:
    """Operators of one of autocast's lists, as the header of the installed PyTorch has them."""
    lines = re.search(rf"#define AT_FORALL_{policy}\(_\)(.*?[^\\])\n", HEADER.read_text(), re.DOTALL)
    assert lines, policy
    return frozenset(re.findall(r"_\((\w+)", lines[1]))


class CudaAutocast(TorchFunctionMode):
    """Casts as `torch.autocast("cuda", half)` does. An operator in no list gets what it is given: one that takes one
    type only, such as lerp, raises at two as on a GPU."""

    def __init__(self, half: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.half = half

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, given: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        name = re.sub(r"^__r?(\w+)__$", r"\1", getattr(function, "__name__", ""))  # __rmatmul__: matmul
        floats = [x.dtype for x in tree_flatten((given, named))[0] if isinstance(x, Tensor) and x.is_floating_point()]
        wanted = None if named and named.get("out") is not None else self._wanted(name, floats)
        if wanted is not None:
            given, named = tree_map_only(
                Tensor, lambda x: x.to(wanted) if x.is_floating_point() else x, (given, named or {})
            )
        return function(*given, **(named or {}))

    def _wanted(self, name: str, floats: list[torch.dtype]) -> torch.dtype | None:
        if torch.float64 in floats or not floats:  # autocast leaves float64 alone
            return None
        if name in listed("LOWER_PRECISION_FP"):
            return self.half
        if name in listed("FP32") | listed("FP32_SET_OPT_DTYPE"):
            return torch.float32
        if name in listed("PROMOTE"):
            return torch.float32 if torch.float32 in floats else floats[0]
        return None
