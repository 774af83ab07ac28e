"""Training on many processes: sharding within machines, bfloat16 gathers, larger buckets, selective recomputation."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from conftest import SHARDED, inputs, perturbed, small_model, with_train
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.data.sources import open_source
from dit_in_dit.inspection.trace import inspect
from dit_in_dit.model import recompute
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.training import distributed, sharding, trainer
from dit_in_dit.training.distributed import Process, check_process_count
from dit_in_dit.training.loop import train
from dit_in_dit.training.trainer import Trainer
from processes import run_together

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
needs_sharding = SHARDED.marks[0]


@pytest.fixture
def config(run_config) -> RunConfig:
    """Two kinds of blocks; every process of four has two images of a batch."""
    model = small_model("inner outer*2 inner outer", image_size=(8, 8), num_classes=3)
    return with_train(replace(run_config, model=model), batch_size=8, steps=4, checkpoint_every=4, evaluate_every=0)


def several(runs, until=None, resume=False):
    """Train each (config, folder) in turn, on the same processes."""
    for config, out, cast in runs:
        kept = sharding._is_cast_whole
        if not cast:
            sharding._is_cast_whole = lambda block: False
        list(train(config, out, resume=resume, device="cpu", until=until))
        sharding._is_cast_whole = kept


def losses(run):
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return np.array([[line["loss"], line["grad_norm"]] for line in lines if "loss" in line])


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_sharding
def test_four_processes_train_alike_in_every_layout_and_resume_on_fewer(config, tmp_path):
    layouts = {"ddp": {}, "fsdp": {"parallel": "fsdp"}, "hsdp": {"parallel": "fsdp", "shard": 2}}
    runs = {name: (with_train(config, **keys), tmp_path / name, True) for name, keys in layouts.items()}
    run_together(4, four, *runs.values(), timeout=500)
    run_together(2, several, [runs["hsdp"]], 3, True, timeout=500)
    several([runs["hsdp"]], resume=True)
    assert len(set(losses(tmp_path / "ddp")[:, 0])) == 4
    average = Checkpoint.open(tmp_path / "ddp").weights()
    for name in ("fsdp", "hsdp"):
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "ddp"), rtol=1e-5)
        for key, value in Checkpoint.open(tmp_path / name).weights().items():
            torch.testing.assert_close(value, average[key], rtol=1e-4, atol=1e-6)


def four(ddp, fsdp, hsdp):
    several([ddp, fsdp])
    several([hsdp], until=2)


def gathered(config):
    """Types of the weights that blocks and the rest compute with."""
    from dit_in_dit.training.distributed import join_group

    ours, seen = Trainer(config, open_source(config.data, config.model), CPU, join_group(CPU, 60)), {}
    for name, module in ours.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, _, name=name: seen.update({name: m.weight.dtype}))
    with ours.autocast(), torch.no_grad():
        ours.model(*inputs(config.model, 2))
    return seen, {weight.dtype for weight in ours.weights.values()}


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_sharding
def test_gathers_in_bfloat16_change_no_bit(config, tmp_path):
    """Autocast rounds the same weights in the same way."""
    low = with_train(config, precision="bfloat16")
    orders = [(with_train(low, parallel="fsdp"), tmp_path / name, name == "low") for name in ("low", "uncast")]
    run_together(2, several, orders, timeout=500)
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("low", "uncast")]
    assert logs[0] == logs[1]
    several([(low, tmp_path / "alone", True), (config, tmp_path / "float32", True)])
    np.testing.assert_allclose(losses(tmp_path / "low"), losses(tmp_path / "alone"), rtol=1e-2)
    assert not np.array_equal(losses(tmp_path / "low"), losses(tmp_path / "float32"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_sharding
def test_blocks_of_products_are_gathered_in_bfloat16_and_all_else_in_float32(config):
    scaled = replace(config.model.outer, norm="rms")  # its scales are computed with in float32
    config = replace(config, model=replace(config.model, outer=scaled))
    seen, stored = run_together(2, gathered, with_train(config, parallel="fsdp", precision="bfloat16"), timeout=400)[0]
    assert stored == {torch.float32}
    low = {name for name, dtype in seen.items() if dtype == torch.bfloat16}
    assert low == {name for name in seen if name.startswith("inner_blocks.")}
    assert {name.partition(".")[0] for name in seen} >= {"time_embed", "outer_blocks", "inner_blocks", "outer_head"}


def test_a_shard_that_does_not_fit_the_processes_is_refused_in_one_line(config):
    with pytest.raises(UserError, match=r"train\.shard=2 needs train\.parallel=fsdp: got ddp"):
        TrainConfig(shard=2)
    own = with_train(config, parallel="fsdp", shard=2).train
    with pytest.raises(UserError, match=r"train\.shard must divide the number of processes \(4\): got 3"):
        check_process_count(replace(own, shard=3), 4)
    for size in (1, 2, 4):  # one process has nothing to shard
        check_process_count(own, size)


class Recorded(DistributedDataParallel):
    """DDP's options, without processes."""

    def __init__(self, module, **options):
        torch.nn.Module.__init__(self)
        self.options = options


def test_only_on_cuda_ddp_sums_100_mb_at_once(config, monkeypatch):
    for module in (trainer, distributed):
        monkeypatch.setattr(module, "DistributedDataParallel", Recorded)
    ours = Trainer(config, open_source(config.data, config.model), CPU)
    ours.world = Process()
    ours.world.size = 2
    assert "bucket_cap_mb" not in ours._distribute(False).options
    ours.device = torch.device("cuda", 0)
    found = ours._distribute(False).options
    assert found["bucket_cap_mb"] == 100
    assert "static_graph" not in found  # docs/decisions/training.md


def test_the_table_of_the_document_is_that_of_the_script():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from scaling import table
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    assert table() in (ROOT / "docs/scaling.md").read_text()


# ------------------------------------------------------------------------------------------ selective recomputation


@pytest.mark.parametrize("kind", [{}, {"inner": {"mixer": "conv"}}], ids=str)
@pytest.mark.parametrize("low", [False, True])
def test_selective_recomputation_changes_no_bit(kind, low):
    plain = perturbed(NestedDiT(small_model("inner outer*2", **kind)))
    again = NestedDiT(plain.config, recompute="selective")
    again.load_state_dict(plain.state_dict())
    found = []
    for model in (plain, again):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out = model(*inputs(plain.config))
        out.square().sum().backward()
        found.append([out, *(weight.grad for weight in model.parameters())])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_inspect_counts_what_selective_recomputation_keeps(monkeypatch):
    model, caches, kept = small_model("inner*2 outer*2"), [], {}
    real = recompute._contexts
    monkeypatch.setattr(recompute, "_contexts", lambda: caches.append(pair := real()) or pair)
    net = NestedDiT(model, recompute="selective")
    own = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = net(*inputs(model, 4))
    assert len(caches) == 4
    for forward, _ in caches:
        for results in forward.storage.values():
            entries = results.values() if isinstance(results, dict) else results
            for tensor in torch.utils._pytree.tree_leaves([getattr(e, "val", e) for e in flat(entries)]):
                if isinstance(tensor, torch.Tensor):
                    keep(tensor)
    bytes_kept = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    counted = inspect(model, 4, "selective")["activation_bytes"]
    assert counted["total"] == pytest.approx(bytes_kept, rel=0.01)
    nothing, everything = (inspect(model, 4, how)["activation_bytes"]["total"] for how in ("both", "none"))
    assert 2 * nothing < counted["total"] < 0.7 * everything
    out.sum().backward()


def flat(entries):
    return torch.utils._pytree.tree_leaves(list(entries))


def test_selective_recomputation_is_inside_compiled_blocks(monkeypatch):
    from dit_in_dit.model import compiled
    from test_compiled import Counting

    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", counting := Counting())
    plain = perturbed(NestedDiT(small_model("inner*2 outer*2"), recompute="selective"))
    model = copy.deepcopy(plain)
    compiled.compile_blocks(model)
    grads = []
    for each in (plain, model):
        for _ in range(2):
            each.zero_grad()
            each(*inputs(plain.config)).square().sum().backward()
        grads.append([weight.grad for weight in each.parameters()])
    torch.testing.assert_close(*grads)
    assert counting.graphs == 2
