"""
Import of official model code from checkouts, on a CPU and without most of what that code depends on.

`module` imports one module of a checkout. Packages that the wanted code imports and does not use (trainers, encoders,
registries, text models) are stubs for the time of the import. `torch.compile` is the identity and `Tensor.cuda` does
nothing. `timm.models.vision_transformer` is always the stand-in below, so that no record depends on a version of timm:
PatchEmbed, Attention and Mlp with timm's parameter names and mathematics, as far as these models use them.
"""

import importlib
import subprocess
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional

REPOSITORIES = {
    "REPA": "sihyun-yu/REPA",
    "LightningDiT": "hustvl/LightningDiT",
    "JiT": "undefined443/JiT",
    "PixelDiT": "gcy-hub/PixelDiT",
    "DeCo": "Zehong-Ma/DeCo",
    "PixNerd": "MCG-NJU/PixNerd",
    "DDT": "MCG-NJU/DDT",
    "RAE": "bytetriper/RAE",
    "RAEv2": "nanovisionx/RAEv2",
    "MPDiT": "quandao10/MPDiT",
    "LakonLab": "Lakonik/LakonLab",
}

torch.compile = lambda function=None, **_: function or (lambda given: given)
torch.Tensor.cuda = lambda tensor, *_: tensor  # models call it when they are built, too


class PatchEmbed(nn.Module):
    """Patches of a square image to tokens: a convolution whose stride is its size."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with optional LayerNorm of q and k."""

    fused_attn = True

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = False, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, in_features: int, hidden_features: int, act_layer=nn.GELU, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Nothing:
    """A name of a stub: every attribute is itself, and as a decorator it is the identity."""

    def __getattr__(self, name: str):
        return self

    def __call__(self, *args, **kwargs):
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self


class Stub(ModuleType):
    """A module that has every name; `parts` are those that mean something."""

    def __init__(self, name: str, **parts) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__dict__.update(parts)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()


def commit(checkout: Path) -> str:
    """The commit that is checked out."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def package(name: str, folder: Path) -> ModuleType:
    """A package whose modules are in the folder and whose `__init__.py` is not run."""
    made = ModuleType(name)
    made.__path__ = [str(folder)]
    return made


@contextmanager
def official(root: Path, stubs: Iterable[str], modules: Iterable[ModuleType] = ()):
    """Make imports come from the folder `root` first, with stubs and given modules; afterwards forget what it added."""
    before = dict(sys.modules)
    vision = Stub("timm.models.vision_transformer", PatchEmbed=PatchEmbed, Attention=Attention, Mlp=Mlp)
    added = [Stub("timm"), Stub("timm.models"), vision, *(Stub(name) for name in stubs), *modules]
    sys.modules.update({made.__name__: made for made in added})
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))
        for name in set(sys.modules) - set(before):
            if not name.startswith(("torch.", "numpy.", "einops")):
                del sys.modules[name]
        sys.modules.update(before)


def module(root: Path, name: str, stubs: Iterable[str] = (), modules: Iterable[ModuleType] = ()) -> ModuleType:
    """A module of the folder `root`."""
    with official(root, stubs, modules):
        return importlib.import_module(name)
