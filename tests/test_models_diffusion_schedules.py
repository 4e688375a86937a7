"""Noise schedules against published constants and diffusers' tables."""

import pytest
import torch
from diffusers import DDPMScheduler

from models.diffusion.schedules import (
    CosineScheduleConfig,
    LinearScheduleConfig,
    NoiseSchedule,
    ScheduleConfig,
    SigmoidScheduleConfig,
    betas,
)

DIFFUSERS_NAMES = [
    (LinearScheduleConfig(), "linear"),
    (CosineScheduleConfig(), "squaredcos_cap_v2"),
    (SigmoidScheduleConfig(), "sigmoid"),
]


def test_linear_schedule_has_the_constants_of_ddpm() -> None:
    schedule = NoiseSchedule(betas(LinearScheduleConfig()))
    assert schedule.alpha_bar(499).item() == pytest.approx(0.078587243, rel=1e-7)
    assert schedule.alpha_bar(999).item() == pytest.approx(4.035829766e-5, rel=1e-8)
    assert schedule.alpha_bar(-1).item() == 1.0


@pytest.mark.parametrize(("config", "name"), DIFFUSERS_NAMES)
@pytest.mark.parametrize("steps", [50, 1000])
def test_tables_equal_diffusers(config: ScheduleConfig, name: str, steps: int) -> None:
    ours = NoiseSchedule(betas(type(config)(steps=steps)))
    theirs = DDPMScheduler(steps, beta_schedule=name)
    torch.testing.assert_close(ours.betas_T.float(), theirs.betas, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.alpha_bar(torch.arange(steps)).float(), theirs.alphas_cumprod, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("config", "name"), DIFFUSERS_NAMES)
def test_diffusing_equals_diffusers(config: ScheduleConfig, name: str) -> None:
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64)
    t_M = torch.tensor([0, 1, 300, 500, 998, 999])
    theirs = DDPMScheduler(beta_schedule=name)
    theirs.alphas_cumprod = (1 - betas(config)).cumprod(0)
    torch.testing.assert_close(
        NoiseSchedule(betas(config)).diffuse(x0, t_M, noise), theirs.add_noise(x0, noise, t_M), rtol=0, atol=1e-6
    )


def test_posterior_is_bayes_rule_for_gaussians() -> None:
    schedule = NoiseSchedule(betas(CosineScheduleConfig(steps=20)))
    x0 = torch.tensor([[0.7]], dtype=torch.float64)
    x_t = torch.tensor([[-0.4]], dtype=torch.float64)
    t = 15
    previous = 9
    before = schedule.alpha_bar(previous)
    alpha = schedule.alpha_bar(t) / before
    # p(x_prev) = N(sqrt(before) x0, 1 - before), p(x_t | x_prev) = N(sqrt(alpha) x_prev, 1 - alpha)
    precision = 1 / (1 - before) + alpha / (1 - alpha)
    mean = (before.sqrt() * x0 / (1 - before) + alpha.sqrt() * x_t / (1 - alpha)) / precision
    torch.testing.assert_close(schedule.posterior_mean(x0, x_t, t, previous), mean)
    torch.testing.assert_close(schedule.posterior_variance(t, previous), 1 / precision)


def test_result_has_the_samples_dtype() -> None:
    schedule = NoiseSchedule(betas(LinearScheduleConfig()))
    x = torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16)
    assert schedule.diffuse(x, torch.tensor([0, 5]), x).dtype == torch.bfloat16


def test_one_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule\.steps is 1"):
        betas(LinearScheduleConfig(steps=1))
