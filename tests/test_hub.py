"""Local datasets of Hugging Face give the same examples as a folder, in the same order, without a network."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest

import test_data
from conftest import small_model
from dit_in_dit.config.errors import LeftOutWarning, UserError
from dit_in_dit.config.run import DataConfig
from dit_in_dit.data.sources import count_classes, open_source
from test_data import everything
from test_tars import CLASSES, paths_of


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The cache of `datasets` is in the test's folder; the hub is never contacted."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def opened(source, *, classes: int = 3, **keys):
    model = small_model(image_size=(8, 8), num_classes=classes)
    return open_source(DataConfig(**{"source": f"hf:{source}", "held_out": 0.2, **keys}), model)


def table(folder: Path, **columns):
    """The folder as rows: files with their names, and class numbers."""
    paths = paths_of(folder)
    rows = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        "label": [CLASSES.index(path.parent.name) for path in paths],
        **columns,
    }
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    return datasets.Dataset.from_dict(rows).cast_column("image", kinds["image"]).cast_column("label", kinds["label"])


def test_parquet_arrow_and_saved_datasets_give_the_same_examples_as_their_folder(folder, tmp_path, monkeypatch):
    rows = table(folder)
    rows.to_parquet(tmp_path / "set.parquet")
    (tmp_path / "repository/data").mkdir(parents=True)
    rows.select(range(20)).to_parquet(tmp_path / "repository/data/train-00000-of-00002.parquet")
    rows.select(range(20, 30)).to_parquet(tmp_path / "repository/data/train-00001-of-00002.parquet")
    rows.select(range(3)).to_parquet(tmp_path / "repository/data/test-00000-of-00001.parquet")
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(tmp_path / "splits")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    expected = everything(test_data.opened(folder))
    monkeypatch.setattr("dit_in_dit.data.formats.images.IN_MEMORY", 0)  # each row is read when it is asked for
    for place in (tmp_path / "set.parquet", tmp_path / "repository", tmp_path / "saved", tmp_path / "splits", arrow):
        source = opened(place)
        assert source.classes == CLASSES
        assert everything(source) == expected, place
    assert everything(pickle.loads(pickle.dumps(source))) == expected  # as a worker process gets it
    assert opened(tmp_path / "repository", split="test", held_out=0.0).train_size == 3


def test_columns_have_configurable_names(folder, tmp_path):
    rows = table(folder).rename_columns({"image": "picture", "label": "colour"})
    rows.save_to_disk(tmp_path / "saved")
    named = opened(tmp_path / "saved", image_column="picture", label_column="colour")
    assert named.classes == CLASSES
    for keys, part in (
        ({}, "data.image_column: .* has no 'image'; choose from colour, picture"),
        ({"image_column": "picture"}, "data.label_column: .* has no 'label'"),
        ({"image_column": "colour", "label_column": "colour"}, "no images"),
    ):
        with pytest.raises(UserError, match=part):
            opened(tmp_path / "saved", **keys)
    assert opened(tmp_path / "saved", classes=0, image_column="picture").classes == ("images",)


def test_labels_may_be_names_or_numbers_and_images_may_be_plain_bytes(folder, tmp_path):
    paths = paths_of(folder)
    files = [path.read_bytes() for path in paths]
    names = [path.parent.name for path in paths]
    datasets.Dataset.from_dict({"image": files, "label": names}).save_to_disk(tmp_path / "names")
    numbers = [CLASSES.index(name) for name in names]
    datasets.Dataset.from_dict({"image": files, "label": numbers}).save_to_disk(tmp_path / "numbers")
    expected = [label for _, label in everything(opened(tmp_path / "names", held_out=0.0))]
    source = opened(tmp_path / "numbers", held_out=0.0)
    assert [label for _, label in everything(source)] == expected == numbers
    assert source.classes == ("0", "1", "2")
    datasets.Dataset.from_dict({"image": files, "label": [-1] * 30}).save_to_disk(tmp_path / "hidden")
    with pytest.raises(UserError, match="from 0 to 2: got -1"):
        opened(tmp_path / "hidden")


def test_variants_of_one_family_are_not_split(folder, tmp_path):
    content = paths_of(folder)[0].read_bytes()
    names = [f"hand{i}~{tone}.png" for i in range(20) for tone in ("light", "dark")]
    rows = datasets.Dataset.from_dict({"image": [{"bytes": content, "path": name} for name in names]})
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")
    held = opened(tmp_path / "set", classes=0)._held
    assert 0 < len(held) < 40
    assert all(number ^ 1 in held for number in held)  # the other tone


def test_a_dataset_that_cannot_be_loaded_gives_a_one_line_error(folder, tmp_path):
    table(folder).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table(folder)}).save_to_disk(tmp_path / "splits")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    (tmp_path / "empty").mkdir()
    for source, keys in (
        (tmp_path / "torn.parquet", {}),
        (tmp_path / "empty", {}),
        (tmp_path / "splits", {"split": "validation"}),
        ("somebody/never-made", {}),
    ):
        with pytest.raises(UserError, match="cannot load hf:") as refused:
            opened(source, **keys)
        assert "\n" not in str(refused.value)


def test_a_missing_package_is_named_with_its_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'dit-in-dit\[hub\]'"):
        opened("somebody/some-images")


def test_an_image_that_cannot_be_read_is_named_by_its_row(folder, tmp_path):
    files = [path.read_bytes() for path in paths_of(folder)]
    files[4] = b"torn"
    datasets.Dataset.from_dict({"image": files}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="row 4"):
        opened(tmp_path / "saved", classes=0)
    source = opened(tmp_path / "saved", classes=0, corrupt="skip")
    assert (source.skipped, source.train_size + source.held_out_size) == (["row 4"], 29)


@pytest.mark.parametrize("most", [2**28, 0])  # by content, by size
def test_a_digest_of_rows_depends_on_files_and_labels(folder, tmp_path, monkeypatch, most):
    monkeypatch.setattr("dit_in_dit.data.digest.MOST_CONTENT", most)
    rows = table(folder)
    rows.to_parquet(tmp_path / "set.parquet")
    rows.save_to_disk(tmp_path / "saved")
    first = opened(tmp_path / "saved").digest
    assert opened(tmp_path / "set.parquet").digest == first
    (tmp_path / "saved").rename(tmp_path / "moved")
    assert opened(tmp_path / "moved").digest == first
    labels = [(label + 1) % 3 for label in rows["label"]]
    for number, other in enumerate((rows.select(range(29)), table(folder, label=labels))):
        other.save_to_disk(tmp_path / str(number))
        assert opened(tmp_path / str(number)).digest != first


def test_boolean_labels_are_read_as_0_and_1(folder, tmp_path):
    files = [path.read_bytes() for path in paths_of(folder)]
    truths = [number % 3 == 0 for number in range(30)]
    datasets.Dataset.from_dict({"image": files, "label": truths}).save_to_disk(tmp_path / "saved")
    source = opened(tmp_path / "saved", classes=2, held_out=0.0)
    assert source.labels.tolist() == [int(truth) for truth in truths]
    assert type(source.train(0)[1]) is int
    assert count_classes(DataConfig(source=f"hf:{tmp_path / 'saved'}")) == 2


@pytest.mark.parametrize("fields", [("bytes", "path"), ("bytes",)])
def test_a_plain_struct_of_bytes_and_path_is_read_as_an_image(folder, tmp_path, fields):
    """Parquet that was not written by `datasets` has none of its metadata."""
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths_of(folder)]
    plain = pyarrow.table(
        {
            "image": [{name: image[name] for name in fields} for image in images],
            "label": [CLASSES.index(path.parent.name) for path in paths_of(folder)],
        }
    )
    pyarrow.parquet.write_table(plain, tmp_path / "plain.parquet")
    table(folder).to_parquet(tmp_path / "set.parquet")
    source, expected = (opened(tmp_path / name, held_out=0.0) for name in ("plain.parquet", "set.parquet"))
    assert everything(source) == everything(expected)
    assert everything(pickle.loads(pickle.dumps(source))) == everything(expected)
    if "path" in fields:
        assert source.families == expected.families
    other = pyarrow.table({"image": [{"text": "a"}] * 3})
    pyarrow.parquet.write_table(other, tmp_path / "other.parquet")
    with pytest.raises(UserError, match="no images"):
        opened(tmp_path / "other.parquet", classes=0)


def test_columns_that_are_not_read_are_reported(folder, tmp_path):
    table(folder, caption=["a"] * 30).save_to_disk(tmp_path / "saved")
    with pytest.warns(LeftOutWarning, match="left out columns: 1, such as caption"):
        opened(tmp_path / "saved")
