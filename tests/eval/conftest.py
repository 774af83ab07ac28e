"""What the feature networks' packages need before they are imported, and no way out of the machine.

Tests load it by its place; the commands that they start import it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

try:
    import torchvision
except ImportError:
    pass  # the tests say what to do
except RuntimeError:
    # Made for another build of torch, torchvision cannot load its operators but asks for two of them when it is
    # imported. Nothing used here calls them.
    OPERATORS = torch.library.Library("torchvision", "DEF")  # they last as long as this does
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401


class Download(BaseException):
    """Not an Exception, which libraries catch to try something else."""


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Stop whoever asks for an address outside. Sockets between processes have a path, not a (host, port)."""
    outside = event == "socket.connect" and isinstance(arguments[1], tuple)
    if outside or event in ("urllib.Request", "socket.getaddrinfo"):
        raise Download(f"{event}: {arguments}")


sys.addaudithook(_refuse)
