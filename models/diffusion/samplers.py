"""Samplers: free functions of a denoiser that turn noise into samples.

`timesteps` is a falling sequence that ends at 0 or above; each sampler steps from one to the next,
and from the last to the data (t = -1). `noise(t)` returns the standard normal noise, of the shape
of x, that the step from timestep t adds. `watch(t, x0)` receives each step's estimate of the clean
sample, for denoising strips.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from models.diffusion.bound import FixedVariance, log_variance
from models.diffusion.parameterisation import Denoiser, Prediction
from models.diffusion.schedules import NoiseSchedule, expand

Noise = Callable[[int], Tensor]
"""Maps a timestep to the standard normal noise of its step."""

Watch = Callable[[int, Tensor], None]
"""Receives (timestep, estimate of the clean sample) at each step."""


def _unwatched(t: int, x0: Tensor) -> None:
    """Ignore the estimate."""


def timesteps(train_steps: int, steps: int, spacing: Literal["trailing", "leading"] = "trailing") -> list[int]:
    """Select `steps` of the `train_steps` timesteps, falling: `trailing` starts at the last (Lin et
    al. 2024, table 2), `leading` ends at the first.

    Raises ValueError unless 1 <= steps <= train_steps.
    """
    if not 1 <= steps <= train_steps:
        raise ValueError(
            f"{steps} sampling steps for a diffusion of {train_steps} timesteps; choose 1 to {train_steps}"
        )
    if spacing == "leading":
        return [i * (train_steps // steps) for i in reversed(range(steps))]
    return [round(train_steps - i * train_steps / steps) - 1 for i in range(steps)]


def _predict(denoiser: Denoiser, x: Tensor, t: int) -> Prediction:
    return denoiser(x, torch.full((len(x),), t, device=x.device))


def ddpm_step(
    schedule: NoiseSchedule,
    prediction: Prediction,
    x: Tensor,
    t: int,
    previous: int,
    noise: Tensor,
    variance: FixedVariance = "small",
) -> Tensor:
    """Draw x_previous from p(x_previous | x_t) (Ho et al. 2020, algorithm 2). `variance` is used if
    the prediction has none."""
    mean = schedule.posterior_mean(prediction.x0, x, t, previous)
    return (
        mean + torch.exp(0.5 * log_variance(schedule, prediction, variance, t, previous)) * noise
        if previous >= 0
        else mean
    )


@torch.no_grad()
def ddpm(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Tensor,
    timesteps: Sequence[int],
    noise: Noise,
    variance: FixedVariance = "small",
    watch: Watch = _unwatched,
) -> Tensor:
    """Sample by ancestral sampling (Ho et al. 2020, algorithm 2), over all or some of the
    timesteps."""
    for t, previous in pairwise([*timesteps, -1]):
        prediction = _predict(denoiser, x, t)
        watch(t, prediction.x0)
        x = ddpm_step(schedule, prediction, x, t, previous, noise(t) if previous >= 0 else x, variance)
    return x


def ddim_step(
    schedule: NoiseSchedule, prediction: Prediction, x: Tensor, t: int, previous: int, noise: Tensor, eta: float
) -> Tensor:
    """Compute x_previous from x_t (Song et al. 2021, eq. 12). eta = 0 is deterministic and needs no
    noise; eta = 1 is as random as DDPM."""
    std = eta * schedule.posterior_variance(t, previous).sqrt()
    direction = (1 - schedule.alpha_bar(previous) - std.square()).clamp_min(0.0).sqrt()
    x_previous = schedule.scales(previous, x)[0] * prediction.x0 + expand(direction, x) * prediction.noise
    return x_previous + expand(std, x) * noise if eta > 0 else x_previous


@torch.no_grad()
def ddim(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Tensor,
    timesteps: Sequence[int],
    noise: Noise,
    eta: float = 0.0,
    watch: Watch = _unwatched,
) -> Tensor:
    """Sample by DDIM (Song et al. 2021) with any number of steps; `noise` is called only if eta >
    0."""
    for t, previous in pairwise([*timesteps, -1]):
        prediction = _predict(denoiser, x, t)
        watch(t, prediction.x0)
        x = ddim_step(schedule, prediction, x, t, previous, noise(t) if eta > 0 else x, eta)
    return x


def _half_log_snr(schedule: NoiseSchedule, t: int) -> float:
    return math.inf if t < 0 else 0.5 * math.log(schedule.snr(t).item())


@torch.no_grad()
def dpm_solver(
    denoiser: Denoiser, schedule: NoiseSchedule, x: Tensor, timesteps: Sequence[int], watch: Watch = _unwatched
) -> Tensor:
    """Sample by DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): deterministic, second order, good
    from about 15 steps. The first and the last step are first order."""
    earlier_x0 = x
    earlier_h = math.inf
    for t, following in pairwise([*timesteps, -1]):
        x0 = _predict(denoiser, x, t).x0
        watch(t, x0)
        h = _half_log_snr(schedule, following) - _half_log_snr(schedule, t)
        multistep = math.isfinite(earlier_h) and following >= 0
        estimate = x0 + h / (2 * earlier_h) * (x0 - earlier_x0) if multistep else x0
        (signal, spread) = schedule.scales(following, x)
        (_, spread_now) = schedule.scales(t, x)
        x = spread / spread_now * x - signal * math.expm1(-h) * estimate
        earlier_x0 = x0
        earlier_h = h
    return x
