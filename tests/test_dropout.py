"""train.dropout: masks are functions of seed and example, absent outside training, and resumed bit for bit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import override
from dit_in_dit.config.run import RunConfig
from dit_in_dit.data.sources import open_source
from dit_in_dit.model.dropout import drop
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.training.batches import Examples
from dit_in_dit.training.dropout import dropout_keys
from dit_in_dit.training.trainer import Trainer

CPU = torch.device("cpu")
KEYS = (
    *("model.image_size=16", "model.patch_size=8", "model.num_classes=0", "model.stages=inner*1 outer*2 inner*1"),
    *("model.outer.width=24", "model.outer.num_heads=2", "model.inner.width=8", "model.inner.num_heads=2"),
    *("model.inner.sub_patch=4", "data.source=mosaic", "train.batch_size=8", "train.dropout=0.25", "train.warmup=0"),
    *("train.learning_rate=0.01", "train.evaluate_every=0", "train.compile=false", "train.precision=float32"),
)


def config_with(*keys):
    return override(RunConfig(), [*KEYS, *keys])


def trainer_of(config):
    return Trainer(config, open_source(config.data, config.model), CPU)


def steps(config, count=3):
    trainer = trainer_of(config)
    examples = Examples(trainer.source, config)
    per_step = examples.per_step
    for step in range(count):
        trainer.update([examples.packed(step * per_step + turn) for turn in range(per_step)])
    return trainer


def same(one, other):
    pairs = zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True)
    return all(torch.equal(weight, value) for (_, weight), value in pairs)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_share_and_scale(rate):
    keys = dropout_keys(3, torch.arange(16), 2)[:, 1, 2:]
    kept = drop(torch.ones(16, 7, 1001), keys, rate)
    values = kept.unique()
    assert values.tolist() == pytest.approx([0, 1 / (1 - rate)], rel=1e-4)
    share, n = (kept == 0).double().mean().item(), kept.numel()
    assert abs(share - rate) < 4 * (rate * (1 - rate) / n) ** 0.5
    flat = (kept == 0).double().flatten(1)
    correlations = torch.corrcoef(flat)[~torch.eye(16, dtype=torch.bool)]
    assert correlations.abs().max() < 5 / flat.shape[1] ** 0.5, "masks of examples are independent"


def test_a_mask_depends_on_its_own_example_only():
    x = torch.randn(6, 5, 33)
    keys = dropout_keys(3, torch.tensor([7, 2**40 + 1, 9, 0, 1, 2]), 3)
    whole = drop(x, keys[:, 2, :2], 0.3)
    alone = drop(x[1:2], dropout_keys(3, torch.tensor([2**40 + 1]), 3)[:, 2, :2], 0.3)
    assert torch.equal(whole[1:2], alone)
    rows = {tuple(row.tolist()) for key in (3, 4) for row in dropout_keys(key, torch.arange(50), 4).flatten(0, 1)}
    assert len(rows) == 2 * 50 * 4


def test_gradient_is_that_of_nn_dropout_with_the_same_mask():
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    keys = dropout_keys(0, torch.arange(4), 1)[:, 0, :2]
    (gradient,) = torch.autograd.grad(drop(x, keys, 0.5).square().sum(), x)
    mask = drop(torch.ones_like(x), keys, 0.5)
    torch.testing.assert_close(gradient, 2 * x * mask**2)


def test_branches_are_dropped_before_the_gate():
    config = config_with()
    net, draw = NestedDiT(config.model, dropout=0.25).double(), torch.Generator().manual_seed(0)
    block = net.outer_blocks[1]
    x, c = (torch.randn(3, n, 24, generator=draw, dtype=torch.float64) for n in (4, 1))
    nn.init.normal_(block.modulation.linear.weight, generator=draw)
    keys = dropout_keys(0, torch.arange(3), 4)[:, 1]
    ours = block(x, c, keys)
    shift, scale, gate, shift2, scale2, gate2 = block.modulation(c)
    h = x + gate * drop(block.branches["mix"](block.norm_mix(x) * (1 + scale) + shift), keys[:, :2], 0.25)
    h = h + gate2 * drop(block.branches["mlp"](block.norm_mlp(h) * (1 + scale2) + shift2), keys[:, 2:], 0.25)
    torch.testing.assert_close(ours, h)


def test_only_training_passes_have_dropout():
    trainer = steps(config_with())
    plain = NestedDiT(trainer.config.model)
    plain.load_state_dict(trainer.model.state_dict())
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.6])
    assert torch.equal(trainer.model(x, t), plain(x, t))
    keys = dropout_keys(0, torch.arange(2), 4)
    assert not torch.allclose(trainer.model(x, t, keys=keys), plain(x, t))
    assert not same(trainer, steps(config_with("train.dropout=0")))


def test_recomputed_accumulated_and_repeated_steps_see_the_same_masks():
    whole = steps(config_with())
    assert same(whole, steps(config_with()))
    assert same(whole, steps(config_with("train.recompute=both")))
    halves = steps(config_with("train.batch_size=4", "train.accumulate=2"))
    for one, other in zip(whole.model.parameters(), halves.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


def test_a_resumed_run_has_the_bits_of_the_whole():
    config = config_with()
    whole, first = steps(config), steps(config, 1)
    second = trainer_of(config)
    second.restore(first.state(), first.averaged_state(), 1)
    examples = Examples(second.source, config)
    for step in (1, 2):
        second.update([examples.packed(step)])
    assert same(whole, second)


def test_compiled_blocks_have_no_graph_break_and_the_same_masks():
    config = config_with()
    net = NestedDiT(config.model, dropout=0.25)
    block, x, c = net.outer_blocks[0], torch.randn(3, 4, 24), torch.randn(3, 1, 24)
    nn.init.normal_(block.modulation.linear.weight)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    keys = dropout_keys(0, torch.arange(3), 4)
    for number in (0, 1):
        torch.testing.assert_close(compiled(x, c, keys[:, number]), block(x, c, keys[:, number]))


def test_dropout_needs_the_model_of_the_config():
    config = config_with()
    source = open_source(config.data, config.model)
    with pytest.raises(UserError, match="needs the config's model"):
        Trainer(config, source, CPU, model=NestedDiT(config.model))
    assert Trainer(replace(config, train=replace(config.train, dropout=0)), source, CPU, model=NestedDiT(config.model))


def test_every_block_has_the_rate_and_its_own_number():
    net = NestedDiT(config_with().model, dropout=0.25)
    seen = []
    for stage in net.stages:
        if hasattr(stage, "first"):
            stage.run = partial(lambda first, block, x, c, keys: seen.append(keys[0, 0].item()) or x, stage.first)
    net(torch.randn(1, 3, 16, 16), 0.5, keys=torch.arange(4, dtype=torch.int32).repeat_interleave(4).view(1, 4, 4))
    assert sorted(seen) == [0, 1, 2, 3]
    assert {block.dropout for block in [*net.outer_blocks, *net.inner_blocks]} == {0.25}
