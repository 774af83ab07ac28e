"""Attention over more sequences than a GPU's kernels accept: chunks, with unchanged results."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from conftest import inputs, perturbed, small_model
from dit_in_dit.config import presets
from dit_in_dit.model import layers
from dit_in_dit.model.layers import attend, most_sequences
from dit_in_dit.model.nested import NestedDiT


@pytest.fixture
def limited(monkeypatch):
    """Apply a GPU's limits on a CPU, with a given number of sequences per call; returns the sizes of chunks."""
    sizes = []
    plain = F.scaled_dot_product_attention

    def noted(q, k, v):
        sizes.append(len(q))
        return plain(q, k, v)

    def limit(most):
        monkeypatch.setattr(layers, "LIMITED", frozenset({"cpu"}))
        monkeypatch.setattr(layers, "MOST_SEQUENCES", most)
        monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
        return sizes

    return limit


@pytest.mark.parametrize(
    ("name", "most"),
    # heads * 128 rows * a head's channels up to a multiple of 32 (72: 96; 64), into 2^31
    [("dit-in-dit-xl2", 10_922), ("dit-in-dit-b2", 21_845), ("dit-in-dit-s2", 43_690), ("emoji", 65_535)],
)
def test_attention_chunks_respect_the_limits_of_every_kernel(name, most):
    inner = presets.get(name).model.inner
    found = most_sequences(inner.num_heads, presets.get(name).model.sub_patches, inner.width // inner.num_heads)
    assert found == most
    if name != "emoji":
        width = -(-inner.width // inner.num_heads // 32) * 32
        assert found * inner.num_heads * 128 * width <= 2**31 < (found + 1) * inner.num_heads * 128 * width


def test_forty_two_images_of_the_largest_model_need_one_attention_call():
    assert most_sequences(16, 4, 72) // 256 == 42


@pytest.mark.parametrize(
    ("heads", "length", "width", "most"),
    [
        (1, 4, 8, 65_535),  # the grid's end
        (16, 128, 64, 16_384),  # to 2^31 and no further
        (16, 129, 64, 8_192),  # a row more is a tile more
        (16, 4, 200, 4_096),  # FlashAttention has no heads between 192 and 256
        (64, 2**20, 256, 1),  # one sequence is always taken
    ],
)
def test_attention_limits_use_the_rows_and_channels_that_the_kernel_rounds_up(heads, length, width, most):
    assert most_sequences(heads, length, width) == most


@pytest.mark.parametrize("queries", [4, 1])
def test_attention_in_chunks_equals_one_call(limited, queries):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(23, n, 2, 8, generator=draw).transpose(1, 2).requires_grad_() for n in (queries, 4, 4))
    results = []
    for most in (None, 7):
        sizes = limited(most) if most else []
        out = attend(q, k, v)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    assert sizes == [6, 6, 6, 5]  # as few as can be, of equal size
    for chunked, whole in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole)
    assert results[1][0].transpose(1, 2).is_contiguous()  # what the next linear layer reads


@pytest.mark.parametrize("inner", [{}, {"mixer": "window"}, {"mixer": "image"}, {"aggregate": "attention"}], ids=str)
def test_a_model_with_attention_in_chunks_gives_the_same_output_and_gradients(limited, inner):
    model = perturbed(NestedDiT(small_model("inner outer inner", inner=inner, qk_norm=True)))
    results = []
    for most in (None, 5):
        sizes = limited(most) if most else []
        out = model(*inputs(model.config))
        results.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    assert max(sizes) <= 5
    for chunked, whole in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-5)


def test_attention_is_one_call_on_a_cpu(limited):
    sizes = limited(5)
    layers.LIMITED = frozenset({"cuda"})
    attend(*(torch.randn(23, 2, 4, 8) for _ in range(3)))
    assert sizes == [23]


@pytest.mark.slow
def test_attention_chunks_cause_no_graph_break(limited):
    torch._dynamo.reset()
    model = perturbed(NestedDiT(small_model("inner outer inner", inner={"aggregate": "attention"})))
    whole = model(*inputs(model.config))
    limited(5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    found = compiled(*inputs(model.config))
    torch.testing.assert_close(found, whole)
    found.sum().backward()
