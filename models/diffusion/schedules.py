"""Noise schedules of a diffusion: q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I) (Ho
et al. 2020, eq. 4).

T training timesteps t = 0 ... T - 1, counted as in diffusers (Ho et al. count from 1); t = -1
stands for the clean sample, alpha_bar = 1. M samples of any shape. Tables are float64, results have
the dtype of the sample. `t` is an integer or an int64 tensor (M,).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LinearScheduleConfig:
    """beta rises linearly (Ho et al. 2020, section 4)."""

    name: Literal["linear"] = "linear"
    """Selects this schedule."""
    steps: int = 1000
    """Number T of training timesteps."""
    beta_start: float = 1e-4
    """beta of the first timestep."""
    beta_end: float = 0.02
    """beta of the last timestep. With fewer than 1000 steps raise it in proportion, so that
    alpha_bar still ends near 0."""


@dataclass(frozen=True, kw_only=True)
class CosineScheduleConfig:
    """alpha_bar falls as a squared cosine (Nichol & Dhariwal 2021, eq. 17); diffusers calls it
    `squaredcos_cap_v2`."""

    name: Literal["cosine"] = "cosine"
    """Selects this schedule."""
    steps: int = 1000
    """Number T of training timesteps."""
    offset: float = 0.008
    """Keeps beta from vanishing at the first timesteps."""
    largest_beta: float = 0.999
    """Keeps beta from reaching 1 at the last timesteps."""


@dataclass(frozen=True, kw_only=True)
class SigmoidScheduleConfig:
    """beta rises as a sigmoid from -6 to 6 (Xu et al. 2022, GeoDiff), as in diffusers."""

    name: Literal["sigmoid"] = "sigmoid"
    """Selects this schedule."""
    steps: int = 1000
    """Number T of training timesteps."""
    beta_start: float = 1e-4
    """beta before the rise."""
    beta_end: float = 0.02
    """beta after the rise."""


ScheduleConfig = LinearScheduleConfig | CosineScheduleConfig | SigmoidScheduleConfig


def betas(config: ScheduleConfig) -> Tensor:
    """Return beta_t of every timestep, float64, shape (T,). Raises ValueError for fewer than 2
    timesteps."""
    if config.steps < 2:
        raise ValueError(
            f"schedule.steps is {config.steps}, but a diffusion has at least 2 timesteps; use 1000, for example"
        )
    match config:
        case LinearScheduleConfig():
            return torch.linspace(config.beta_start, config.beta_end, config.steps, dtype=torch.float64)
        case CosineScheduleConfig():
            time = torch.arange(config.steps + 1, dtype=torch.float64) / config.steps
            alpha_bar = torch.cos((time + config.offset) / (1 + config.offset) * math.pi / 2).square()
            return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp_max(config.largest_beta)
        case SigmoidScheduleConfig():
            rise = torch.linspace(-6, 6, config.steps, dtype=torch.float64).sigmoid()
            return config.beta_start + (config.beta_end - config.beta_start) * rise


class NoiseSchedule:
    """Constants of a diffusion at each timestep."""

    def __init__(self, betas_T: Tensor) -> None:
        self.betas_T = betas_T.double()
        alpha_bars_T = torch.cumprod(1 - self.betas_T, dim=0)
        self._alpha_bars = torch.cat([alpha_bars_T.new_ones(1), alpha_bars_T])

    @property
    def steps(self) -> int:
        """Number T of timesteps."""
        return len(self.betas_T)

    def to(self, device: torch.device) -> "NoiseSchedule":
        """Return the same schedule with its tables on `device`, which must have float64; on a
        device without it (MPS) leave the tables on the CPU."""
        return NoiseSchedule(self.betas_T.to(device))

    def alpha_bar(self, t: Tensor | int) -> Tensor:
        """Return alpha_bar at `t`, float64, of the shape of `t`; 1 at t = -1."""
        return self._alpha_bars[torch.as_tensor(t, device=self._alpha_bars.device) + 1]

    def scales(self, t: Tensor | int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(alpha_bar) and sqrt(1 - alpha_bar), shaped to multiply `x`."""
        alpha_bar = self.alpha_bar(t)
        return expand(alpha_bar.sqrt(), x), expand((1 - alpha_bar).sqrt(), x)

    def diffuse(self, x0: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """Return x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (Ho et al. 2020, eq. 4)."""
        signal, spread = self.scales(t, x0)
        return signal * x0 + spread * noise

    def snr(self, t: Tensor | int) -> Tensor:
        """Return the signal-to-noise ratio alpha_bar / (1 - alpha_bar), float64, of the shape of
        `t`."""
        alpha_bar = self.alpha_bar(t)
        return alpha_bar / (1 - alpha_bar)

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor | int, previous: Tensor | int) -> Tensor:
        """Return the mean of q(x_previous | x_t, x_0) (Ho et al. 2020, eq. 7), for any earlier
        timestep `previous`."""
        now = self.alpha_bar(t)
        before = self.alpha_bar(previous)
        alpha = now / before
        from_x0 = before.sqrt() * (1 - alpha) / (1 - now)
        from_x_t = alpha.sqrt() * (1 - before) / (1 - now)
        return expand(from_x0, x0) * x0 + expand(from_x_t, x0) * x_t

    def beta(self, t: Tensor | int, previous: Tensor | int) -> Tensor:
        """Return 1 - alpha of the step from `previous` to `t`: the variance of q(x_t | x_previous),
        float64."""
        return 1 - self.alpha_bar(t) / self.alpha_bar(previous)

    def posterior_variance(self, t: Tensor | int, previous: Tensor | int) -> Tensor:
        """Return beta tilde, the variance of q(x_previous | x_t, x_0) (Ho et al. 2020, eq. 7),
        float64; 0 at previous = -1."""
        return self.beta(t, previous) * (1 - self.alpha_bar(previous)) / (1 - self.alpha_bar(t))


def expand(values: Tensor, x: Tensor) -> Tensor:
    """Return `values` of shape () or (M,) in the dtype and on the device of `x`, shaped to multiply
    it."""
    return values.to(x).reshape(-1, *[1] * (x.ndim - 1))
