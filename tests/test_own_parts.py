"""Runs of train() with a user's own source, model and optimizer train, and resume bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import small_model
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import to_yaml
from dit_in_dit.config.run import DataConfig
from dit_in_dit.data.sources import SOURCES
from dit_in_dit.doctor.doctor import examine
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.folder import read_config
from dit_in_dit.training.loop import train
from dit_in_dit.training.optimizer import OPTIMIZERS, restore_state, state_of
from test_sources import Dots


class Sum(torch.optim.Optimizer):
    """Signed momentum whose state has Python numbers per weight and per group, and none of Adam's names."""

    def __init__(self, groups, lr=1.0):
        super().__init__(groups, {"lr": lr, "total": 0.0, "calls": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["calls"] += 1
            group["total"] += 1 / group["calls"]
            for weight in group["params"]:
                state = self.state[weight]
                state["count"] = state.get("count", 0) + 1
                state["decay"] = 0.9 * state.get("decay", 1.0)
                state["trace"] = 0.9 * state.get("trace", torch.zeros_like(weight)) + weight.grad
                state["rows"] = state["trace"].sum() + state["decay"]
                size = group["lr"] * group["total"] / group["calls"] * (1 + 1 / state["count"])
                weight.sub_(size * state["trace"].sign())


class Doubled(NestedDiT):
    """The config's model with twice the output."""

    def forward(self, x, t, y=None):
        return 2 * super().forward(x, t, y)


def momentum(groups):
    return torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)


def plain(groups):
    return torch.optim.SGD(groups, lr=1.0)


@pytest.fixture
def config(run_config):
    data = DataConfig(source="emoji", flip=True)  # not what it is trained on
    model = small_model(num_classes=2, channels=3, image_size=(16, 8))
    how = replace(run_config.train, steps=6, checkpoint_every=3, sample_every=0, evaluate_every=0, warmup=2)
    return replace(run_config, model=model, data=data, train=how)


def dots(config):
    return Dots(DataConfig(source="dots"), config.model)


def content(run: Path) -> list[bytes]:
    last = run / "checkpoints" / "0000006"
    return [
        (run / "log.jsonl").read_bytes(),
        *((last / name).read_bytes() for name in ("state.safetensors", "ema.safetensors")),
    ]


def in_one_go_and_in_two(config, tmp_path, **own) -> Path:
    """A run that was stopped and resumed, checked against an uninterrupted run; `own` makes arguments of train()."""

    def made():
        return {name: make() for name, make in own.items()}

    list(train(config, tmp_path / "one", device="cpu", **made()))
    list(train(config, tmp_path / "two", device="cpu", until=4, **made()))
    list(train(config, tmp_path / "two", device="cpu", resume=True, **made()))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    return tmp_path / "two"


def manifest(run: Path) -> dict:
    return checkpoint.newest(run).manifest


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_built_in_optimizer_resumes_bit_for_bit(run_config, tmp_path, name):
    how = replace(run_config.train, optimizer=name, weight_decay=0.1, steps=6, checkpoint_every=3)
    run = in_one_go_and_in_two(replace(run_config, train=how), tmp_path)
    state = checkpoint.newest(run).state()
    kept = {key.split(".")[1] for key in state if key.startswith("optimizer")}
    assert kept == {"step", "exp_avg", "exp_avg_sq"} | ({"momentum_buffer"} if name == "muon" else set())
    assert "objects" not in manifest(run)
    assert ("optimizer: adam\n" in to_yaml(read_config(run))) == (name == "adam")


@pytest.mark.parametrize(
    ("optimizer", "named"),
    [(momentum, "torch.optim.sgd.SGD"), (plain, "torch.optim.sgd.SGD"), (Sum, "test_own_parts.Sum")],
)
def test_a_run_with_a_users_source_and_optimizer_resumes_bit_for_bit(config, tmp_path, optimizer, named):
    run = in_one_go_and_in_two(config, tmp_path, data=lambda: dots(config), optimizer=lambda: optimizer)
    assert manifest(run)["objects"] == {"optimizer": named}
    assert manifest(run)["data"] == {"digest": "dots 1", "place": "object:test_sources.Dots"}
    checkpoint.Checkpoint.open(run).model(torch.device("cpu"))


def test_a_users_optimizer_resumes_with_learning_rate_factors(config, tmp_path):
    scaled = replace(config, train=replace(config.train, lr_scale=replace(config.train.lr_scale, inner=0.5)))
    in_one_go_and_in_two(scaled, tmp_path, data=lambda: dots(config), optimizer=lambda: Sum)


def test_a_users_model_resumes_bit_for_bit_and_is_not_taken_for_the_configs_model(config, tmp_path, monkeypatch):
    def model():
        torch.manual_seed(3)
        return Doubled(config.model)

    run = in_one_go_and_in_two(config, tmp_path, data=lambda: dots(config), model=model)
    assert manifest(run)["objects"] == {"model": "test_own_parts.Doubled"}
    with pytest.raises(UserError, match=r"a model given to train.*Doubled: load ema.safetensors into that model"):
        checkpoint.Checkpoint.open(run).model(torch.device("cpu"))
    monkeypatch.setitem(SOURCES, "dots", Dots)
    with pytest.raises(UserError, match=r"model test_own_parts.Doubled: got the config's"):
        list(train(config, run, resume=True, device="cpu", data="dots"))


def test_a_run_asks_for_the_source_and_optimizer_that_it_was_trained_with(config, tmp_path, monkeypatch):
    run, own = tmp_path / "run", {"data": dots(config), "optimizer": Sum}
    list(train(config, run, device="cpu", until=3, **own))
    with pytest.raises(UserError, match=r"optimizer test_own_parts.Sum: .*got torch.optim.sgd.SGD"):
        list(train(config, run, device="cpu", resume=True, **{**own, "optimizer": momentum}))
    with pytest.raises(UserError, match=r"no such file or folder: object:test_sources.Dots"):
        list(train(config, run, device="cpu", resume=True, optimizer=Sum))
    with pytest.raises(UserError, match=r"trained on a source given to train.*register its class"):
        examine(read_config(run), torch.device("cpu"), run)
    monkeypatch.setitem(SOURCES, "dots", Dots)
    list(train(config, run, device="cpu", resume=True, **{**own, "data": "dots"}))  # named from here on
    assert manifest(run)["data"] == {"digest": "dots 1", "place": "dots"}
    examine(read_config(run), torch.device("cpu"), run)


def test_a_users_source_must_fit_the_model(config, tmp_path):
    for model, wrong in (
        (small_model(num_classes=5), "must fit the data: got 5, but object:test_sources.Dots has 2"),
        (small_model(num_classes=2, image_size=(8, 8)), r"float32 of shape \[3, 8, 8\]: got float32 \[3, 16, 8\]"),
    ):
        with pytest.raises(UserError, match=wrong):
            list(train(replace(config, model=model), tmp_path / "run", device="cpu", data=dots(config)))


def test_optimizer_state_is_unchanged_after_saving_and_loading():
    weights = {name: torch.nn.Parameter(torch.randn(3, 2)) for name in ("a.weight", "b")}
    optimizers = [Sum([{"params": list(weights.values()), "scale": 1.0}]) for _ in range(2)]
    for _ in range(3):
        for weight in weights.values():
            weight.grad = torch.randn(3, 2)
        optimizers[0].step()
    state = state_of(optimizers[0], weights.items())
    assert {"optimizer.trace.a.weight", "optimizer_number.count.b", "optimizer_group.0.total"} <= state.keys()
    restore_state(optimizers[1], weights.items(), state)
    assert str(optimizers[1].state_dict()) == str(optimizers[0].state_dict())
    assert type(optimizers[1].state[weights["b"]]["count"]) is int


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (lambda groups: None, "must be a torch.optim.Optimizer: got NoneType"),
        (lambda groups: torch.optim.SGD([w for g in groups for w in g["params"]], 0.1), "lost the factors"),
        (
            lambda groups: torch.optim.SGD([{**g, "params": g["params"][:1]} for g in groups], 0.1),
            "of the model's weights",
        ),
    ],
)
def test_a_function_that_returns_no_optimizer_of_the_model_gives_a_one_line_error(config, tmp_path, optimizer, said):
    with pytest.raises(UserError, match=said):
        list(train(config, tmp_path / "run", device="cpu", data=dots(config), optimizer=optimizer))


def test_a_users_model_class_with_changed_weights_gives_a_one_line_error(config, tmp_path):
    class Grown(Doubled):
        def __init__(self, *arguments, **keys) -> None:
            super().__init__(*arguments, **keys)
            self.extra = torch.nn.Linear(2, 2)

    Grown.__module__, Grown.__qualname__ = Doubled.__module__, Doubled.__qualname__
    list(train(config, tmp_path / "run", device="cpu", data=dots(config), model=Doubled(config.model), until=3))
    grown = Grown(config.model)
    with pytest.raises(UserError, match="the model has changed since"):
        list(train(config, tmp_path / "run", device="cpu", data=dots(config), model=grown, resume=True))
