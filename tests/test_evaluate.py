"""`evaluate` and `compare_evaluations`: scores with their protocol, computed once, by any number of processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DataConfig
from dit_in_dit.config.strict_json import json_difference
from dit_in_dit.metrics.report import compare_evaluations
from dit_in_dit.metrics.subject import files_subject, reference
from dit_in_dit.runs import shards
from dit_in_dit.training.loop import train


@pytest.fixture(scope="module")
def run(tmp_path_factory, run_config_of) -> Path:
    """A run of six steps on 60 small images with grey stripes."""
    return run_config_of(tmp_path_factory.mktemp("evaluate"), "a run")


@pytest.fixture(scope="module")
def run_config_of(folder):
    """Function that trains a small run, given a folder, a name, a seed and data keys."""
    from conftest import small_model
    from dit_in_dit.config.run import RunConfig, SampleConfig
    from dit_in_dit.config.training import TrainConfig

    def make(root: Path, name: str, seed: int = 0, **data) -> Path:
        config = RunConfig(
            seed=seed,
            model=small_model("outer*1 inner*1", image_size=(8, 8), num_classes=3),
            data=DataConfig(source=str(folder), held_out=0.2, **data),
            train=TrainConfig(steps=4, batch_size=4, precision="float32", sample_every=0, evaluate_every=0),
            sample=SampleConfig(steps=2),
        )
        for _ in train(config, root / name, device="cpu"):
            pass
        return root / name

    return make


def evaluate(*arguments: object) -> None:
    main(["evaluate", *map(str, arguments), "--device", "cpu"])


def result_of(path: Path) -> dict:
    return json.loads((path / "metrics.json").read_text())


def test_an_evaluation_records_its_protocol_and_draws_figures(run, tmp_path, capsys):
    evaluate(run, "--num", 9, "--out", tmp_path / "a", "--npz", "--guidance", 1.5, "--seed", 3)
    found = result_of(tmp_path / "a")
    protocol = found["protocol"]
    assert protocol["images"] == 9
    assert protocol["size"] == [8, 8, 3]
    assert protocol["precision"] == "float32, no TF32"
    wanted = {"sampler": "heun", "steps": 2, "guidance": 1.5, "weights": "averaged", "seed": 3, "precision": "float32"}
    assert wanted.items() <= protocol["samples"].items()
    assert len(protocol["reference"]["sha256"]) == 64
    assert protocol["reference"]["part"] == "the training part"
    assert found["subject"]["step"] == 4
    assert {"swd.8", "spectrum", "moments.mean", "seam.4", "seam.2", "memorised", "repeated"} <= found["scores"].keys()
    for score in found["scores"].values():
        assert score["floor"] is not None
        assert score["low"] <= score["value"] <= score["high"]
    for name in ("samples.png", "metrics.png", "nearest.png"):
        assert Image.open(tmp_path / "a" / name).size > (50, 20)
    with np.load(tmp_path / "a/samples.npz") as archive:
        assert archive["arr_0"].shape == (9, 8, 8, 3)
        assert archive["arr_0"].dtype == np.uint8
        stored = np.concatenate(list(shards.read_chunks(tmp_path / "a/samples", 9, 8, "images")))
        assert (archive["arr_0"] == stored).all()
    assert "swd.8" in capsys.readouterr().out


def test_label_frequencies_match_the_data_unless_classes_are_given(run, tmp_path):
    evaluate(run, "--num", 4, "--out", tmp_path / "a")
    evaluate(run, "--num", 4, "--out", tmp_path / "b", "--classes", "red,blue")
    assert result_of(tmp_path / "a")["protocol"]["samples"]["labels"] == "as often as in the training data"
    assert result_of(tmp_path / "b")["protocol"]["samples"]["labels"] == ["red", "blue"]


def test_scores_are_equal_for_a_folder_a_zip_and_arrays_at_any_batch_size(folder_of_samples, folder, tmp_path):
    images, array, archive = folder_of_samples
    scores = []
    for number, (subject, batch) in enumerate(((images, 1), (images, 10), (images, 20), (array, 7), (archive, 3))):
        evaluate(subject, "--against", folder, "--num", 14, "--out", tmp_path / str(number), "--batch", batch)
        scores.append(result_of(tmp_path / str(number))["scores"])
    assert all(found == scores[0] for found in scores)


@pytest.fixture(scope="module")
def folder_of_samples(tmp_path_factory) -> tuple[Path, Path, Path]:
    """The same 14 images as PNG files, as a .npz and as a .zip."""
    root = tmp_path_factory.mktemp("samples")
    pixels = np.random.default_rng(5).integers(0, 256, (14, 8, 8, 3), dtype=np.uint8)
    (root / "png").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(root / f"png/{number:03d}.png")
    np.savez(root / "samples.npz", arr_0=pixels)
    with zipfile.ZipFile(root / "samples.zip", "w") as archive:
        for path in sorted((root / "png").iterdir()):
            archive.write(path, path.name)
    return root / "png", root / "samples.npz", root / "samples.zip"


def test_two_processes_give_the_scores_of_one_process(run, tmp_path):
    evaluate(run, "--num", 20, "--micro-batch", 4, "--out", tmp_path / "one")
    command = [sys.executable, "-m", "dit_in_dit", "evaluate", str(run), "--num", "20", "--micro-batch", "4"]
    command += ["--out", str(tmp_path / "two"), "--device", "cpu"]
    workers = [
        subprocess.Popen(command, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=200)
        assert worker.returncode == 0, errors
    assert (tmp_path / "two/metrics.json").read_bytes() == (tmp_path / "one/metrics.json").read_bytes()


@pytest.mark.slow
def test_a_killed_evaluation_resumes_to_the_same_json(run, tmp_path):
    evaluate(run, "--num", 60, "--micro-batch", 2, "--out", tmp_path / "whole")
    command = [sys.executable, "-m", "dit_in_dit", "evaluate", str(run), "--num", "60", "--micro-batch", "2"]
    command += ["--out", str(tmp_path / "killed"), "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "killed/samples").glob("*.npz"))) < 5:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed/samples").glob("*.npz")}
    assert 5 <= len(made) < 30
    assert not (tmp_path / "killed/metrics.json").exists()
    subprocess.run(command, check=True, timeout=200, stderr=subprocess.DEVNULL)
    assert (tmp_path / "killed/metrics.json").read_bytes() == (tmp_path / "whole/metrics.json").read_bytes()
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in made.items())  # not generated again


def test_another_evaluation_in_the_same_folder_is_refused_with_the_field_that_differs(run, tmp_path, capsys):
    evaluate(run, "--num", 4, "--out", tmp_path / "a")
    with pytest.raises(SystemExit) as stop:
        evaluate(run, "--num", 4, "--out", tmp_path / "a", "--guidance", 3)
    assert stop.value.code == 2
    assert "samples.guidance: 1.0 / 3.0" in capsys.readouterr().err
    evaluate(run, "--num", 6, "--batch", 64, "--out", tmp_path / "a")  # more images with the same settings are accepted
    assert result_of(tmp_path / "a")["protocol"]["images"] == 6


def test_mosaic_runs_are_measured_against_the_truth(tmp_path):
    from conftest import small_model
    from dit_in_dit.config.run import RunConfig, SampleConfig
    from dit_in_dit.config.training import TrainConfig

    config = RunConfig(
        model=replace(small_model("outer*1 inner*1", image_size=(16, 16)), num_classes=9),
        data=DataConfig(source="mosaic"),
        train=TrainConfig(steps=2, batch_size=4, precision="float32", sample_every=0, evaluate_every=0),
        sample=SampleConfig(steps=2),
    )
    for _ in train(config, tmp_path / "run", device="cpu"):
        pass
    evaluate(tmp_path / "run", "--num", 4, "--out", tmp_path / "a")
    scores = result_of(tmp_path / "a")["scores"]
    assert {f"detail.{n}@{t}" for n in ("period", "direction", "contrast", "layout") for t in (0.5, 0.8)} <= set(scores)
    assert scores["detail.direction@0.5"]["floor"] > 0.9  # the true images have this detail


# --------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "no such run, folder or file"),
        (["{png}", "--out", "{tmp}/x"], "--against"),
        (["{png}", "--against", "{folder}"], "--out"),
        (["{run}", "--metrics", "fid"], "unknown metrics 'fid'"),
        (["{run}", "--num", "1", "--out", "{tmp}/x"], "metrics need at least 2 generated and 4 real images"),
        (["{run}", "--classes", "purple", "--out", "{tmp}/x"], "unknown class"),
        (["{run}", "--against", "nowhere", "--out", "{tmp}/x"], "no such file or folder"),
        (["{mixed}", "--against", "{folder}", "--out", "{tmp}/x"], "must be of one size"),
        (["{run}", "--statistics", "{png}/000.png", "--out", "{tmp}/x"], "000.png"),
    ],
)
def test_a_wrong_call_gives_a_one_line_error(run, folder, folder_of_samples, tmp_path, capsys, arguments, words):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for side in (8, 9):
        Image.new("RGB", (side, 8)).save(mixed / f"{side}.png")
    names = {"run": run, "folder": folder, "png": folder_of_samples[0], "tmp": tmp_path, "mixed": mixed}
    with pytest.raises(SystemExit) as stop:
        evaluate(*(argument.format(**names) for argument in arguments))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert words in lines[0]


def test_the_error_names_a_damaged_chunk(run, tmp_path, capsys):
    evaluate(run, "--num", 4, "--micro-batch", 2, "--out", tmp_path / "a")
    (tmp_path / "a/samples/0000002-0000004.npz").write_bytes(b"half of it")
    with pytest.raises(SystemExit) as stop:
        evaluate(run, "--num", 4, "--micro-batch", 2, "--out", tmp_path / "a")
    assert stop.value.code == 2
    assert "0000002-0000004.npz is damaged" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- compare


def test_evaluations_of_one_protocol_share_a_table_and_a_picture(run, run_config_of, tmp_path, capsys):
    other = run_config_of(tmp_path, "another", seed=1)
    for subject in (run, other):
        evaluate(subject, "--num", 6)
    main(["compare", str(run), str(other), "--out", str(tmp_path / "both")])
    table = capsys.readouterr().out
    assert "a run@4" in table
    assert "another@4" in table
    assert len(json.loads((tmp_path / "both/compare.json").read_text())["scores"]["spectrum"]) == 2
    assert Image.open(tmp_path / "both/compare.png").size > (200, 200)


def test_different_protocols_are_refused_with_the_field_that_differs(run, tmp_path, capsys):
    evaluate(run, "--num", 4, "--out", tmp_path / "a")
    evaluate(run, "--num", 5, "--out", tmp_path / "b")
    evaluate(run, "--num", 4, "--steps", 3, "--out", tmp_path / "c")
    for other, words in (("b", "images: 4 / 5"), ("c", "samples.steps: 2 / 3")):
        with pytest.raises(UserError, match=words):
            compare_evaluations([tmp_path / "a", tmp_path / other])
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(tmp_path / "a"), str(tmp_path / "nowhere")])
    assert stop.value.code == 2


def test_the_first_difference_names_its_path():
    assert json_difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == "a.c: 2 / 3"
    assert json_difference({"a": 1}, {"a": 1, "b": 2}) == "b: null / 2"
    assert json_difference({"a": [1, 2]}, {"a": [1, 2]}) == ""


def test_all_real_data_is_used_except_a_held_out_part(folder, folder_of_samples):
    subject = files_subject(folder_of_samples[1])
    whole = reference(str(folder), subject, 10)
    assert (whole.count, whole.unseen_count, whole.about["part"]) == (30, 0, "all images")
    named = reference("emoji", subject, 10)
    assert named.unseen_count > 0
    assert named.about["part"] == "the training part"


def test_images_of_several_styles_are_measured_in_the_first_style(folder_of_samples):
    subject = files_subject(folder_of_samples[1])
    both, noto = (reference(source, subject, 10) for source in ("emoji:noto+twemoji", "emoji:noto"))
    assert both.about["part"] == "the training part in the first style"
    assert both.about["images"] == noto.about["images"] > 1000
    assert both.about["sha256"] == noto.about["sha256"]


# ---------------------------------------------------------------------------------------- standard metrics

FAKE = """
import sys, torch
from dit_in_dit.cli import main
from dit_in_dit.metrics import feature_networks as features

torch.manual_seed(0)
layers = torch.nn.Conv2d(3, 8, 3), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(288, 6)
net = torch.nn.Sequential(*layers).double()

def compute(pixels):
    x = net(torch.from_numpy(pixels).permute(0, 3, 1, 2) .double() / 127.5 - 1)
    return {"pool": x, "spatial": 2 * x[:, :4], "logits": 3 * x}

found = features.Network("inception", {"weights": "none", "sha256": "0" * 64}, compute)
features.open_network = lambda *arguments: found
main(sys.argv[1:])
"""


def evaluate_with_fake_inception(*arguments: object, **environment: str) -> None:
    """Run `evaluate` in a separate process, with a small random network in place of Inception."""
    command = [
        sys.executable,
        "-c",
        FAKE,
        "evaluate",
        *map(str, arguments),
        "--metrics",
        "inception",
        "--device",
        "cpu",
    ]
    subprocess.run(command, check=True, timeout=200, env={**os.environ, **environment}, capture_output=True)


def test_standard_scores_match_the_features_and_are_not_named_fid_below_2048(folder_of_samples, folder, tmp_path):
    images = folder_of_samples[0]
    evaluate_with_fake_inception(images, "--against", folder, "--out", tmp_path / "a")
    scores = result_of(tmp_path / "a")["scores"]
    names = {"Frechet distance (N=14)", "Frechet distance (spatial, N=14)", "IS", "KID (subsets of 14)"}
    assert names | {"precision", "recall", "density", "coverage"} <= scores.keys()
    assert not any("FID" in name for name in scores)
    sides = []
    for part in sorted((tmp_path / "a/features").iterdir()):
        sides.append(np.concatenate([np.load(path)["pool"] for path in sorted(part.iterdir())]).astype(float))
    assert sorted(map(len, sides)) == [14, 30]
    from scipy.linalg import sqrtm

    (m, s), (n, t) = [(x.mean(0), np.cov(x.T)) for x in sides]
    expected = np.sum((m - n) ** 2) + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert scores["Frechet distance (N=14)"]["value"] == pytest.approx(expected, rel=1e-6)


def test_standard_scores_do_not_depend_on_batch_size_or_number_of_processes(folder_of_samples, folder, tmp_path):
    images, scores = folder_of_samples[0], {}
    for batch in (1, 10, 20):
        evaluate_with_fake_inception(images, "--against", folder, "--out", tmp_path / str(batch), "--batch", batch)
        scores[batch] = result_of(tmp_path / str(batch))["scores"]
    arguments = (images, "--against", folder, "--out", tmp_path / "two", "--batch", 10)
    with ThreadPoolExecutor() as pool:
        ranks = [{"RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
        list(pool.map(lambda rank: evaluate_with_fake_inception(*arguments, **rank), ranks))
    assert result_of(tmp_path / "two") == result_of(tmp_path / "10")
    for name in scores[1]:
        values = [scores[batch][name]["value"] for batch in scores]
        assert values == pytest.approx([values[0]] * 3, rel=1e-9, abs=1e-12), name


def test_statistics_of_adms_layout_replace_real_features(folder_of_samples, folder, tmp_path):
    draw = np.random.default_rng(0).normal(size=(50, 6))
    mean, covariance = draw.mean(0), np.cov(draw.T)
    statistics = {"mu": mean, "sigma": covariance, "mu_s": mean[:4], "sigma_s": covariance[:4, :4]}
    np.savez(tmp_path / "reference.npz", **statistics)
    out = tmp_path / "a"
    evaluate_with_fake_inception(
        folder_of_samples[0], "--against", folder, "--out", out, "--statistics", tmp_path / "reference.npz"
    )
    result = result_of(out)
    part = next(path for path in (out / "features").iterdir() if path.name.endswith("samples"))
    mine = np.concatenate([np.load(path)["pool"] for path in sorted(part.iterdir())]).astype(float)
    from scipy.linalg import sqrtm

    other = np.cov(mine.T)
    expected = np.sum((mine.mean(0) - mean) ** 2) + np.trace(other + covariance - 2 * sqrtm(other @ covariance).real)
    assert result["scores"]["Frechet distance (N=14)"]["value"] == pytest.approx(expected, rel=1e-6)
    assert len(result["protocol"]["reference"]["statistics"]) == 64


def test_gpu_chunks_without_a_recorded_precision_are_not_continued(run, tmp_path, monkeypatch, capsys):
    arguments = ["evaluate", str(run), "-n", "4", "--device", "cpu", "--out", str(tmp_path)]
    main(arguments)
    assert "precision" not in json.loads((tmp_path / "identity.json").read_text())  # as in old versions: CPUs lack TF32
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(SystemExit):
        main(arguments)
    assert "precision: null" in capsys.readouterr().err
