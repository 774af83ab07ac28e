"""Grids with names and a scale, and films of sampling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import with_train
from dit_in_dit.cli import main
from dit_in_dit.config.samplers import SAMPLERS, Sampler
from dit_in_dit.reporting.images import NAME_PIXELS, image_grid
from dit_in_dit.runs.folder import read_config
from dit_in_dit.sampling.numbered import sample, sample_batches
from dit_in_dit.training.loop import train

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def trained(run_config, tmp_path) -> Path:
    list(train(with_train(run_config, learning_rate=0.1, steps=12, ema=0.5), tmp_path / "run", device="cpu"))
    return tmp_path / "run"


def frames(path: Path) -> list[tuple[np.ndarray, int]]:
    """Pixels and milliseconds of each frame."""
    with Image.open(path) as film:
        found = []
        for number in range(film.n_frames):
            film.seek(number)
            film.load()
            found.append((np.asarray(film.convert("RGB"), int), film.info["duration"]))
        return found


def test_names_are_written_under_the_images_and_change_no_pixel_of_them():
    plain, named = (
        np.asarray(image_grid(PIXELS, 3, scale=4, names=names)) for names in ((), ["a", "green", "", "b", "c"])
    )
    assert named.shape == (plain.shape[0] + 2 * NAME_PIXELS, *plain.shape[1:])
    for row in range(2):
        top = 2 + row * (34 + NAME_PIXELS)
        assert np.array_equal(named[top : top + 32], plain[2 + 34 * row : 34 + 34 * row])
        assert (named[top + 32 : top + 30 + NAME_PIXELS] < 128).any()
    assert (named[34 : 32 + NAME_PIXELS, 70:] == 255).all()  # the third image has no name


def test_a_long_name_is_cut_to_the_width_of_its_image():
    wide = np.asarray(image_grid(PIXELS[:2], 2, scale=4, names=["averylongnameindeed", "i"]))
    second = wide[34:, 36:]
    assert np.array_equal(second, np.asarray(image_grid(PIXELS[:2], 2, scale=4, names=["", "i"]))[34:, 36:])


def test_a_long_name_takes_a_second_line_after_its_last_separator_that_fits():
    one, two = (np.asarray(image_grid(PIXELS[:1], scale=8, names=[name])) for name in ("food-", "food-vegetable"))
    rest = np.asarray(image_grid(PIXELS[:1], scale=8, names=["vegetable"]))
    assert two.shape[0] == one.shape[0] + NAME_PIXELS
    assert np.array_equal(two[: len(one) - 2], one[:-2])
    assert np.array_equal(two[-NAME_PIXELS - 2 :], rest[-NAME_PIXELS - 2 :])


def test_scale_enlarges_every_pixel():
    sheet = np.asarray(image_grid(PIXELS[:1], scale=3))
    assert np.array_equal(sheet[2:26:3, 2:26:3], PIXELS[0])
    assert sheet.shape == (28, 28, 3)


@pytest.mark.parametrize("sampler", ["euler", "heun", "unipc", "mine"])
def test_watching_a_sampler_changes_no_bit_and_shows_every_network_call(run_config, trained, sampler, monkeypatch):
    from dataclasses import replace

    from dit_in_dit.runs.checkpoint import Checkpoint

    monkeypatch.setitem(SAMPLERS, "mine", Sampler({"flow": Once}))
    config = replace(run_config, sample=replace(run_config.sample, sampler=sampler, micro_batch=2))
    model = Checkpoint.open(trained).model(torch.device("cpu"))
    seen = []
    watched = list(sample_batches(model, config, range(3), watch=lambda t, x, image: seen.append((t, x, image))))
    assert torch.equal(torch.cat([images for _, images in watched]), sample(model, config, 3))
    assert [x.shape[0] for _, x, _ in seen] == [2] * len(seen)
    assert len(seen) == 2 * {"euler": 3, "heun": 5, "unipc": 3, "mine": 1}[sampler]
    assert seen[0][0] > 0.99
    assert all(image.isfinite().all() for _, _, image in seen)


class Once:
    """A user's scheduler with a single network call."""

    prediction = "image"

    def set_timesteps(self, steps):
        self.timesteps = torch.tensor([1000.0])

    def step(self, prediction, timestep, x):
        self.prev_sample = prediction
        return self


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_a_film_goes_from_noise_to_the_samples_and_holds_them(trained, tmp_path, kind):
    film, out = tmp_path / "films" / f"film.{kind}", tmp_path / "samples"
    words = ["sample", str(trained), "-n", "5", "--out", str(out), "--device", "cpu"]
    main(words)
    before = {path.name: path.read_bytes() for path in out.glob("0*.png")}
    grid = np.asarray(Image.open(out / "grid.png"))
    again = tmp_path / "again"  # the images are drawn again, beside a film
    main([*words[:-4], "--out", str(again), "--device", "cpu", "--film", str(film), "--scale", "2"])
    assert {path.name: path.read_bytes() for path in again.glob("0*.png")} == before
    main([*words, "--film", str(film), "--steps", "3", "--scale", "2"])
    assert {path.name: path.read_bytes() for path in out.glob("0*.png")} == before
    assert np.asarray(Image.open(out / "grid.png")).shape == (2 + 2 * (18 + NAME_PIXELS), 2 + 3 * 18, 3)
    assert grid.shape == (2 + 2 * (66 + NAME_PIXELS), 2 + 3 * 66, 3)
    found = frames(film)
    durations = [duration for _, duration in found]
    assert sum(durations) == 5 * 80 + 2500  # heun's five calls and the samples; equal frames are joined
    assert durations[-1] >= 2500
    assert 3 < len(found) <= 6
    small = np.asarray(Image.open(out / "grid.png"), int)
    high, wide = small.shape[:2]
    for left in (16, 32 + wide):  # x and its estimate become the samples, up to the format's palette or compression
        shown = [each[28 : 28 + high, left : left + wide] for each in (found[0][0], found[-1][0])]
        first, last = (np.abs((each - small).mean(-1)).mean() for each in shown)  # WebP halves the colours' resolution
        assert last < 8
        assert last < first


def test_a_film_of_many_steps_has_at_most_forty_frames_and_the_samples(trained, tmp_path):
    film = tmp_path / "film.webp"
    words = ["--n", "1", "--sampler", "euler", "--steps", "90", "--out", str(tmp_path / "s"), "--device", "cpu"]
    main(["sample", str(trained), *words, "--film", str(film)])
    assert 24 <= len(frames(film)) <= 41


def test_the_film_of_the_docs_shows_every_step_in_less_than_two_megabytes():
    root = Path(__file__).parents[1]
    path = root / "docs/film.webp"
    assert path.stat().st_size < 2e6
    found = frames(path)
    assert len(found) == read_config(root / "models/emoji").sample.steps + 1  # and the samples
    assert found[-1][1] >= 2000
    (first, _), (last, _) = found[0], found[-1]
    top, bottom = (slice(56, 400), slice(485, 829))  # of the plain and of the nested model
    noise = first[top, 34:330]
    assert np.abs(noise - first[bottom, 34:330]).mean() < 20  # one noise, up to compression
    assert np.abs(noise[:90, :96] - noise[:90, 98:194]).mean() > 60  # as those of two samples differ
    assert np.abs(last[top, 346:642] - first[top, 346:642]).mean() > 10  # the estimate becomes the sample


def test_a_film_in_another_format_is_refused_before_sampling(trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["sample", str(trained), "--film", "film.mp4", "--out", str(tmp_path / "s"), "--device", "cpu"])
    assert "--film must end in .gif or .webp: got film.mp4" in capsys.readouterr().err
    assert not list((tmp_path / "s").glob("*.png"))


def test_grids_in_training_have_names_and_a_scale(run_config, tmp_path):
    from dit_in_dit.config.files import override, to_yaml

    config = override(run_config, ["train.steps=1", "train.sample_every=1"])
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    for scale in (None, 2):
        out = tmp_path / str(scale)
        words = ["train", "--config", str(tmp_path / "run.yaml"), "--out", str(out), "--device", "cpu"]
        main([*words, *(["--scale", str(scale)] if scale else [])])
        sheet = Image.open(out / "samples/0000001.png")
        assert sheet.size == (2 + 6 * (8 * (scale or 8) + 2), 2 + 6 * (8 * (scale or 8) + 2 + NAME_PIXELS))
