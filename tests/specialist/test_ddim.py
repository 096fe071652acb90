"""The tabulated DDIM is Diffusers'."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from robodual.specialist import ddim


@pytest.fixture(scope="module")
def scheduler() -> DDIMScheduler:
    return DDIMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", prediction_type="epsilon")


@pytest.mark.parametrize("steps", [1, 5, 7, 10, 33, 64, 100])
def test_every_step_is_diffusers(scheduler: DDIMScheduler, steps: int) -> None:
    scheduler.set_timesteps(steps)
    table = ddim.schedule(steps)
    assert [step.timestep for step in table] == scheduler.timesteps.tolist()
    generator = torch.Generator().manual_seed(steps)
    x = torch.randn(2, 8, 7, generator=generator)
    for step in table:
        eps = torch.randn(x.shape, generator=generator)
        expected = scheduler.step(eps, step.timestep, x).prev_sample
        torch.testing.assert_close(step.apply(x, eps), expected, atol=2e-6, rtol=2e-5)
        x = expected


def test_forward_process_is_diffusers(scheduler: DDIMScheduler) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 100, 8, 7, generator=generator)
    timesteps = torch.arange(100)
    torch.testing.assert_close(ddim.add_noise(x0, noise, timesteps), scheduler.add_noise(x0, noise, timesteps))
