"""Samples are numbered: image i depends on (seed, i), not on its batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import perturbed
from dit_in_dit import sample
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.sampling import grid, sample_batches, to_pixels, trajectory


@pytest.fixture
def model(run_config) -> NestedDiT:
    return perturbed(NestedDiT(run_config.model))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++", "unipc"])
def test_a_sample_does_not_depend_on_its_batch(run_config, model, sampler):
    config = replace(run_config, sample=replace(run_config.sample, sampler=sampler, steps=6))
    alone, together = (to_pixels(sample(model, config, 33, batch_size=size)).astype(int) for size in (1, 32))
    assert np.abs(alone - together).max() <= 1


def test_samples_can_be_drawn_by_number(run_config, model):
    whole = sample(model, run_config, 6)
    (indices, images), *_ = sample_batches(model, run_config, [5, 2])
    assert list(indices) == [5, 2]
    torch.testing.assert_close(images, whole[[5, 2]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++", "unipc"])
def test_trajectories_drawn_in_turns_are_those_drawn_alone(run_config, sampler):
    how = replace(run_config.sample, sampler=sampler, steps=5)
    noises = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def start(noise: torch.Tensor) -> Iterator[tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]]:
        return trajectory(lambda x, t, y: x.tanh(), run_config.diffusion, how, noise, None)

    alone = [list(start(noise)) for noise in noises]
    in_turns = list(zip(*(start(noise) for noise in noises), strict=True))
    for calls, number in itertools.product(in_turns, (0, 1)):
        t, *tensors = calls[number]
        expected, *wanted = alone[number].pop(0)
        assert t == expected
        assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True))


def test_seed_and_class_matter(run_config, model):
    first = sample(model, run_config, 3)
    assert not torch.allclose(first, sample(model, run_config, 3, seed=1), atol=1e-3)
    other = sample(model, run_config, 3, classes=[2])
    assert torch.allclose(first[2], other[2], atol=1e-4)  # sample 2 is of class 2 either way
    assert not torch.allclose(first[0], other[0], atol=1e-3)


def test_grids_keep_every_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    sheet = np.asarray(grid(pixels, columns=3))
    assert sheet.shape == (2 * 66 + 2, 3 * 66 + 2, 3)
    assert np.array_equal(sheet[68:132:2, 2:66:2], pixels[3])
    assert grid(pixels[..., :1]).size[0] > 0


def test_pixels_cover_the_range():
    values = torch.tensor([-2.0, -1, 0, 1, 2]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_pixels(values)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
