"""
Write small training checkpoints by the official classes of the field: NAME.ckpt, and NAME.average.pt to compare with.

The model is the official class at the size of its record, with its own random initialisation, then one step of AdamW
on noise so that no weight stays at zero. The average is that of the official training codes (decay 0.9999, halved here
so that it differs). Keys and prefixes are those of `saved` in `make_field_outputs.py`.

    python tests/golden/make_field_checkpoints.py --checkouts . --only jit --only ddt --out checkpoints
    dit-in-dit import checkpoints/jit.ckpt --out run        # `tests/test_field.py` has the options of each model
    dit-in-dit export run --format official --out back.pt   # equals checkpoints/jit.average.pt
"""

import argparse
import copy
from argparse import Namespace
from pathlib import Path

import torch
from field_models import MODELS, Model
from make_field_outputs import build, run
from official_code import module
from torch import nn


def trained(official: Model, checkout: Path) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """The official model after one step, its average and its optimizer."""
    torch.manual_seed(0)
    model = build(
        getattr(module(checkout / official.root, official.module, official.stubs), official.kind), official.toy
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.02 * torch.randn_like(weight))
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-2)
    x = torch.randn(4, official.channels, official.side, official.side)
    out = run(official, model, x, torch.rand(4), torch.tensor([3, 10, 0, 7]))[0]
    out.square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
            mean.lerp_(weight, 0.5)
    return model, average, optimizer


def main() -> None:
    """Write the checkpoints."""
    parser = argparse.ArgumentParser(description="Write training checkpoints by official classes.")
    parser.add_argument("--checkouts", type=Path, default=Path(), help="folder that holds the checkouts")
    parser.add_argument("--only", action="append", choices=MODELS, help="write this one only (several times)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoints")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only or MODELS:
        official = MODELS[name]
        model, average, optimizer = trained(official, (options.checkouts / official.checkout).resolve())
        key, prefix = official.saved["model"]
        saved = {key: {prefix + part: value for part, value in model.state_dict().items()}}
        for key, prefix in official.saved["averages"]:
            saved.setdefault(key, {}).update({prefix + part: value for part, value in average.state_dict().items()})
        for part, shape in official.saved.get("beside", {}).items():
            saved[key][part] = torch.ones(shape)
        known = {"args": Namespace(seed=0), "optimizer": optimizer.state_dict(), "opt": optimizer.state_dict()}
        others = {part: known.get(part, {}) for part in official.saved["others"]}
        torch.save(saved | others, options.out / f"{name}.ckpt")
        torch.save(average.state_dict(), options.out / f"{name}.average.pt")
        print(options.out / f"{name}.ckpt", len(average.state_dict()), "tensors")


if __name__ == "__main__":
    main()
