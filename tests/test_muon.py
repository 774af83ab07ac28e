"""Muon: torch.optim.Muon's steps on separated matrices, the weights that it trains, and its state."""

import pytest
import torch

from dit_in_dit.training.muon import MuonAdamW

SHAPES = {"fused": (48, 16, 3), "square": (16, 16, 1), "wide": (16, 40, 1), "tall": (64, 16, 2)}


def pairs(seed):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, columns, generator=draw) for name, (rows, columns, _) in SHAPES.items()}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch before 2.9 has no Muon")
@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_steps_are_those_of_torchs_muon_on_separated_matrices(adjust):
    ours = {name: torch.nn.Parameter(weight) for name, weight in pairs(0).items()}
    theirs = {name: [torch.nn.Parameter(m.clone()) for m in w.detach().chunk(SHAPES[name][2])] for name, w in ours.items()}
    groups = [{"params": [weight], "parts": SHAPES[name][2]} for name, weight in ours.items()]
    optimizer = MuonAdamW(groups, adjust=adjust, scale=2.0, lr=0.01, weight_decay=0.1, fused=True)
    flat = [matrix for matrices in theirs.values() for matrix in matrices]
    oracle = torch.optim.Muon(flat, lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
    for step in range(4):
        optimizer.found_inf = torch.zeros(())
        for name, gradient in pairs(step + 1).items():
            ours[name].grad = gradient
            for matrix, part in zip(theirs[name], gradient.chunk(SHAPES[name][2]), strict=True):
                matrix.grad = part.clone()
        optimizer.step()
        oracle.step()
    for name, weight in ours.items():
        torch.testing.assert_close(weight.detach(), torch.cat(theirs[name]).detach(), rtol=0, atol=1e-6)
