"""
Make `official_outputs.npz`: what the official DiT and SiT compute with known weights, and what their weights look like.

The code is that of https://github.com/facebookresearch/DiT at commit ed81ce2229091fd4ecc9a223645f95cf379d582b and of
https://github.com/willisma/SiT at commit 947f95bd3a510e9af441d38c1e9f72e0eee873c5. It is imported from checkouts of
those repositories, none of whose code is kept here. Needs torch, numpy and timm; the record was made with torch 2.13.0,
numpy 2.4.6 and timm 1.0.31:

    git clone https://github.com/facebookresearch/DiT
    git -C DiT checkout ed81ce2229091fd4ecc9a223645f95cf379d582b
    git clone https://github.com/willisma/SiT
    git -C SiT checkout 947f95bd3a510e9af441d38c1e9f72e0eee873c5
    python tests/golden/make_official_outputs.py --dit DiT --sit SiT

Numbers come from `draw(key)`, streams of numpy's Philox, so that a test can draw them again and the record stays
small: draw(1) gives the weights of the tiny model in the order of its state dict, N(0, 0.2^2), without `pos_embed`;
draw(2) the noise of samplers, (2, 4, 8, 8) at each call; draw(3) everything else, in the order of the keys below.

Keys of the record:

- `shapes/NAME`: JSON, {name: shape} of the state dict of DiT-S/2, DiT-B/4, DiT-XL/2 for 32x32 latents and of `tiny`,
  all with learned variance, in their order.
- `x` (4, 4, 8, 8), `t` (4,), `y` (4,), `out` (4, 8, 8, 8): the tiny DiT's eval-mode forward pass. Label 10 is no class.
- `guided_three`, `guided_all` (4, 8, 8, 8): `forward_with_cfg` at scale 4 for the first two images, for labels 3 and 7
  and twice none, as it is and with the alternative line in its source that guides all channels.
- `tau` (4,), `sit` (4, 4, 8, 8): the SiT of the same weights, at times of SiT.
- `image`, `noise`, `path`, `velocity` (4, 4, 8, 8): x_tau and its velocity on SiT's linear path from noise to image.
- `steps` (4,), `mse`, `vb` (4,): terms of the training loss for `image` and `noise`.
- `ddpm`, `ddim` (2, 4, 8, 8): ten steps of `p_sample_loop` with `forward_with_cfg` as it is, and of `ddim_sample_loop`
  without guidance, from the noise of draw(2), labels 3 and 7.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

OUTPUT = Path(__file__).with_name("official_outputs.npz")
SIZES = ("DiT-S/2", "DiT-B/4", "DiT-XL/2")
TINY = {"input_size": 8, "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 10}


def draw(key: int) -> np.random.Generator:
    """The stream of numbers `key`."""
    return np.random.Generator(np.random.Philox(key=[key, 0]))


def normal(stream: np.random.Generator, *shape: int) -> Tensor:
    """The stream's next normal numbers."""
    return torch.from_numpy(stream.standard_normal(shape, np.float32))


def module(folder: Path, name: str):
    """A module of the folder; `models` is in both checkouts."""
    sys.modules.pop(name, None)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def shapes(model: nn.Module) -> np.ndarray:
    """JSON of the state dict's shapes."""
    return np.asarray(json.dumps({name: list(value.shape) for name, value in model.state_dict().items()}))


def fill(model: nn.Module) -> nn.Module:
    """The model in eval mode with the weights of draw(1)."""
    stream = draw(1)
    for name, value in model.state_dict().items():
        if name != "pos_embed":
            value.copy_(0.2 * normal(stream, *value.shape))
    return model.eval()


def main() -> None:
    """Write the record next to this script."""
    parser = argparse.ArgumentParser(description="Make official_outputs.npz from the official DiT and SiT code.")
    parser.add_argument("--dit", type=Path, required=True, help="path of the checkout of DiT")
    parser.add_argument("--sit", type=Path, required=True, help="path of the checkout of SiT")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    sit = fill(module(options.sit, "models").SiT(**TINY))
    plan = module(options.sit / "transport", "path").ICPlan()  # without the package, which needs torchdiffeq
    models = module(options.dit, "models")
    record = {f"shapes/{name}": shapes(models.DiT_models[name](input_size=32)) for name in SIZES}
    tiny = fill(models.DiT(**TINY))
    record["shapes/tiny"] = shapes(tiny)
    make = module(options.dit, "diffusion").create_diffusion
    stream, null = draw(3), TINY["num_classes"]

    x, t, y = normal(stream, 4, 4, 8, 8), torch.tensor([0, 1, 537, 999]), torch.tensor([3, 10, 0, 7])
    found = {"x": x, "t": t, "y": y, "out": tiny(x, t, y)}

    pair, labels = torch.cat([x[:2], x[:2]]), torch.tensor([3, 7, null, null])
    found["guided_three"] = tiny.forward_with_cfg(pair, t[2:].repeat(2), labels, 4.0)
    output = tiny(pair, t[2:].repeat(2), labels)
    given, none = output[:, :4].chunk(2)
    found["guided_all"] = torch.cat([(none + 4.0 * (given - none)).repeat(2, 1, 1, 1), output[:, 4:]], dim=1)

    tau = torch.from_numpy(stream.random(4, np.float32))
    found |= {"tau": tau, "sit": sit(x, tau, y)}

    image, noise = normal(stream, 4, 4, 8, 8).mul(0.6).clamp(-1, 1), normal(stream, 4, 4, 8, 8)
    _, path, velocity = plan.plan(tau, noise, image)
    found |= {"image": image, "noise": noise, "path": path, "velocity": velocity}

    steps = torch.tensor([0, 1, 500, 999])
    terms = make("").training_losses(tiny, image, steps, {"y": y}, noise=noise)
    found |= {"steps": steps, "mse": terms["mse"], "vb": terms["vb"]}

    labels = torch.tensor([3, 7, null, null])
    for name, respacing, model, more in (
        ("ddpm", "10", tiny.forward_with_cfg, {"y": labels, "cfg_scale": 4.0}),
        ("ddim", "ddim10", tiny, {"y": labels}),
    ):
        numbers = draw(2)
        torch.randn_like = lambda like, n=numbers: normal(n, 2, *like.shape[1:]).repeat(2, 1, 1, 1)
        diffusion = make(respacing)
        loop = diffusion.p_sample_loop if name == "ddpm" else diffusion.ddim_sample_loop
        start = torch.randn_like(pair)
        found[name] = loop(model, start.shape, start, clip_denoised=False, model_kwargs=more, device="cpu")[:2]
    record |= {name: value.numpy() for name, value in found.items()}
    np.savez_compressed(OUTPUT, **record)
    print(f"{OUTPUT}: {len(record)} arrays, {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
