"""A user's own source: named in the config, or given to train()."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import small_model
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DataConfig
from dit_in_dit.data.run_data import data_record, find_moved_data
from dit_in_dit.data.source import Source
from dit_in_dit.data.sources import SOURCES, count_classes, open_source, source_kind
from dit_in_dit.training.batches import Examples
from dit_in_dit.training.loop import train


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
    """A kind that is recognised by a path."""

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
def test_a_source_name_opens_its_class(named, source, rest):
    opened = open_source(DataConfig(source=source), small_model(num_classes=2))
    assert isinstance(opened, Dots)
    assert opened.rest == rest
    assert count_classes(DataConfig(source=source)) == 0


def test_a_registered_kind_is_tried_before_the_built_in_kinds(named, tmp_path):
    (tmp_path / "a.shelf").mkdir()
    assert source_kind(str(tmp_path / "a.shelf")) is Shelf
    with pytest.raises(UserError, match="no such file or folder: dotty"):
        source_kind("dotty")


def test_optional_attributes_of_a_source_have_defaults(named):
    source = open_source(DataConfig(source="dots"), small_model(num_classes=2))
    assert source.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert source.held_out_size == 0
    with pytest.raises(IndexError, match="held_out_size is 0"):
        source.held_out(0)
    with pytest.raises(UserError, match="Bare has no digest"):
        _ = type("Bare", (Source,), {"train": None})().digest


def test_classes_of_a_registered_source_are_counted(named):
    with pytest.raises(UserError, match="must fit the data: got 5, but dots has 2"):
        open_source(DataConfig(source="dots"), small_model(num_classes=5))


def test_examples_of_a_registered_source_depend_only_on_seed_and_number(named, run_config):
    config = replace(run_config, data=DataConfig(source="dots", flip=True), model=small_model(num_classes=2))
    first, again = (Examples(open_source(config.data, config.model), config)[3] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    greys = first.x.mean((1, 2, 3)) * 7
    assert (greys.round() - greys).abs().min() > 1e-4  # its own random numbers


@pytest.mark.parametrize("exists", [True, False])
def test_the_path_after_a_name_is_recorded_as_absolute(named, tmp_path, monkeypatch, exists):
    monkeypatch.chdir(tmp_path)
    if exists:
        (tmp_path / "here").mkdir()
    data = DataConfig(source="dots:here")
    noted = data_record(open_source(data, small_model(num_classes=2)), data)
    assert noted == {"digest": "dots 1", "place": f"dots:{tmp_path / 'here'}" if exists else "dots:here"}
    monkeypatch.chdir("/")
    assert find_moved_data(data, noted).source == noted["place"]
    assert find_moved_data(DataConfig(source="dots"), noted).source == "dots"


WRONG_ATTRIBUTES = [
    ({"classes": 5}, "classes must be a tuple of texts: got 5"),
    ({"classes": (1, 2)}, r"classes must be a tuple of texts: got \(1, 2\)"),
    ({"classes": "ab"}, "classes must be a tuple of texts: got ab"),
    ({"train_size": 0}, "train_size must be at least 1, or None for an endless source: got 0"),
    ({"train_size": 2.5}, "train_size must be at least 1, or None for an endless source: got 2.5"),
    ({"held_out_size": -1}, "held_out_size must be a whole number of at least 0: got -1"),
    ({"digest": b"dots"}, "digest must be a text: got b'dots'"),
    ({"shape": (3, 9, 8)}, r"images must be float32 of shape \[3, 8, 8\]: got float32 \[3, 9, 8\]"),
    ({"fill": float("nan")}, "images must be finite: got NaN or infinity in training image 0"),
    ({"train": lambda self, index: 1}, r"an example must be a pair \(image, label\): got int"),
    ({"train": lambda self, index: (1.0, 0)}, r"images must be float32 of shape \[3, 8, 8\]: got float \[\]"),
    ({"train": lambda self, index: (np.zeros(self.shape), 0)}, r"got float64 \[3, 8, 8\]"),
    (
        {"train": lambda self, index: (np.zeros(self.shape, np.float32), "odd")},
        "labels must be whole numbers: got 'odd'",
    ),
    ({"train": lambda self, index: (np.zeros(self.shape, np.float32), 3)}, "labels must be from 0 to 2: got 3"),
    ({"labels": np.full(Dots.train_size, 7)}, "labels must be from 0 to 2: got 7 to 7"),
    ({"labels": np.zeros(3, np.int64)}, r"labels must be one whole number per training image: got int64 \[3\]"),
    ({"labels": [0.5] * 4}, r"labels must be one whole number per training image: got float64 \[4\]"),
]


class Wrong(Dots):
    """Flat images of three classes; a test replaces an attribute."""

    classes, shape, fill, held_out_size = ("a", "b", "c"), (3, 8, 8), 0.5, 0

    def __init__(self, *_):
        pass

    def train(self, index):
        return np.full(self.shape, self.fill, np.float32), 0


@pytest.mark.parametrize("how", ["named", "given"])
@pytest.mark.parametrize(("attributes", "message"), WRONG_ATTRIBUTES)
def test_a_wrong_source_is_refused_when_it_is_opened(attributes, message, how, run_config, tmp_path, monkeypatch):
    kind = type("Wrong", (Wrong,), attributes)
    monkeypatch.setitem(SOURCES, "wrong", kind)
    config, given = (
        (replace(run_config, data=DataConfig(source="wrong")), None) if how == "named" else (run_config, kind())
    )
    with pytest.raises(UserError, match=f"^source Wrong: .*{message}; fix the class$"):
        list(train(config, tmp_path / "run", device="cpu", data=given))
    assert not (tmp_path / "run").exists()


def test_a_list_of_classes_and_numpy_labels_are_accepted(run_config, tmp_path):
    labels = {"train": lambda self, index: (np.zeros(self.shape, np.float32), np.uint8(index % 3))}
    source = type("Listed", (Wrong,), {"classes": ["a", "b", "c"], **labels})()
    assert list(train(run_config, tmp_path / "run", device="cpu", data=source))[-1].step == run_config.train.steps


class Late(Wrong):
    """A source whose first image is right and whose others are wrong."""

    def __init__(self, wrong):
        self.wrong = wrong

    def train(self, index):
        image = np.full(self.shape, self.fill, np.float32)
        return (image, 0) if index == 0 else self.wrong(image)

    def held_out(self, index):
        return np.full(self.shape, self.fill, np.float32), 0 if index == 0 else -1


def with_double(image):
    return image.astype(np.float64), 0


def with_label(image):
    return image, 7


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (with_double, r"images must be float32 of shape \[3, 8, 8\]: got float64 \[3, 8, 8\]"),
        (with_label, "labels must be from 0 to 2: got 7"),
    ],
)
def test_a_wrong_example_ends_training_with_a_one_line_error(wrong, message, workers, run_config, tmp_path):
    config = replace(run_config, data=replace(run_config.data, workers=workers))
    with pytest.raises(UserError, match=f"^source Late: {message}; fix the class$"):
        list(train(config, tmp_path / "run", device="cpu", data=Late(wrong)))


def test_a_wrong_held_out_example_ends_training_with_a_one_line_error(run_config, tmp_path):
    source = Late(with_label)
    source.held_out_size = 2
    with pytest.raises(UserError, match=r"^source Late: labels must be from 0 to 2: got -1; fix the class$"):
        list(train(run_config, tmp_path / "run", device="cpu", data=source))
