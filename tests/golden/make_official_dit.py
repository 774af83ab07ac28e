"""
Make `official_dit.npz`: a tiny official DiT with its weights, one input and the output it gives.

The model is `models.DiT` of https://github.com/facebookresearch/DiT at commit
ed81ce2229091fd4ecc9a223645f95cf379d582b. It is imported from a checkout of that repository, none of whose
code is kept here. Needs torch, numpy and timm; the record was made with torch 2.13.0 and timm 1.0.31:

    git clone https://github.com/facebookresearch/DiT
    git -C DiT checkout ed81ce2229091fd4ecc9a223645f95cf379d582b
    python tests/golden/make_official_dit.py --dit DiT

Keys of the record:

- `state/NAME`: float32, every entry of the tiny model's state dict. All trainable parameters are drawn from
  N(0, 0.2^2), so that the parts which the official initialisation sets to zero matter; `pos_embed` is the
  official one.
- `x` (3, 4, 8, 8) float32, `t` (3,) int64, `y` (3,) int64 and `out` (3, 4, 8, 8) float32: the arguments and
  the result of the eval-mode forward pass. Label 10 is the null class.
- `init_mean/NAME`, `init_std/NAME`: float64 scalars, the mean and the (population) standard deviation of each
  parameter, `pos_embed` too, of a fresh model of width 128 after the official initialisation.
"""

import argparse
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

OUTPUT = Path(__file__).with_name("official_dit.npz")
TINY_WIDTH, INIT_WIDTH = 32, 128
PARAM_STD = 0.2


def load_dit_class(checkout: Path) -> type[nn.Module]:
    """The class `DiT` of `models.py` in the checkout."""
    path = checkout / "models.py"
    spec = importlib.util.spec_from_file_location("official_dit_models", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"no models.py in {checkout}: give a checkout of facebookresearch/DiT")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DiT


def build(dit: type[nn.Module], hidden_size: int) -> nn.Module:
    """A freshly initialised model, the same one on every call."""
    torch.manual_seed(0)
    return dit(
        input_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=hidden_size,
        depth=2,
        num_heads=4,
        num_classes=10,
        class_dropout_prob=0.1,
        learn_sigma=False,
    )


def init_statistics(model: nn.Module) -> dict[str, np.ndarray]:
    """Mean and population standard deviation of every parameter, as float64 scalars."""
    record = {}
    for name, param in model.named_parameters():
        values = param.detach().numpy().astype(np.float64)
        record[f"init_mean/{name}"] = np.asarray(values.mean())
        record[f"init_std/{name}"] = np.asarray(values.std())
    return record


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Overwrite every trainable parameter with normal values; `pos_embed` is not trainable."""
    for param in model.parameters():
        if param.requires_grad:
            param.normal_(std=PARAM_STD, generator=generator)


@torch.no_grad()
def forward_record(model: nn.Module, generator: torch.Generator) -> dict[str, np.ndarray]:
    """State dict, input and output of one eval-mode forward pass."""
    x = torch.randn(3, 4, 8, 8, generator=generator)
    t = torch.tensor([0, 537, 999])
    y = torch.tensor([3, 10, 0])
    tensors: dict[str, Tensor] = {f"state/{name}": value for name, value in model.state_dict().items()}
    tensors |= {"x": x, "t": t, "y": y, "out": model.eval()(x, t, y)}
    return {name: value.numpy() for name, value in tensors.items()}


def main() -> None:
    """Write the record next to this script."""
    parser = argparse.ArgumentParser(description="Make official_dit.npz from the official DiT code.")
    parser.add_argument("--dit", type=Path, required=True, help="path of the checkout")
    dit = load_dit_class(parser.parse_args().dit)
    record = init_statistics(build(dit, INIT_WIDTH))
    model = build(dit, TINY_WIDTH)
    generator = torch.Generator().manual_seed(0)
    randomise(model, generator)
    record |= forward_record(model, generator)
    np.savez_compressed(OUTPUT, **record)
    print(f"{OUTPUT}: {len(record)} arrays, {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
