"""
Records of what official models of the field compute, and their weights drawn again.

`golden/field/NAME.npz` is made by `golden/make_field_outputs.py` (which imports the numbers of this module) and says what
its keys are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden" / "field"


def draw(key: int) -> np.random.Generator:
    """The stream of numbers `key`."""
    return np.random.Generator(np.random.Philox(key=[key, 0]))


def normal(stream: np.random.Generator, *shape: int) -> Tensor:
    """The stream's next normal numbers."""
    return torch.from_numpy(stream.standard_normal(shape, np.float32))
