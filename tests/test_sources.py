"""A source of the user's own: named in the config, or given to train()."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import small_model
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DataConfig
from dit_in_dit.data.run_data import data_record, locate
from dit_in_dit.data.source import Source
from dit_in_dit.data.sources import SOURCES, count_classes, open_source, source_kind
from dit_in_dit.training.batches import Examples


class Dots(Source):
    """Flat images of seven greys, shifted at random for each example."""

    classes, train_size, digest = ("even", "odd"), 7, "dots 1"

    def __init__(self, data, model):
        self.rest, self.shape = data.source.partition(":")[2], (model.channels, *model.image_size)

    def train(self, index):
        return np.full(self.shape, index / 7, np.float32), index % 2

    def example(self, index, stream, *, flip):
        image, label = super().example(index, stream, flip=flip)
        return image + np.float32(stream().normal() / 100), label


class Shelf(Dots):
    """A kind that is recognised by what lies at a path."""

    by_path = True

    @classmethod
    def recognises(cls, source, name):
        return source.endswith(".shelf")


@pytest.fixture
def named(monkeypatch):
    monkeypatch.setitem(SOURCES, "dots", Dots)
    monkeypatch.setitem(SOURCES, "shelf files", Shelf)


@pytest.mark.parametrize(
    ("source", "rest"), [("dots", ""), ("dots:two.npz", "two.npz"), ("dots:b-{0..1}.tar", "b-{0..1}.tar")]
)
def test_a_name_in_the_table_opens_its_class(named, source, rest):
    opened = open_source(DataConfig(source=source), small_model(num_classes=2))
    assert isinstance(opened, Dots)
    assert opened.rest == rest
    assert count_classes(DataConfig(source=source)) == 0


def test_a_kind_of_ones_own_comes_before_ours_at_a_path(named, tmp_path):
    (tmp_path / "a.shelf").mkdir()
    assert source_kind(str(tmp_path / "a.shelf")) is Shelf
    with pytest.raises(UserError, match="no such file or folder: dotty"):
        source_kind("dotty")


def test_what_a_source_leaves_out_has_defaults(named):
    source = open_source(DataConfig(source="dots"), small_model(num_classes=2))
    assert source.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert source.held_out_size == 0
    with pytest.raises(IndexError, match="held_out_size is 0"):
        source.held_out(0)
    with pytest.raises(UserError, match="Bare has no digest"):
        _ = type("Bare", (Source,), {"train": None})().digest


def test_classes_of_ones_own_source_are_counted(named):
    with pytest.raises(UserError, match="must be what the data has: got 5, dots has 2"):
        open_source(DataConfig(source="dots"), small_model(num_classes=5))


def test_examples_of_ones_own_source_depend_on_seed_and_number_alone(named, run_config):
    config = replace(run_config, data=DataConfig(source="dots", flip=True), model=small_model(num_classes=2))
    first, again = (Examples(open_source(config.data, config.model), config)[3] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    greys = first.x.mean((1, 2, 3)) * 7
    assert (greys.round() - greys).abs().min() > 1e-4  # its own random numbers


@pytest.mark.parametrize("exists", [True, False])
def test_the_path_after_a_name_is_noted_as_one(named, tmp_path, monkeypatch, exists):
    monkeypatch.chdir(tmp_path)
    if exists:
        (tmp_path / "here").mkdir()
    data = DataConfig(source="dots:here")
    noted = data_record(open_source(data, small_model(num_classes=2)), data)
    assert noted == {"digest": "dots 1", "place": f"dots:{tmp_path / 'here'}" if exists else "dots:here"}
    monkeypatch.chdir("/")
    assert locate(data, noted).source == noted["place"]
    assert locate(DataConfig(source="dots"), noted).source == "dots"
