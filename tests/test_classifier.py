"""The classifier of real images: what it says of planted faults, where it is stored, and what it refuses."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from conftest import small_model, with_train
from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DataConfig, ModelConfig, RunConfig, SampleConfig
from dit_in_dit.data.source import Source
from dit_in_dit.data.sources import open_source
from dit_in_dit.metrics import classifier
from dit_in_dit.metrics.classifier import Classifier, LabelledImages, balanced_accuracy, find_classifier, held_out_part
from dit_in_dit.metrics.classifier_scores import classifier_scores
from dit_in_dit.metrics.metric import direction
from dit_in_dit.runs.integrity import file_sha256
from dit_in_dit.runtime.process import is_main
from dit_in_dit.training.loop import train
from processes import run_together

SHAPE = (16, 16, 3)


class Corners(Source):
    """A bright disc of any colour in one of the corners, which is the class, on noise."""

    classes, train_size, held_out_size, digest = ("a", "b", "c", "d"), 400, 80, "corners"

    def train(self, index, first=0):
        draw, label = np.random.default_rng(first + index), index % 4
        image = draw.uniform(-1, -0.6, (3, 16, 16)).astype(np.float32)
        rows, columns = np.mgrid[:16, :16]
        y, x = (4 + 8 * (label // 2) + draw.uniform(-1, 1), 4 + 8 * (label % 2) + draw.uniform(-1, 1))
        image[:, (rows - y) ** 2 + (columns - x) ** 2 < 9] = draw.uniform(0.2, 1, (3, 1))
        return image, label

    def held_out(self, index):
        return self.train(index, 10_000)


def classifier_files() -> list[Path]:
    return list(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.safetensors"))


def trained(source, shape=SHAPE, flip=False) -> Classifier:
    *_, last = find_classifier(source, shape, flip=flip)
    return last


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(classifier, "STEPS", 80)
        patch.setattr(classifier, "GRID", 8)
        patch.setattr(classifier, "WARM_UP", 10)
        yield


@pytest.fixture(scope="module")
def of_corners(_own_cache) -> tuple[Classifier, LabelledImages, LabelledImages]:
    """The classifier, held-out images, and as many images that neither of the two parts has."""
    source = Corners()
    drawn = [source.train(index, 20_000) for index in range(80)]
    images = np.stack([np.rint((image + 1) * 127.5).astype(np.uint8) for image, _ in drawn]).transpose(0, 2, 3, 1)
    return trained(source), held_out_part(source), LabelledImages(images, np.array([label for _, label in drawn]))


def test_unseen_real_images_score_as_held_out_ones(of_corners):
    model, held_out, unseen = of_corners
    scores = classifier_scores(model, unseen, held_out)
    accuracy, distance = scores["classifier.accuracy"], scores["classifier.frechet"]
    assert accuracy.value > 0.95
    assert accuracy.floor > 0.95
    assert distance.low < 1.5 * distance.floor
    assert accuracy.low <= accuracy.value <= accuracy.high
    assert direction("classifier.accuracy") == "higher"
    assert direction("classifier.frechet") == "lower"


def test_permuted_labels_score_as_chance(of_corners):
    model, held_out, unseen = of_corners
    permuted = replace(unseen, labels=np.random.default_rng(0).permutation(unseen.labels))
    assert classifier_scores(model, permuted, held_out)["classifier.accuracy"].value == pytest.approx(0.25, abs=0.12)


def shuffled(images):
    """The four quarters of each image in a random order."""
    draw = np.random.default_rng(0)
    result = []
    for image in images:
        parts = [image[y : y + 8, x : x + 8] for y in (0, 8) for x in (0, 8)]
        a, b, c, d = (parts[k] for k in draw.permutation(4))
        result.append(np.concatenate([np.concatenate([a, b], 1), np.concatenate([c, d], 1)]))
    return np.stack(result)


@pytest.mark.parametrize("fault", ["shuffled", "flat", "one image", "half of the classes"])
def test_planted_faults_are_seen(of_corners, fault):
    model, held_out, unseen = of_corners
    images, labels = unseen.images, unseen.labels
    if fault == "shuffled":
        images = shuffled(images)
    elif fault == "flat":
        images = np.broadcast_to(images.mean((1, 2), keepdims=True), images.shape).astype(np.uint8)
    elif fault == "one image":
        images = np.repeat(images[:1], len(images), axis=0)
    else:
        images = images[labels % 2 + 4 * (np.arange(len(labels)) // 4)]  # of "c" and "d" come "a" and "b"
    sound, faulty = (classifier_scores(model, each, held_out) for each in (unseen, LabelledImages(images, labels)))
    assert faulty["classifier.accuracy"].high < sound["classifier.accuracy"].low - 0.2
    if fault != "shuffled":  # a shuffled image is an image of another class
        assert faulty["classifier.frechet"].low > 2 * sound["classifier.frechet"].high


def test_a_rare_class_counts_as_much_as_a_frequent_one():
    labels = np.array([0] * 90 + [2] * 10)  # class 1 does not occur
    assert balanced_accuracy(labels == 0, labels) == pytest.approx(0.5)


def test_the_fifth_likeliest_class_counts_from_twenty_classes_on():
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (40, *SHAPE), dtype=np.uint8)
    model = Classifier(SHAPE, 20, {}).eval()
    logits = model.classify(images)[1]
    fifth, sixth = np.argsort(-logits, axis=1)[:, 4], np.argsort(-logits, axis=1)[:, 5]
    held_out = LabelledImages(images, fifth)
    assert classifier_scores(model, held_out, held_out)["classifier.top5"].value == 1
    scores = classifier_scores(model, LabelledImages(images, sixth), held_out)
    assert scores["classifier.top5"].value == 0
    assert scores["classifier.top5"].floor == 1


def test_training_is_repeatable_and_its_result_is_stored(of_corners, monkeypatch, tmp_path):
    model, *_ = of_corners
    assert len(list(find_classifier(Corners(), SHAPE, flip=False))) == 1  # no step
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    again = trained(Corners())
    assert again.identity == model.identity
    assert again.identity["accuracy of held-out images"] > 0.95
    (path,) = tmp_path.rglob("*.safetensors")
    other = Corners()
    other.digest = "others"
    assert trained(other).identity["source"] == "others"
    first, second = sorted(tmp_path.rglob("*.safetensors"))
    first.write_bytes(second.read_bytes()) if first == path else second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=r"classifier of other images; delete the file"):
        [trained(Corners()), trained(other)]
    path.write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"cannot read the classifier in .*; delete the file"):
        trained(Corners())


@pytest.mark.parametrize("about", [["a list"], {"identity": {}}, {"accuracies": {}}], ids=str)
def test_stored_weights_with_other_metadata_are_refused(of_corners, monkeypatch, tmp_path, about):
    model, *_ = of_corners
    (stored,) = (path for path in classifier_files() if file_sha256(path) == model.identity["sha256"])
    path = tmp_path / "dit-in-dit/classifiers" / stored.name
    path.parent.mkdir(parents=True)
    path.write_bytes(save(model.state_dict(), metadata={"classifier": json.dumps(about)}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"cannot read the classifier in .*identity and accuracies; delete the file"):
        trained(Corners())


def test_training_sees_training_images_only(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(classifier, "STEPS", 2)
    seen, step = [], classifier._moved
    monkeypatch.setattr(classifier, "_moved", lambda images, *rest: seen.append(images) or step(images, *rest))
    trained(Corners())
    own = {image.tobytes() for image in held_out_part(Corners()).images}
    for batch in seen:
        pixels = ((batch.permute(0, 2, 3, 1) + 1) * 127.5).round().to(dtype=torch.uint8).numpy()
        assert not own & {image.tobytes() for image in pixels}


def test_no_family_of_emoji_is_on_both_sides():
    source = open_source(DataConfig(source="emoji"), ModelConfig(image_size=8, patch_size=4, num_classes=9))
    sides = [
        {source.title(index, held_out=held_out).split("~")[0] for index in range(size)}
        for held_out, size in ((False, source.train_size), (True, source.held_out_size))
    ]
    assert sides[1]
    assert not sides[0] & sides[1]


@pytest.mark.parametrize(
    ("keys", "words"),
    [({"classes": ("one",)}, "at least 2 classes: got 1"), ({"held_out_size": 19}, "at least 20 held-out images")],
    ids=str,
)
def test_sources_that_do_not_suffice_are_refused(keys, words):
    source = Corners()
    for name, value in keys.items():
        setattr(source, name, value)
    with pytest.raises(UserError, match=words):
        trained(source)


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to a folder of yours"):
        trained(Corners())


# ------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps on mosaics."""
    config = RunConfig(
        model=small_model("outer*1 inner*1", image_size=(8, 8), num_classes=9),
        data=DataConfig(source="mosaic"),
        sample=SampleConfig(steps=2),
    )
    config = with_train(config, steps=4, batch_size=4, precision="float32", sample_every=0, evaluate_every=0)
    place = tmp_path_factory.mktemp("run") / "run"
    for _ in train(config, place, device="cpu"):
        pass
    return place


def evaluate(*arguments: object) -> None:
    main(["evaluate", *map(str, arguments), "--metrics", "pixels,classifier", "--device", "cpu"])


def evaluated(run, out, cache) -> bytes | None:
    """metrics.json of an evaluation by this process, with an empty cache and a short training; process 0 has it."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    classifier.MOST_TRAIN, classifier.STEPS = 300, 5
    evaluate(run, "-n", 24, "--out", out)
    return (out / "metrics.json").read_bytes() if is_main() else None


def test_evaluate_names_the_classifier_in_its_protocol_and_two_processes_give_the_same(run, tmp_path):
    (one,) = run_together(1, evaluated, run, tmp_path / "one", tmp_path / "cache of one")
    result = json.loads(one)
    assert {"classifier.accuracy", "classifier.frechet"} <= result["scores"].keys()
    assert len(result["protocol"]["metrics"]["classifier"]["sha256"]) == 64
    assert run_together(2, evaluated, run, tmp_path / "two", tmp_path / "cache of two") == [one, None]


def test_images_without_classes_and_other_classes_are_refused(run, tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images)
    for arguments, words in (
        ((tmp_path / "images.npz", "--against", "emoji"), "needs samples of known classes"),
        ((run, "--against", "emoji"), "needs real images of the model's classes"),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate(*arguments, "-n", 24, "--out", tmp_path / "out")
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line
