"""Samplers: each step against diffusers', and whole chains on a mixture whose optimal denoiser is
known."""

from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from models.diffusion.parameterisation import Denoiser, Prediction, Target, clipped, denoiser, guided, predict
from models.diffusion.samplers import ddim, ddim_step, ddpm, ddpm_step, dpm_solver, timesteps
from models.diffusion.schedules import (
    CosineScheduleConfig,
    LinearScheduleConfig,
    NoiseSchedule,
    ScheduleConfig,
    SigmoidScheduleConfig,
    betas,
)
from models.quality.mixtures import GaussianMixture, ModeCoverage

CONFIGS: list[ScheduleConfig] = [LinearScheduleConfig(), CosineScheduleConfig(), SigmoidScheduleConfig()]
PREDICTIONS: list[tuple[Target, str]] = [("noise", "epsilon"), ("x0", "sample"), ("v", "v_prediction")]

MIXTURE = GaussianMixture(
    weights_K=torch.tensor([0.5, 0.3, 0.2]),
    means_KD=torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.5, -1.5]]),
    stds_K=torch.tensor([0.15, 0.1, 0.2]),
)


def exact(scheduler: DDPMScheduler | DDIMScheduler | DPMSolverMultistepScheduler, config: ScheduleConfig) -> None:
    """Give a scheduler of diffusers tables in float64, so that formulas are compared and not the
    rounding of float32 tables."""
    scheduler.betas = betas(config)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("kind", "their_kind"), PREDICTIONS)
@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_ddpm_step_equals_diffusers(config: ScheduleConfig, kind: Target, their_kind: str, variance: str) -> None:
    their_variance = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}[variance]
    theirs = DDPMScheduler(
        prediction_type=their_kind, variance_type=their_variance, clip_sample=True, timestep_spacing="leading"
    )
    exact(theirs, config)
    theirs.set_timesteps(100)
    schedule = NoiseSchedule(betas(config))
    ladder = timesteps(1000, 100, "leading")
    assert theirs.timesteps.tolist() == ladder
    for place in (0, 40, 98, 99):
        t = ladder[place]
        previous = [*ladder, -1][place + 1]
        torch.manual_seed(place)
        output = torch.randn(2, 6 if variance == "learned" else 3, 4, 4, dtype=torch.float64)
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
        generator = torch.Generator().manual_seed(place)
        expected = theirs.step(output, t, x, generator=generator).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(place), dtype=torch.float64)
        denoise = clipped(lambda x, t_M, output=output: predict(kind, schedule, output, x, t_M), schedule)
        fixed = "large" if variance == "large" else "small"
        actual = ddpm_step(schedule, denoise(x, torch.full((2,), t)), x, t, previous, noise, fixed)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("kind", "their_kind"), PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_equals_diffusers(config: ScheduleConfig, kind: Target, their_kind: str, eta: float) -> None:
    theirs = DDIMScheduler(prediction_type=their_kind, clip_sample=False)
    exact(theirs, config)
    theirs.set_timesteps(50)
    schedule = NoiseSchedule(betas(config))
    ladder = timesteps(1000, 50, "leading")
    assert theirs.timesteps.tolist() == ladder
    for place in (0, 20, 49):
        t = ladder[place]
        previous = [*ladder, -1][place + 1]
        torch.manual_seed(place)
        output, x, noise = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
        expected = theirs.step(output, t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        actual = ddim_step(schedule, predict(kind, schedule, output, x, t), x, t, previous, noise, eta)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("kind", "their_kind"), PREDICTIONS)
def test_dpm_solver_equals_diffusers(config: ScheduleConfig, kind: Target, their_kind: str) -> None:
    theirs = DPMSolverMultistepScheduler(prediction_type=their_kind, timestep_spacing="trailing")
    exact(theirs, config)
    theirs.set_timesteps(20)
    alpha_bars = theirs.alphas_cumprod[theirs.timesteps]
    theirs.sigmas = torch.cat([((1 - alpha_bars) / alpha_bars).sqrt(), torch.zeros(1)])
    schedule = NoiseSchedule(betas(config))
    assert theirs.timesteps.tolist() == timesteps(1000, 20)

    def network(x: Tensor, t_M: Tensor) -> Tensor:
        return torch.tanh(0.5 * x + t_M.view(-1, 1) / 1000)

    torch.manual_seed(0)
    x = start = torch.randn(5, 3, dtype=torch.float64)
    for t in theirs.timesteps:
        x = theirs.step(network(x, t.repeat(5)), t, x).prev_sample
    actual = dpm_solver(denoiser(network, kind, schedule), schedule, start, timesteps(1000, 20))
    torch.testing.assert_close(actual, x, rtol=1e-6, atol=1e-6)


def _draw(method: str, denoise: Denoiser, schedule: NoiseSchedule, samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(samples, 2, generator=generator)

    def noise(t: int) -> Tensor:
        return torch.randn(samples, 2, generator=generator)

    match method:
        case "ddpm":
            return ddpm(denoise, schedule, start, timesteps(1000, 1000), noise)
        case "ddpm, 250 steps":
            return ddpm(denoise, schedule, start, timesteps(1000, 250), noise)
        case "ddim":
            return ddim(denoise, schedule, start, timesteps(1000, 200), noise)
        case "ddim, eta 1":
            return ddim(denoise, schedule, start, timesteps(1000, 250), noise, eta=1.0)
        case _:
            return dpm_solver(denoise, schedule, start, timesteps(1000, 100))


@pytest.mark.parametrize("method", ["ddpm", "ddpm, 250 steps", "ddim", "ddim, eta 1", "dpm_solver"])
def test_sampler_with_the_optimal_denoiser_reproduces_a_mixture(method: str) -> None:
    schedule = NoiseSchedule(betas(CosineScheduleConfig()))
    samples = 4000
    x = _draw(method, partial(MIXTURE.denoiser, schedule), schedule, samples)
    share_K = ModeCoverage.of(x, MIXTURE).nearest_K / samples
    error_K = (MIXTURE.weights_K * (1 - MIXTURE.weights_K) / samples).sqrt()
    assert ((share_K - MIXTURE.weights_K).abs() < 4 * error_K).all(), share_K
    covariance = MIXTURE.covariance()
    assert ((x.mean(0) - MIXTURE.mean()).abs() < 4 * (covariance.diag() / samples).sqrt()).all()
    torch.testing.assert_close(x.T.cov(), covariance, rtol=0.06, atol=0.02)
    nearest = torch.cdist(x, MIXTURE.means_KD).argmin(1)
    for k, std in enumerate(MIXTURE.stds_K.tolist()):
        assert x[nearest == k].std(0).mean().item() == pytest.approx(std, rel=0.08)


def test_guidance_is_linear_in_the_noise_and_scale_one_is_plain_conditioning() -> None:
    schedule = NoiseSchedule(betas(LinearScheduleConfig()))

    def network(x: Tensor, t_M: Tensor, labels_M: Tensor) -> Prediction:
        return predict("noise", schedule, x * (1 + labels_M.view(-1, 1)), x, t_M)

    torch.manual_seed(0)
    x = torch.randn(3, 2, dtype=torch.float64)
    labels_M = torch.tensor([0, 1, 2])
    t_M = torch.full((3,), 400)
    conditional = network(x, t_M, labels_M)
    null = network(x, t_M, torch.full((3,), 9))
    strong = guided(network, labels_M, 9, 3.0)(x, t_M)
    torch.testing.assert_close(strong.noise, null.noise + 3 * (conditional.noise - null.noise))
    torch.testing.assert_close(strong.x0, predict("noise", schedule, strong.noise, x, t_M).x0)
    torch.testing.assert_close(guided(network, labels_M, 9, 1.0)(x, t_M).noise, conditional.noise)


def test_clipping_keeps_noise_and_x0_consistent() -> None:
    schedule = NoiseSchedule(betas(LinearScheduleConfig()))
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)[:, None]
    t_M = torch.full((9,), 300)
    prediction = clipped(denoiser(lambda x, t_M: torch.zeros_like(x), "noise", schedule), schedule)(x, t_M)
    assert prediction.x0.abs().max() == 1
    torch.testing.assert_close(schedule.diffuse(prediction.x0, t_M, prediction.noise), x)


def test_watch_sees_every_step() -> None:
    schedule = NoiseSchedule(betas(CosineScheduleConfig()))
    seen: list[int] = []
    dpm_solver(
        partial(MIXTURE.denoiser, schedule),
        schedule,
        torch.zeros(1, 2),
        timesteps(1000, 7),
        watch=lambda t, x0: seen.append(t),
    )
    assert seen == timesteps(1000, 7)


def test_timesteps_fall_from_the_last_or_to_the_first() -> None:
    assert timesteps(10, 4) == [9, 7, 4, 1]
    assert timesteps(10, 4, "leading") == [6, 4, 2, 0]
    assert timesteps(5, 5) == [4, 3, 2, 1, 0]
    with pytest.raises(ValueError, match="11 sampling steps for a diffusion of 10"):
        timesteps(10, 11)
