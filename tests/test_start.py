"""Warm start: a nested model starts from a trained DiT."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from conftest import inputs, perturbed, small_model, with_train
from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import override, to_yaml
from dit_in_dit.data.sources import open_source
from dit_in_dit.interop import import_run, resolve
from dit_in_dit.interop.release import export_release
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.folder import create_run, read_config
from dit_in_dit.runs.tensors import load_tensors
from dit_in_dit.training.batches import Examples
from dit_in_dit.training.loop import train
from dit_in_dit.training.trainer import Trainer
from dit_in_dit.training.warm_start import is_inner

ORDERS = {"first": "inner*2 outer*4", "interleaved": "(inner outer*2)*2", "last": "outer*4 inner*2"}


@pytest.fixture
def plain(run_config, tmp_path):
    """A DiT of four blocks after some training, and its run."""
    return trained(replace(run_config, model=model("outer*4")), tmp_path / "dit")


def trained(config, run):
    trainer = Trainer(config, open_source(config.data, config.model), torch.device("cpu"))
    trainer.update([Examples(trainer.source, config)[0]])  # the optimizer's moments are there
    perturbed(trainer.model)
    trainer.ema.model.load_state_dict(trainer.model.state_dict())
    create_run(run, config)
    checkpoint.save(run, config, 1, trainer.state(), trainer.averaged_state(), trainer.source.classes)
    return config, run, trainer


def model(stages, **inner):
    return small_model(stages, image_size=(8, 8), num_classes=3, inner=inner)


def nested(config, run, stages, **inner):
    inner.setdefault("fuse", "gate")
    return replace(with_train(config, init=str(run), learning_rate=1e-2), model=model(stages, **inner))


def losses(facts):
    return [fact.values["loss"] for fact in facts if fact.kind == "step"]


@pytest.mark.parametrize("order", ORDERS)
def test_a_warm_started_model_equals_the_dit_bit_for_bit_and_then_trains_its_inner_level(plain, tmp_path, order):
    config, run, trainer = plain
    ours = with_train(nested(config, run, ORDERS[order]), steps=10)
    begun = Trainer(ours, trainer.source, torch.device("cpu"))
    x, t, y = inputs(ours.model, batch=16)
    with torch.no_grad():
        assert (begun.model(x, t, y) - trainer.model(x, t, y)).abs().max() == 0
        assert (begun.ema.model(x, t, y) - trainer.model(x, t, y)).abs().max() == 0
    assert begun.begun.exact
    assert begun.begun.new == sum(is_inner(name) for name, _ in begun.model.named_parameters())

    facts = list(train(ours, tmp_path / order, device="cpu"))
    batch = Examples(trainer.source, ours)[0]
    with torch.no_grad():
        of_the_dit = trainer.objective.loss(trainer.model, batch.x, batch.noise, batch.t, batch.y).mean().item()
    assert losses(facts)[0] == of_the_dit
    before = dict(begun.model.named_parameters())
    state = load_tensors(checkpoint.newest(tmp_path / order).folder / checkpoint.STATE)
    assert [name for name, weight in before.items() if torch.equal(state[f"model.{name}"], weight)] == []


@pytest.mark.parametrize(
    ("stages", "inner", "exact"),
    [
        ("inner outer*4", {"fuse": "add"}, False),
        ("inner outer*4", {"fuse": "replace"}, False),
        ("outer*4 inner", {"fuse": "add"}, True),
        ("inner outer*4 inner", {"fuse": "gate"}, True),
        ("outer*3 inner", {"fuse": "add"}, False),  # a block is gone
    ],
)
def test_a_warm_start_reports_whether_the_output_is_unchanged(plain, stages, inner, exact):
    config, run, trainer = plain
    ours = nested(config, run, stages, **inner)
    begun = Trainer(ours, trainer.source, torch.device("cpu"))
    x, t, y = inputs(ours.model, batch=4)
    with torch.no_grad():
        assert torch.equal(begun.model(x, t, y), trainer.model(x, t, y)) == exact
    assert begun.begun.exact == exact


@pytest.mark.parametrize(("inner", "exact"), [({}, True), ({"mixer": "image"}, False)])
def test_a_nested_run_that_starts_from_its_own_kind_keeps_its_output(run_config, tmp_path, inner, exact):
    first = replace(run_config, model=model("outer*4 inner*2"))
    _, run, trainer = trained(first, tmp_path / "first")
    config = with_train(replace(first, model=model("outer*4 inner*2", **inner)), init=str(run))
    begun = Trainer(config, open_source(config.data, config.model), torch.device("cpu"))
    x, t, y = inputs(first.model)
    with torch.no_grad():
        assert torch.equal(begun.model(x, t, y), trainer.model(x, t, y)) == exact
    assert begun.begun.exact == exact
    assert ("is still that model's" in str(begun.begun)) == exact


def test_a_warm_start_copies_evenly_spaced_or_named_outer_blocks(plain):
    config, run, trainer = plain
    theirs = [block.branches["mlp"][0].weight for block in trainer.model.outer_blocks]
    for blocks, expected in ((None, [0, 2, 3]), ([0, 1, 3], [0, 1, 3])):
        ours = with_train(nested(config, run, "outer*3 inner"), init_blocks=blocks)
        begun = Trainer(ours, trainer.source, torch.device("cpu"))
        found = [block.branches["mlp"][0].weight for block in begun.model.outer_blocks]
        assert all(torch.equal(weight, theirs[number]) for weight, number in zip(found, expected, strict=True))


def test_frozen_outer_weights_stay_and_a_lower_rate_moves_them_less(plain, tmp_path):
    config, run, trainer = plain
    steps = {}
    for scale in (0, 0.1, 1):
        ours = override(
            nested(config, run, "outer*4 inner"), [f"train.lr_scale.outer={scale}", "train.weight_decay=0.1"]
        )
        list(train(ours, tmp_path / str(scale), device="cpu"))
        state = load_tensors(checkpoint.newest(tmp_path / str(scale)).folder / checkpoint.STATE)
        theirs = trainer.model.state_dict()
        outer = [(state[f"model.{n}"] - theirs[n]).norm() for n, _ in trainer.model.named_parameters()]
        steps[scale] = torch.stack(outer).norm().item()
        assert state["model.inner_head.final.linear.weight"].abs().max() > 0
    assert steps[0] == 0
    assert 0.05 < steps[0.1] / steps[1] < 0.2


def test_a_warm_started_run_resumes_without_the_run_it_started_from(plain, tmp_path):
    config, run, _ = plain
    ours = nested(config, run, "outer*4 inner")
    list(train(ours, tmp_path / "unbroken", device="cpu"))
    list(train(ours, tmp_path / "stopped", device="cpu", until=2))
    run.rename(tmp_path / "moved away")
    list(train(ours, tmp_path / "stopped", device="cpu", resume=True))
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("unbroken", "stopped")]
    assert logs[0] == logs[1]
    assert json.loads(logs[0].splitlines()[0])["step"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["model.outer.width=64"], "give both models the same outer width"),
        (["model.stages=outer*5 inner"], "has 4 outer blocks, fewer than the 5"),
        (["train.init_blocks=[0, 1, 2, 9]"], "train.init_blocks must name 4 of the 4 outer blocks"),
        (["train.init=nowhere"], "no run at nowhere"),
    ],
)
def test_a_warm_start_with_other_shapes_names_the_parameter(plain, change, message):
    config, run, trainer = plain
    with pytest.raises(UserError, match=message):
        Trainer(override(nested(config, run, "outer*4 inner"), change), trainer.source, torch.device("cpu"))


def test_parameters_of_a_model_belong_to_one_level():
    ours = NestedDiT(model("inner outer inner outer inner", condition="patch", aggregate="attention", fuse="gate"))
    outer = {n.split(".")[0] for n, _ in ours.named_parameters() if not is_inner(n)}
    assert outer == {"outer_embed", "outer_blocks", "outer_head", "time_embed", "label_embed"}


# ------------------------------------------------------------------------------------------ other classes and sizes


def begun(config, run, names, **changes):
    """A trainer whose model starts from the run, on data with these class names."""
    ours = replace(
        config, model=replace(config.model, **changes), train=replace(config.train, init=str(run), evaluate_every=0)
    )
    source = open_source(replace(config.data, source="mosaic"), replace(ours.model, num_classes=0))
    source.classes = tuple(names)
    return Trainer(ours, source, torch.device("cpu"))


def label_rows(trainer):
    return trainer.model.label_embed.table.weight.detach()


def test_classes_of_the_same_name_keep_their_label_row_and_others_start_anew(plain):
    config, run, trainer = plain  # of the classes blue, green, red
    names = ("black", "red", "white", "blue")
    started = begun(config, run, names, num_classes=4)
    old, new = label_rows(trainer), label_rows(started)
    assert torch.equal(new[[1, 3, 4]], old[[2, 0, 3]])  # the null class is the last
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        untouched = NestedDiT(started.config.model).label_embed.table.weight.detach()
    assert torch.equal(new[[0, 2]], untouched[[0, 2]])
    assert "2 of 4 classes keep their label row: its output is no longer" in str(started.begun)


def test_some_of_the_classes_in_another_order_give_the_same_output(plain):
    config, run, trainer = plain
    started = begun(config, run, ("red", "blue"), num_classes=2)
    x, t, _ = inputs(started.config.model, batch=3)
    with torch.no_grad():
        found = started.model(x, t, torch.tensor([0, 1, 2]))
        assert torch.equal(found, trainer.model(x, t, torch.tensor([2, 0, 3])))
    assert started.begun.exact
    assert "label row" not in str(started.begun)


@pytest.mark.parametrize(("names", "kept"), [("xyz", 3), ("012", 3), ("0123", 0), ("wxyz", 0)])
def test_without_a_shared_name_equally_many_classes_keep_their_rows_by_number(plain, names, kept):
    config, run, trainer = plain
    started = begun(config, run, names, num_classes=len(names))
    old, new = label_rows(trainer), label_rows(started)
    same = [bool((row == old[:3]).all(1).any()) for row in new[:-1]]
    assert sum(same) == kept
    assert torch.equal(new[-1], old[-1])


def test_numbers_are_no_names(plain, run_config, tmp_path):
    config, run, trainer = plain
    saved = checkpoint.newest(run)
    checkpoint.save(run, config, 2, saved.state(), saved.averaged(), ("0", "1", "2"))
    new = label_rows(begun(config, run, "01", num_classes=2))
    assert torch.equal(new[-1], label_rows(trainer)[-1])
    assert not (new[:2, None] == label_rows(trainer)[None]).all(-1).any()


def test_a_run_with_and_without_labels_start_from_each_other(plain, tmp_path):
    config, run, trainer = plain
    unlabelled = begun(config, run, ("all",), num_classes=0)
    assert torch.equal(label_rows(unlabelled), label_rows(trainer)[-1:])
    assert unlabelled.begun.exact


def test_a_model_of_another_image_size_computes_its_positions(plain):
    config, run, trainer = plain
    started = begun(config, run, ("blue", "green", "red"), image_size=(16, 8))
    assert started.model.outer_embed.position.shape[0] == 2 * trainer.model.outer_embed.position.shape[0]
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(dict(started.model.named_parameters())[name], weight)
    assert "positions are those of the new image size: its output is no longer" in str(started.begun)
    assert not started.begun.exact


def test_averaged_weights_in_half_precision_give_their_label_rows(plain, tmp_path):
    config, run, trainer = plain
    export_release(run, tmp_path / "slim")
    new = label_rows(begun(config, tmp_path / "slim", ("red", "new"), num_classes=2))
    torch.testing.assert_close(new[0], label_rows(trainer)[2], rtol=1e-3, atol=1e-4)


def test_the_command_starts_from_a_repository_and_from_weights_of_other_projects(plain, tmp_path, monkeypatch, capsys):
    config, run, _ = plain
    import_run.export_official(run, tmp_path / "weights.pt")
    monkeypatch.setattr(resolve, "is_repo_id", lambda text: text == "user/dit")
    monkeypatch.setattr(resolve, "fetch_repo", lambda name: run)
    (tmp_path / "new.yaml").write_text(to_yaml(with_train(config, steps=1)))
    for name in ("user/dit", str(tmp_path / "weights.pt")):
        out = tmp_path / name.replace("/", "-")
        main(["train", "--config", str(tmp_path / "new.yaml"), "--init", name, "--out", str(out), "--device", "cpu"])
        said = capsys.readouterr().err
        assert f"tensors of {name}, step" in said
        assert "; 0 are new: its output is still" in said
        assert read_config(out).train.init == name
    monkeypatch.undo()  # a resume fetches nothing
    (tmp_path / "weights.pt").unlink()
    main(["train", "--resume", "--set", "train.steps=2", "--out", str(out), "--device", "cpu"])
    assert checkpoint.newest(out).step == 2
