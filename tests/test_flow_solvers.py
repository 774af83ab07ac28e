"""Solvers of path flow have the steps and the results of the classes of diffusers, without its import."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from dit_in_dit.config.run import DiffusionConfig
from dit_in_dit.config.samplers import SAMPLERS
from dit_in_dit.diffusion.flow_solvers import SOLVERS
from dit_in_dit.diffusion.schedulers import make_scheduler, set_steps, start_sampler, time_of

FLOW = DiffusionConfig()
NAMES = [name for name, rules in SAMPLERS.items() if rules.schedulers.get("flow") in SOLVERS]


def velocity(x: Tensor, t: float) -> Tensor:
    """A velocity that bends with x and t."""
    return torch.tanh(1.3 * x + t) * (1 + t) - 0.2 * x


def drive(scheduler, x: Tensor) -> Tensor:
    """The sample of a scheduler at the first of its steps."""
    for number, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x, time_of(scheduler, "flow", number)), timestep, x).prev_sample
    return x


def test_every_built_in_sampler_of_path_flow_has_a_solver():
    assert [name for name, rules in SAMPLERS.items() if "flow" in rules.schedulers] == NAMES


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.4])
@pytest.mark.parametrize("name", NAMES)
def test_a_solver_equals_the_class_of_diffusers(name, shift):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for steps in (1, 2, 3, 4, 5, 14, 15, 25):
        theirs = make_scheduler(FLOW, name, shift=shift)
        set_steps(theirs, steps)
        ours = start_sampler(FLOW, name, steps, None, shift)
        assert type(ours) in SOLVERS.values()
        assert torch.equal(ours.timesteps, theirs.timesteps)
        assert torch.equal(ours.sigmas, theirs.sigmas)
        assert torch.equal(drive(ours, x), drive(theirs, x)), f"{name}, {steps} steps"


@pytest.mark.parametrize("name", NAMES)
def test_a_solver_finds_the_only_image_there_is(name):
    image = torch.linspace(-1, 1, 64, dtype=torch.float64).reshape(1, 1, 8, 8)
    solver = start_sampler(FLOW, name, 7, None, 1.0)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for number, timestep in enumerate(solver.timesteps):
        x = solver.step((x - image) / time_of(solver, "flow", number), timestep, x).prev_sample
    torch.testing.assert_close(x, image, rtol=1e-5, atol=1e-5)


def test_drawing_does_not_import_diffusers():
    code = "import dit_in_dit as dd, sys; dd.load('emoji').sample(1, steps=1); print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
