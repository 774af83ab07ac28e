"""Costs against PyTorch's FLOP counter and published numbers."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import inputs, only_full, small_model, smallest_and_largest
from dit_in_dit import cost, inspect
from dit_in_dit.config import presets
from dit_in_dit.model.nested import NestedDiT
from options import FIRST
from test_model import PAIRS

SOME_PAIRS = [pair if pair[0] == "inner outer*2 inner" or not pair[1] else only_full(*pair) for pair in PAIRS]


def counted(model, device: str = "meta") -> float:
    """MACs per image from PyTorch's FLOP counter; the counter's formula for attention needs the plain kernel."""
    with torch.device(device):
        net = NestedDiT(model)
    x, t, y = (v.to(device) if v is not None else None for v in inputs(model, batch=2))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x, t, y)
    return counter.get_total_flops() / 2 / 2


@pytest.mark.parametrize("name", smallest_and_largest([*presets.PRESETS, *FIRST]))  # others: test_option_sets
def test_closed_form_agrees_with_the_flop_counter_for_every_preset(name):
    model = presets.get(name).model
    assert cost.macs(model)["total"] == pytest.approx(counted(model), rel=0.005)


@pytest.mark.parametrize(("stages", "choice"), SOME_PAIRS, ids=str)
def test_closed_form_agrees_with_the_flop_counter_for_every_choice(stages, choice):
    model = small_model(stages, **choice)
    assert cost.macs(model)["total"] == pytest.approx(counted(model), rel=0.005)


def test_dit_costs_what_the_paper_says():
    """Peebles & Xie 2023, table 4: Gflops (MACs) and millions of parameters (with learned variance)."""
    for name, gmacs, millions in (("s2", 6.06, 33), ("b2", 23.01, 130), ("l2", 80.71, 458), ("xl2", 118.64, 675)):
        model = presets.get(f"dit-{name}").model
        assert cost.macs(model)["total"] / 1e9 == pytest.approx(gmacs, rel=0.005)
        assert cost.parameters(model)["total"] / 1e6 == pytest.approx(millions, abs=1)


def test_the_reference_costs_twice_its_plain_dit():
    nested, plain = (cost.macs(presets.get(name).model)["total"] for name in ("dit-in-dit-xl2", "dit-xl2"))
    assert plain / 1e9 == pytest.approx(118.6, abs=0.05)
    assert nested / plain == pytest.approx(1.96, abs=0.005)


def test_the_small_presets_cost_the_same():
    totals = [cost.macs(presets.get(name).model)["total"] for name in ("emoji", "emoji-reference", "emoji-dit")]
    assert max(totals) / min(totals) <= 1.05


def test_inspect_gives_the_table_of_the_reference():
    found = inspect(presets.get("dit-in-dit-xl2").model, batch=8)
    assert [(row["name"], tuple(row["shape"])) for row in found["flow"]] == [
        ("image", (8, 4, 32, 32)),
        ("outer tokens", (8, 256, 1152)),
        ("sub-patches", (8, 256, 4, 4)),
        ("inner tokens", (8, 256, 4, 1152)),
        ("inner*7", (8, 256, 4, 1152)),
        ("aggregate", (8, 256, 1152)),
        ("outer*28", (8, 256, 1152)),
        ("outer head", (8, 256, 16)),
        ("prediction", (8, 4, 32, 32)),
    ]
    assert found["token_layers"]["inner"] * 8 == found["token_layers"]["outer"] * 8 == 57_344
    json.dumps(found)


def test_counted_parameters_equal_those_of_the_module():
    model = small_model("(inner outer)*2", inner={"condition": "sub_patch", "fuse": "gate"})
    assert cost.parameters(model)["total"] == sum(p.numel() for p in NestedDiT(model).parameters())


def test_activation_bytes_are_what_a_real_backward_pass_keeps():
    model = small_model("inner*2 outer*2")
    net, kept = NestedDiT(model), {}
    own = {p.untyped_storage().data_ptr() for p in (*net.parameters(), *net.buffers())}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor: its address must not be reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(*inputs(model, batch=4))
    real = sum(size for size, _ in kept.values())
    assert inspect(model, batch=4)["activation_bytes"]["total"] == pytest.approx(real, rel=0.01)


def test_recomputation_saves_activation_memory():
    model = presets.get("dit-in-dit-s2").model
    everything, inner = (inspect(model, 2, how)["activation_bytes"]["total"] for how in ("none", "inner"))
    assert inner < 0.65 * everything
