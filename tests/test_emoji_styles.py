"""Emoji of several styles in Unicode's subgroups: `data.source=emoji:STYLE+STYLE`."""

from __future__ import annotations

import tomllib
import zipfile
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dit_in_dit as dd
from conftest import small_model
from dit_in_dit.cli import main
from dit_in_dit.config.emoji import STYLES, named_styles
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import override
from dit_in_dit.config.run import DataConfig, RunConfig
from dit_in_dit.config.schema import to_hash
from dit_in_dit.data.augment import augmentation_labels, check_augmentation
from dit_in_dit.data.labels import class_numbers
from dit_in_dit.data.run_data import absolute_place
from dit_in_dit.data.sources import open_source
from dit_in_dit.training.batches import Examples
from dit_in_dit.training.loop import train
from dit_in_dit.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
DATA = ROOT / "src/dit_in_dit/data"
CLASSES = 99  # subgroups of emoji-test.txt, without those of components
IMAGES = {"noto": 1861, "twemoji": 1831, "fluent": 1560}  # EMOJI-STYLES-NOTICE.txt, docs/data.md
BOTH = "emoji:noto+fluent"
CPU = torch.device("cpu")


def opened(source, held_out=0.1):
    return open_source(
        DataConfig(source=source, held_out=held_out), small_model(image_size=(8, 8), num_classes=CLASSES)
    )


def parts(source):
    """Style, subgroup and family of the training and of the held-out images, by their file names."""
    sizes = ((False, source.train_size), (True, source.held_out_size))
    titles = [[source.title(index, held_out=held) for index in range(size)] for held, size in sizes]
    return [[(*title.split("/")[:2], Path(title).stem.split("~")[0]) for title in part] for part in titles]


def test_every_style_is_counted_in_the_notice_and_drawn_on_white():
    with zipfile.ZipFile(DATA / "emoji-styles.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".webp")]
        images = np.stack([np.asarray(Image.open(BytesIO(archive.read(name)))) for name in names])
    counts = Counter(name.split("/")[0] for name in names)
    assert counts == {style: count for style, count in IMAGES.items() if style != "noto"}
    notice = (DATA / "EMOJI-STYLES-NOTICE.txt").read_text()
    assert all(f"{count:,} in the folder {style}" in notice for style, count in counts.items())
    assert images.shape[1:] == (64, 64, 3)
    assert (images[:, [0, 0, -1, -1], [0, -1, 0, -1]] >= 250).all()  # corners
    assert (255 - images.astype(np.float32)).mean((1, 2, 3)).min() > 255 * 0.005  # none is blank
    assert len({image.tobytes() for image in images}) == len(images)


@pytest.mark.parametrize("style", STYLES)
def test_every_style_alone_has_all_subgroups_as_classes_and_no_skin_tones(style):
    source = opened(f"emoji:{style}")
    trained, held = parts(source)
    assert len(source.classes) == CLASSES
    assert list(source.classes) == sorted(source.classes)
    assert {"animal-mammal", "food-fruit", "face-smiling", "country-flag", "sky-weather"} < {*source.classes}
    assert len(trained) + len(held) == IMAGES[style]
    assert {each[0] for each in trained + held} == {style}
    assert source.styles is None
    assert [source.classes[label] for label in source.labels] == [subgroup for _, subgroup, _ in trained]


def test_tones_add_the_skin_tones_of_noto():
    source = opened("emoji:noto+tones", held_out=0.5)
    assert source.train_size + source.held_out_size == 3641  # emoji.zip
    assert any("skin-tone" in source.title(index) for index in range(source.train_size))


def test_no_emoji_is_on_both_sides_in_any_style():
    trained, held = parts(opened("emoji:styles"))
    assert {style for style, _, _ in trained} == {*STYLES}
    assert {style for style, _, _ in held} == {"noto"}  # in which the model samples
    families = {family for _, _, family in held}
    assert families.isdisjoint(family for _, _, family in trained)
    alone = {style: {family for _, _, family in parts(opened(f"emoji:{style}"))[1]} for style in STYLES}
    assert all(other & {family for *_, family in trained} == set() for other in alone.values())
    assert {subgroup for _, subgroup, _ in trained} == {*opened("emoji:noto").classes}  # no class is lost


def test_an_image_shows_the_same_emoji_in_every_class_and_style():
    both, noto = opened(BOTH), opened("emoji:noto")
    titles = {noto.title(index): index for index in range(noto.train_size)}
    for index in range(0, both.train_size, 97):
        style, subgroup, _ = both.title(index).split("/")
        assert both.classes[both.labels[index]] == subgroup
        assert list(STYLES)[:3:2][both.styles[index]] == style
        if style == "noto":
            image, label = noto.train(titles[both.title(index)])
            np.testing.assert_array_equal(both.train(index)[0], image)
            assert label == both.labels[index]


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("emoji:", "no style ''"),
        ("emoji:twemojis", "did you mean 'twemoji'"),
        ("emoji:noto+noto", "names a style twice"),
        ("emoji:styles+fluent", "names a style twice"),
        ("emoji:fluent+tones", "only Noto has skin tones"),
        ("emoji:tones", "only Noto has skin tones"),
    ],
)
def test_other_words_are_refused(source, part):
    with pytest.raises(UserError, match=part):
        DataConfig(source=source)


def test_styles_of_other_sources_and_of_old_runs_change_nothing(tmp_path, monkeypatch):
    assert named_styles("emoji") == named_styles("hf:noto") == ((), False)
    assert RunConfig().model.augment_labels == 0
    assert "augment_labels" not in to_hash(RunConfig())["model"]
    monkeypatch.chdir(tmp_path)
    Path("noto").mkdir()
    assert absolute_place("emoji:noto") == "emoji:noto"  # the name of a style is no path


def small_run(**settings):
    keys = ["model.image_size=8", "model.patch_size=4", "model.stages=outer", "model.outer.width=16"]
    keys += ["model.outer.num_heads=2", "train.batch_size=16", "train.steps=2", "train.precision=float32"]
    keys += ["train.evaluate_every=2", "train.sample_every=0", "train.checkpoint_every=2", "sample.steps=2"]
    keys += [f"data.source={BOTH}", f"model.num_classes={CLASSES}"]
    return override(RunConfig(), [*keys, *(f"{name.replace('__', '.')}={value}" for name, value in settings.items())])


@pytest.mark.parametrize("kind", [None, "edm", "exact"])
def test_the_network_reads_the_style_of_each_image_behind_its_augmentation(kind):
    config = small_run(**({"data__augment": 0.5, "data__augment_kind": kind} if kind else {}))
    source = open_source(config.data, config.model)
    trainer, seen = Trainer(config, source, CPU), []
    trainer.net.augment_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = Examples(source, config).packed(0)
    trainer.update([batch])
    told = [source.title(number).startswith("fluent/") for number in batch.image.tolist()]
    assert 0 < sum(told) < len(told)
    assert seen[0][:, -1].tolist() == told
    if kind:
        assert torch.equal(seen[0][:, :-1], augmentation_labels(config, batch.example))
    else:
        assert seen[0].shape == (16, 1)


def test_the_style_that_is_named_first_has_zero_labels():
    source = opened("emoji:fluent+noto")
    first = next(index for index in range(source.train_size) if source.styles[index] == 0)
    assert source.title(first).startswith("fluent/")
    assert {style for style, *_ in parts(source)[1]} == {"fluent"}


def test_images_without_styles_are_refused_where_the_config_names_styles():
    with pytest.raises(UserError, match=r"`styles`: set data.source=emoji"):
        check_augmentation(small_run(), opened("emoji:noto"))


def test_a_run_in_balanced_order_samples_subgroups_by_name_and_by_their_common_part(tmp_path, capsys):
    run = tmp_path / "run"
    for _ in train(small_run(data__balance="class"), run, device="cpu"):
        pass
    words = ["sample", str(run), "-n", "4", "--out", str(tmp_path / "samples"), "--device", "cpu"]
    main([*words, "--classes", "animal-mammal,food-fruit"])
    main(["export", str(run), "--format", "run", "--out", str(tmp_path / "released")])
    card = (tmp_path / "released" / "README.md").read_text()
    assert "Noto Color Emoji, copyright Google Inc. (OFL 1.1); Fluent Emoji" in card
    assert "Twemoji" not in card
    classes = dd.load(run).classes
    assert len(dd.load(run).sample(["animal-mammal", "food-fruit"])) == 2
    named = [classes[number] for number in class_numbers("animal,keycap", classes)]
    assert named == [
        *sorted(f"animal-{kind}" for kind in ("amphibian", "bird", "bug", "mammal", "marine", "reptile")),
        "keycap",
    ]


def test_a_balanced_order_shows_every_subgroup_equally_often():
    config = small_run(data__balance="class")
    source = open_source(config.data, config.model)
    examples = Examples(source, config)
    seen = Counter(int(source.labels[examples.image_of(index)]) for index in range(3 * CLASSES))
    assert seen == dict.fromkeys(range(CLASSES), 3)


def test_the_wheel_has_the_notices_and_names_the_licences():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    held = {path.name for pattern in project["license-files"] for path in ROOT.glob(pattern)}
    assert held >= {"LICENSE", "EMOJI-NOTICE.txt", "EMOJI-STYLES-NOTICE.txt"}
    assert {*project["license"].split(" AND ")} == {"Apache-2.0", "OFL-1.1", "CC-BY-4.0", "MIT"}
