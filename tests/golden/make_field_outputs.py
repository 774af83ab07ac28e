"""
Make `field/NAME.npz`: outputs of official models of the field with known weights, and what published sizes cost.

The code is imported from checkouts (`official_code.py` says how, and which packages are stubs). None is kept here.
`--checkouts` is a folder that holds checkouts named as below; `--checkout NAME=PATH` names one that lies elsewhere.
`--only NAME` (several times) makes some of the records. Records were made with torch 2.13.0 and numpy 2.4.6:

    github.com/sihyun-yu/REPA        67f714503e3892f993844aab088ffc5791c92613  repa (`forward`'s first output)
    github.com/hustvl/LightningDiT   2725fed42a14898744433809949834e26957bcdd  lightningdit, lightningdit_qk (QK-norm)
    github.com/undefined443/JiT      7f1fa289c4299d5b6564f2e185d78b93b59d4667  jit (a fork; it has no JiT-G: see below)
    github.com/gcy-hub/PixelDiT      91d45ab0b22b13b95a77442969cbdb737e72caa2  pixeldit_pre, pixeldit_post (a fork)
    github.com/Zehong-Ma/DeCo        9e0a349ae4a552c4670edf2c9e779fb8aa864834  deco
    github.com/MCG-NJU/PixNerd       6da060bd4b11a4a0ac2443a31b79701090e23c23  pixnerd
    github.com/MCG-NJU/DDT           1d1b4d291325939dd98f6b91687af95c98c34d5c  ddt (`forward`'s first output)
    github.com/bytetriper/RAE        a4d18c4db766419cbe7cb8c02cd9f7ceb0ec9041  rae
    github.com/nanovisionx/RAEv2     8a0d238f8dc3b261aba98b217f6c79c0182e8e94  raev2, raev2_ig (internal guidance)
    github.com/quandao10/MPDiT       258ebda7a2e15dc99f3f3948520e3098f348dd9f  mpdit (MLP time embedding)

    python tests/golden/make_field_outputs.py --checkouts .

Weights come from draw(1) by the rule of `weights` in `tests/field.py`, in the order of the state dict; nothing stays
near its initial value. Tables that are computed (positions, rotary angles) are kept as they are, and stored.

Keys of a record:

- `shapes`: JSON, {name: shape} of the state dict in its order. `kept/NAME`: its computed tables.
- `config`: JSON, arguments of the constructor. `sizes`: JSON, {published size: arguments}, from the repositories'
  configurations; JiT-G, PixelDiT-B and -L, DDT-B and -L, RAE-B and -L have none there, and are as in the papers.
- `x` (4, C, H, W), `t` (4,), `y` (4,), `out`: the eval-mode forward pass in float32. `t` is official time: pure noise
  at `noise_at` (0 or 1). Label 10 is no class.
- `predicts`: "image - noise", "noise - image" or "image", from the training code.
- `base` (raev2_ig): output of the guidance head in mid-network. `rows` (ddt): the encoder's output, which conditions
  the decoder. `wide/x`, `wide/out` (pixeldit, deco, pixnerd, ddt, whose code takes them): for images twice as wide.
- `unused`: JSON, tensors of the state dict that `out` does not depend on. Each other one, with N(0, 0.1^2) added, moves
  `out` by more than 1e-4 of its norm.
- `saved`: JSON, where a training checkpoint has the weights (`model`) and their averages: [key, prefix of names];
  `others`, its further keys; `beside`, tensors of other modules among the weights. DDT puts `_orig_mod.` after the
  prefix, and MPDiT before names, if the model was compiled.
- `counts`: JSON, {size: [trainable parameters, MACs for one 256x256 image]}, the official classes on the meta device,
  MACs by torch.utils.flop_counter / 2.
- `commit`: of the checkout.

Conventions, read in the training code: REPA `loss.py`; LightningDiT `transport/path.py` (ICPlan); JiT `denoiser.py`;
PixelDiT `c2i/src/diffusion.py`; DeCo, PixNerd, DDT `flow_matching/scheduling.py` (LinearScheduler); RAE
`stage2/transport/path.py` (time reversed against SiT); RAEv2 `stage2/transport/transport.py` with `prediction: x` of
its configurations; MPDiT `otflow.py`. JiT's and RAEv2's samplers turn the image x into a velocity over
max(distance to the image, 0.05).
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from field_models import MODELS, Model
from official_code import commit, module
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).parents[1]))
from field import FOLDER, draw, normal, weights

TABLES = ("pos_embed", "pos_embed_downsampled", "freqs_cos", "freqs_sin")


def build(kind: type[nn.Module], config: dict[str, Any]) -> nn.Module:
    """The official model in eval mode."""
    if "cond_arch" in config:
        config = config | {"cond_arch": SimpleNamespace(**config["cond_arch"])}
    return kind(**config).eval()


def run(official: Model, model: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """All outputs of the forward pass."""
    found = model(x, t, **{official.label: y})
    return found if isinstance(found, tuple) else (found,)


def unused(official: Model, model: nn.Module, out: Tensor, *inputs: Tensor) -> list[str]:
    """Tensors of the state dict that the output does not depend on."""
    stream, found = draw(4), []
    for name, value in model.state_dict().items():
        before = value.clone()
        value.add_(normal(stream, *value.shape), alpha=0.1)
        moved = (run(official, model, *inputs)[0] - out).norm() / out.norm()
        value.copy_(before)
        if 0 < moved < 1e-4:
            raise RuntimeError(f"{name} moves the output by {moved:.1e} only: the record would not tell it from zero")
        if not moved:
            found.append(name)
    return found


def counts(official: Model, kind: type[nn.Module], config: dict[str, Any]) -> list[int]:
    """Trainable parameters and MACs of one image of a published size."""
    with torch.device("meta"):
        model = build(kind, config).to("meta")
        x, t = torch.empty(1, config.get("in_channels", official.channels), official.full, official.full), torch.ones(1)
        with FlopCounterMode(display=False) as counter:
            run(official, model, x, t, torch.ones(1, dtype=torch.long))
    return [sum(p.numel() for p in model.parameters() if p.requires_grad), counter.get_total_flops() // 2]


def made(name: str, official: Model, checkout: Path) -> dict[str, np.ndarray]:
    """The record of one model."""
    kind = getattr(module(checkout / official.root, official.module, official.stubs), official.kind)
    model = build(kind, official.toy)
    state = model.state_dict()
    shapes = {key: list(value.shape) for key, value in state.items()}
    kept = {key: value.clone() for key, value in state.items() if key.split(".")[-1] in TABLES}
    model.load_state_dict(weights(shapes, kept))

    stream = draw(3)
    t, y = torch.tensor([0.06, 0.33, 0.71, 0.97]), torch.tensor([3, 10, 0, 7])
    x = normal(stream, 4, official.channels, official.side, official.side)
    outputs = run(official, model, x, t, y)
    found = {"x": x, "t": t, "y": y, "out": outputs[0]}
    if name == "raev2_ig":
        found["base"] = outputs[1]
    if name == "ddt":
        found["rows"] = outputs[1]
    idle = unused(official, model, outputs[0], x, t, y)
    if official.wide:
        found["wide/x"] = normal(stream, 4, official.channels, official.side, 2 * official.side)
        found["wide/out"] = run(official, model, found["wide/x"], t, y)[0]
    record = {key: value.numpy() for key, value in found.items()}
    record |= {f"kept/{key}": value.numpy() for key, value in kept.items()}
    costs = {size: counts(official, kind, config) for size, config in official.sizes.items()}
    texts = {"shapes": shapes, "config": official.toy, "sizes": official.sizes, "counts": costs}
    texts |= {"saved": official.saved, "noise_at": official.noise_at, "unused": idle}
    record |= {key: np.asarray(json.dumps(value)) for key, value in texts.items()}
    return record | {"predicts": np.asarray(official.predicts), "commit": np.asarray(commit(checkout))}


def main() -> None:
    """Write the records."""
    parser = argparse.ArgumentParser(description="Make records of official models of the field.")
    parser.add_argument("--checkouts", type=Path, default=Path(), help="folder that holds the checkouts")
    parser.add_argument("--checkout", action="append", default=[], metavar="NAME=PATH", help="one checkout elsewhere")
    parser.add_argument("--only", action="append", choices=MODELS, help="make this record only (several times)")
    options = parser.parse_args()
    elsewhere = dict(pair.split("=", 1) for pair in options.checkout)
    torch.set_grad_enabled(False)
    FOLDER.mkdir(exist_ok=True)
    for name in options.only or MODELS:
        official = MODELS[name]
        checkout = Path(elsewhere.get(official.checkout, options.checkouts / official.checkout)).resolve()
        record = made(name, official, checkout)
        path = FOLDER / f"{name}.npz"
        np.savez_compressed(path, **record)
        print(f"{path.name}: {record['out'].shape}, {path.stat().st_size} bytes, {record['counts']}")


if __name__ == "__main__":
    main()
