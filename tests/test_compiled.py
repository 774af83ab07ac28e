"""Training and sampling with blocks compiled by kind: same numbers, few graphs, clear failures; CUDA graphs."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from compiling import Counting, NoHostWait, losses, recorded
from conftest import SHARDED, inputs, only_full, perturbed, small_model, with_train
from dit_in_dit.cli import main
from dit_in_dit.config.errors import LeftOutWarning, UserError
from dit_in_dit.config.files import config_hash, from_yaml, override, to_yaml
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.data.sources import open_source
from dit_in_dit.inspection.hooks import watch_attention, watch_blocks
from dit_in_dit.model import compiled, nested
from dit_in_dit.model.compiled import compile_blocks, is_compiled
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs.folder import read_config
from dit_in_dit.runtime.device import resolve_auto
from dit_in_dit.training import graphs, trainer
from dit_in_dit.training.batches import Examples
from dit_in_dit.training.distributed import join_group
from dit_in_dit.training.loop import train
from dit_in_dit.training.trainer import Trainer
from processes import run_together

CPU = torch.device("cpu")


def deep(config, **keys):
    """Three inner and five outer blocks: two kinds."""
    return with_train(
        replace(config, model=small_model("inner*2 outer*4 inner outer", image_size=(8, 8), num_classes=3)), **keys
    )


@pytest.mark.parametrize(
    "keys",
    [{"recompute": "both", "batch_size": 3}, {"accumulate": 2, "precision": "bfloat16"}, {"batch_size": 1}],
    ids=str,
)
def test_training_compiles_each_kind_of_block_once_and_never_again(run_config, backend, keys):
    config = deep(run_config, **keys)
    found = losses(with_train(config, compile=True), counting=backend)
    assert [graphs for _, graphs in found] == [2, 2, 2]  # inner and outer
    expected = [loss for loss, _ in losses(with_train(config, compile=False))]
    assert [loss for loss, _ in found] == pytest.approx(expected, rel=1e-5 if "precision" not in keys else 1e-3)


class SmallBuckets(DistributedDataParallel):
    """DDP with buckets that are smaller than a block, at which PyTorch would split a compiled graph."""

    def __init__(self, module, **options):
        super().__init__(module, bucket_cap_mb=0.001, **options)


def two_processes(config):
    trainer.DistributedDataParallel = SmallBuckets
    torch._dynamo.reset()
    counting = compiled.BACKEND = Counting()
    with warnings.catch_warnings():
        warnings.simplefilter("error", LeftOutWarning)
        return losses(config, world=join_group(CPU, 60), counting=counting)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [only_full("ddp"), SHARDED])
def test_two_processes_compile_each_kind_of_block_once(run_config, parallel):
    config = deep(run_config, parallel=parallel)
    found = run_together(2, two_processes, with_train(config, compile=True))
    expected = [loss for loss, _ in losses(with_train(config, compile=False))]
    for each in found:
        assert [graphs for _, graphs in each] == [2, 2, 2]
        assert [loss for loss, _ in each] == pytest.approx(expected, rel=1e-5)


def test_blocks_that_do_not_compile_give_one_line_or_run_as_they_are(run_config, monkeypatch):
    def broken(module, examples, **how):
        raise RuntimeError("no compiler found\nin this place")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    config = with_train(run_config, compile=True)
    with pytest.raises(UserError, match=r"set train\.compile=false \(.*no compiler found") as error:
        losses(config)
    assert "\n" not in str(error.value)
    source = open_source(config.data, config.model)
    ours = Trainer(config, source, CPU, fall_back=True)
    with pytest.warns(LeftOutWarning, match="run without compilation"):
        loss = float(ours.update([Examples(source, config)[0]])["loss"])
    assert loss == losses(with_train(config, compile=False), steps=1)[0][0]


def test_an_error_that_is_not_the_compilers_is_unchanged(run_config):
    with pytest.raises(ValueError, match="x must be"), compiled.explain_failures():
        NestedDiT(run_config.model)(torch.zeros(1, 3, 4, 4), 0.5)


def test_hooks_inside_compiled_blocks_are_called(backend):
    model = perturbed(NestedDiT(small_model("inner outer*2")))
    plain, (x, t, y) = copy.deepcopy(model), inputs(model.config)
    compile_blocks(model)
    expected = model(x, t, y)
    before = backend.graphs
    for watch in (watch_attention, watch_blocks):
        with watch(model) as seen, watch(plain) as wanted:
            model(x, t, y), plain(x, t, y)
        assert len(seen) == 3
        torch.testing.assert_close(seen, wanted)
    assert torch.equal(model(x, t, y), expected)
    assert backend.graphs == before == 2


def test_a_copy_of_a_compiled_model_has_its_own_weights(backend):
    model = perturbed(NestedDiT(small_model("inner outer*2")))
    compile_blocks(model)
    other, call = copy.deepcopy(model), inputs(model.config)
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    assert is_compiled(other)
    assert not other(*call).any()
    assert model(*call).any()
    assert other.state_dict().keys() == model.state_dict().keys() == NestedDiT(model.config).state_dict().keys()


def test_a_users_module_without_blocks_is_compiled_whole(backend):
    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, x, *, scale=2.0):
            return self.layer(x) * scale

    mine, x = Mine(), torch.ones(3, 2)
    expected = mine(x), mine(x, scale=3.0)
    compile_blocks(mine)
    torch.testing.assert_close((mine(x), mine(x, scale=3.0)), expected)
    assert backend.graphs == 2


@pytest.mark.parametrize(
    ("value", "text"), [("auto", "auto"), (True, "true"), (False, "false"), ("graphs", "graphs")], ids=str
)
def test_train_compile_is_read_and_written(value, text):
    config = override(RunConfig(), [f"train.compile={text}"])
    assert config.train.compile is value or config.train.compile == value == str(value)
    assert f"  compile: {text}\n" in to_yaml(config)
    assert from_yaml(to_yaml(config)) == config
    # The former default, which every older config has: its hash is that of the present default.
    assert (config_hash(config) == config_hash(RunConfig())) == (value in ("auto", False))


@pytest.mark.parametrize("value", [1, 0, "yes", None, [True]], ids=str)
def test_other_values_of_train_compile_are_refused(value):
    with pytest.raises(UserError, match=r"^train\.compile must be one of auto, true, false, graphs: got"):
        TrainConfig(compile=value)


def test_auto_is_off_on_a_cpu_and_a_resumed_run_stays_as_it_was(run_config, tmp_path, backend):
    assert run_config.train.compile == "auto"
    list(train(run_config, tmp_path / "plain", device="cpu", until=2))
    list(train(run_config, tmp_path / "plain", device="cpu", resume=True, until=3))
    assert read_config(tmp_path / "plain").train.compile is False
    assert backend.graphs == 0
    list(train(with_train(run_config, compile=True), tmp_path / "compiled", device="cpu", until=2))
    made = backend.graphs
    list(train(run_config, tmp_path / "compiled", device="cpu", resume=True, until=3))
    assert backend.graphs > made > 0
    with pytest.raises(UserError, match=r"another config: train\.compile is True, not False"):
        list(train(with_train(run_config, compile=False), tmp_path / "compiled", device="cpu", resume=True))


def test_auto_compiles_on_cuda(monkeypatch):
    config = with_train(RunConfig(), precision="bfloat16")
    for spec, expected in ((object(), True), (None, False)):  # without Triton nothing compiles
        monkeypatch.setattr("dit_in_dit.runtime.device.find_spec", lambda name, spec=spec: spec)
        assert resolve_auto(config, torch.device("cuda")).train.compile is expected
        assert resolve_auto(config, CPU).train.compile is False


def test_cuda_graphs_are_refused_without_cuda(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--preset", "emoji", "--set", "train.compile=graphs", "--device", "cpu", "--out", str(tmp_path)])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "train.compile=graphs needs CUDA" in said
    assert said.count("\n") == 1
    for keys in ({"recompute": "both"}, {"reduction": "fixed"}):
        with pytest.raises(UserError, match=r"needs train\.recompute=none and train\.reduction=fast"):
            TrainConfig(compile="graphs", **keys)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_replayed_step_trains_as_a_compiled_one(run_config, backend, monkeypatch, accumulate):
    monkeypatch.setattr(graphs, "capture", recorded)
    config = with_train(run_config, accumulate=accumulate)
    replayed = [loss for loss, _ in losses(with_train(config, compile="graphs"), steps=4)]
    assert replayed == [loss for loss, _ in losses(with_train(config, compile=True), steps=4)]
    assert len(set(replayed)) == 4


@pytest.mark.parametrize(
    "keys",
    [{}, {"accumulate": 2, "precision": "bfloat16", "recompute": "both"}, {"optimizer": "muon", "weight_decay": 0.1}],
    ids=str,
)
def test_no_step_between_log_lines_waits_for_the_device(run_config, tmp_path, monkeypatch, keys):
    # Inputs on a GPU are not read: test_precision holds it.
    monkeypatch.setattr(nested, "_check_inputs", lambda *inputs: None)
    update, steps = Trainer.update, []

    def watched(self, batches):
        with NoHostWait():
            steps.append(self.step)
            return update(self, batches)

    monkeypatch.setattr(Trainer, "update", watched)
    list(train(with_train(run_config, **keys), tmp_path / "run", device="cpu"))
    assert steps == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(Trainer, "_descend", lambda self, norm, finite: finite.item())
    with pytest.raises(AssertionError, match="the host waits"):
        list(train(run_config, tmp_path / "waits", device="cpu"))
