"""The script that counts kernels and bytes of a training step on CUDA, against counts by hand, and its bounds."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from conftest import small_model
from dit_in_dit.config import presets
from dit_in_dit.config.run import RunConfig
from dit_in_dit.inspection.cost import parameters

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "count_cuda_work.py"))
count = SCRIPT["count"]


def on_meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def test_a_linear_layer_and_a_norm_are_counted_as_by_hand():
    with torch.device("meta"):
        linear, x = nn.Linear(32, 64), torch.empty(8, 16, 32)
    counted = count(lambda: nn.functional.layer_norm(linear(x), (64,)).sum())
    # Casts to bfloat16 of x, weight and bias (4 bytes read, 2 written); casts of the output (2, 4), of its gradient
    # (4, 2) and of the gradients of weight and bias (2, 4). The products, forward and backward, are not counted.
    tokens, out = 8 * 16, 8 * 16 * 64
    cast = 6 * (tokens * 32 + 2 * out + 2 * (32 * 64 + 64))
    assert counted.kernels["_to_copy"] == 7
    assert counted.bytes["_to_copy"] == cast
    assert counted.bytes["native_layer_norm"] == 4 * (2 * out + 2 * tokens)  # input, output, mean and deviation
    assert counted.bytes["native_layer_norm_backward"] == 4 * (2 * out + 2 * tokens) + 4  # the gradient is one number
    assert counted.bytes["sum"] == 4 * out + 4 + 2 * (out + 64)  # the loss, and the gradient of the bias
    assert set(counted.kernels) - {"_to_copy", "native_layer_norm", "native_layer_norm_backward", "sum"} <= {
        "ones_like"
    }


def test_views_and_products_are_free_and_products_with_a_vector_are_not():
    a, b, vector = on_meta(8, 16), on_meta(16, 4), on_meta(16, 1)
    with SCRIPT["Count"]() as counted:
        (a @ b).T[1:].expand(2, -1, -1)
        assert not counted.kernels
        a @ vector
    assert counted.bytes == {"mm": 4 * (8 * 16 + 16 + 8)}


def test_what_is_written_is_not_read_and_a_broadcast_is_read_once():
    x, row = on_meta(64, 32), on_meta(32)
    with SCRIPT["Count"]() as counted:
        torch.mul(x, row.expand(64, 32), out=on_meta(64, 32))
        on_meta(64, 32).copy_(x)
        x.add_(row)
    full, short = 4 * 64 * 32, 4 * 32
    assert counted.bytes == {"mul": 2 * full + short, "copy_": 2 * full, "add_": 2 * full + short}


# Most kernels and megabytes of a step of 8 images, as shipped and with fused functions. Lower a bound when the step
# gets better. Outer norms of 192 channels are wide, inner ones narrow.
MODELS = {
    "nested": small_model(
        "outer*3 inner*3", image_size=(32, 32), patch_size=8, outer={"width": 192},
        inner={"sub_patch": 1, "mixer": "conv", "condition": "patch", "spread": "interpolate", "embed": "conv"},
    ),
    "reference": small_model("inner*2 outer*4", inner={"width": 32}),
}  # fmt: skip
BOUNDS = {"nested": ((702, 238), (632, 165)), "reference": ((636, 12), (565, 8.2))}


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_stays_below_its_bound(name):
    for fused, (kernels, megabytes) in enumerate(BOUNDS[name]):
        counted = count(SCRIPT["training_step"](RunConfig(model=MODELS[name]), 8)[1], fused=bool(fused))
        found = counted.kernels.total(), counted.bytes.total() / 1e6
        assert 0.8 * kernels < found[0] <= kernels, (fused, found)
        assert 0.8 * megabytes < found[1] <= megabytes, (fused, found)


def test_the_table_has_a_row_of_a_preset():
    result = SCRIPT["measure"]("dit-s8:2")
    assert result["fused"]["bytes"] < 0.95 * result["shipped"]["bytes"]
    assert sum(result["shipped"]["bytes_by_operator"].values()) == result["shipped"]["bytes"]
    assert result["optimizer_bytes"] == 28 * parameters(presets.get("dit-s8").model)["total"]
