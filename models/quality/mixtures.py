"""Mixtures of Gaussians with known density, optimal denoiser and coverage, against which toy runs
and samplers are measured.

`log_density` is checked by tests, not used in training.

K components, M samples, D dimensions. Components are isotropic.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.diffusion.parameterisation import Prediction
from models.diffusion.schedules import NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class GaussianMixture:
    """The density p(x) = sum over k of weights[k] N(x; means[k], stds[k]^2 I)."""

    weights_K: Tensor
    """Weights of the components; they sum to 1."""
    means_KD: Tensor
    """Centres of the components."""
    stds_K: Tensor
    """Standard deviations of the components."""

    def log_joint(self, x_MD: Tensor) -> Tensor:
        """Return log p(x, k), shape (M, K)."""
        squares_MK = (x_MD[:, None] - self.means_KD).square().sum(-1)
        dimensions = self.means_KD.shape[1]
        log_normaliser_K = self.weights_K.log() - dimensions * (self.stds_K.log() + 0.5 * math.log(2 * math.pi))
        return log_normaliser_K - 0.5 * squares_MK / self.stds_K.square()

    def log_density(self, x_MD: Tensor) -> Tensor:
        """Return log p(x), shape (M,)."""
        return torch.logsumexp(self.log_joint(x_MD), dim=1)

    def sample(self, uniform_M: Tensor, noise_MD: Tensor) -> Tensor:
        """Make samples (M, D) from uniform numbers in [0, 1), which choose the component, and
        standard normal numbers."""
        component_M = torch.searchsorted(self.weights_K.cumsum(0), uniform_M, right=True).clamp_max(
            len(self.weights_K) - 1
        )
        return self.means_KD[component_M] + self.stds_K[component_M, None] * noise_MD

    def mean(self) -> Tensor:
        """Return E[x], shape (D,)."""
        return self.weights_K @ self.means_KD

    def covariance(self) -> Tensor:
        """Return Cov[x], shape (D, D)."""
        centred_KD = self.means_KD - self.mean()
        within = (self.weights_K * self.stds_K.square()).sum() * torch.eye(self.means_KD.shape[1]).to(self.means_KD)
        return within + (self.weights_K[:, None] * centred_KD).T @ centred_KD

    def diffused(self, signal: Tensor, spread: Tensor) -> "GaussianMixture":
        """Return the mixture of signal * x + spread * noise."""
        stds_K = (signal.square() * self.stds_K.square() + spread.square()).sqrt()
        return GaussianMixture(weights_K=self.weights_K, means_KD=signal * self.means_KD, stds_K=stds_K)

    def denoise(self, x_MD: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        """Return E[x_0 | signal * x_0 + spread * noise = x], shape (M, D): the prediction of the
        best possible network."""
        diffused = self.diffused(signal, spread)
        responsibility_MK = torch.softmax(diffused.log_joint(x_MD), dim=1)
        gain_K1 = (signal * self.stds_K.square() / diffused.stds_K.square())[:, None]
        posterior_MKD = self.means_KD + gain_K1 * (x_MD[:, None] - signal * self.means_KD)
        return (responsibility_MK[..., None] * posterior_MKD).sum(1)

    def denoiser(self, schedule: NoiseSchedule, x_t: Tensor, t_M: Tensor) -> Prediction:
        """Act as the optimal `Denoiser` of a diffusion, once `schedule` is bound; all samples share
        one timestep."""
        t = int(t_M[0])
        assert bool((t_M == t).all()), "the closed form takes one timestep at a time"
        signal, spread = (scale.reshape(()) for scale in schedule.scales(t, x_t))
        x0 = self.denoise(x_t, signal, spread)
        return Prediction(x0, (x_t - signal * x0) / spread)


def grid(side: int = 5, spacing: float = 2.0, std: float = 0.05) -> GaussianMixture:
    """Build a square grid around the origin; the defaults are PacGAN's 25 Gaussians (Lin et al.
    2018, section 4.1)."""
    axis = spacing * (torch.arange(side) - (side - 1) / 2)
    means = torch.cartesian_prod(axis, axis)
    return GaussianMixture(
        weights_K=torch.full((side**2,), 1 / side**2), means_KD=means, stds_K=torch.full((side**2,), std)
    )


def ring(modes: int = 8, radius: float = 1.0, std: float = 0.01) -> GaussianMixture:
    """Build a ring of evenly spaced modes; the defaults are PacGAN's 2D-ring."""
    angles = 2 * math.pi * torch.arange(modes) / modes
    means = radius * torch.stack([angles.cos(), angles.sin()], dim=1)
    return GaussianMixture(weights_K=torch.full((modes,), 1 / modes), means_KD=means, stds_K=torch.full((modes,), std))


@dataclass(frozen=True, kw_only=True)
class ModeCoverage:
    """Number of samples at each mode. `+` merges the counts of several batches or ranks."""

    nearest_K: Tensor
    """Number of samples nearest to each mode, int64."""
    high_quality_K: Tensor
    """Number of these samples within 3 standard deviations of the mode, int64."""

    @staticmethod
    def of(x_MD: Tensor, mixture: GaussianMixture) -> "ModeCoverage":
        """Count one batch of samples (Lin et al. 2018, section 4.1; their protocol has 2,500
        samples)."""
        distances_MK = torch.cdist(x_MD.double().cpu(), mixture.means_KD.double().cpu())
        nearest_M = distances_MK.argmin(1)
        within_M = distances_MK.gather(1, nearest_M[:, None]).squeeze(1) <= 3 * mixture.stds_K.double().cpu()[nearest_M]
        modes = len(mixture.weights_K)
        return ModeCoverage(
            nearest_K=torch.bincount(nearest_M, minlength=modes),
            high_quality_K=torch.bincount(nearest_M[within_M], minlength=modes),
        )

    def __add__(self, other: "ModeCoverage") -> "ModeCoverage":
        return ModeCoverage(
            nearest_K=self.nearest_K + other.nearest_K, high_quality_K=self.high_quality_K + other.high_quality_K
        )

    def modes(self) -> int:
        """Return the number of modes with at least one high-quality sample."""
        return int((self.high_quality_K > 0).sum())

    def high_quality(self) -> float:
        """Return the share of high-quality samples."""
        return (self.high_quality_K.sum() / self.nearest_K.sum()).item()

    def reverse_kl(self, mixture: GaussianMixture) -> float:
        """Return KL(share of the samples at each mode || its weight) in nats."""
        share_K = self.nearest_K.double() / self.nearest_K.sum()
        kl: float = torch.special.xlogy(share_K, share_K / mixture.weights_K.double()).sum().item()
        return kl


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """Mean results of a perfect sampler in `ModeCoverage`, for well-separated modes."""

    modes: float
    """Number of modes found."""
    high_quality: float
    """Share of high-quality samples."""
    reverse_kl: float
    """Reverse KL in nats; above 0, because counts vary."""


def perfect_sampler(mixture: GaussianMixture, samples: int) -> Ceiling:
    """Return the ceilings for `samples` samples; the reverse KL to second order, (K - 1) / (2
    samples)."""
    modes, dimensions = mixture.means_KD.shape
    # |noise|^2 has a chi-square distribution, whose distribution function is an incomplete gamma
    # function.
    within = torch.special.gammainc(
        torch.tensor(dimensions / 2, dtype=torch.float64), torch.tensor(4.5, dtype=torch.float64)
    ).item()
    covered_K = 1 - (1 - within * mixture.weights_K.double()) ** samples
    return Ceiling(modes=covered_K.sum().item(), high_quality=within, reverse_kl=(modes - 1) / (2 * samples))
