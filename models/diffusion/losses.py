"""Losses of a diffusion network: L_simple, min-SNR weighting, and the hybrid loss that also learns
the variance.

The objective is trainer/objectives/diffusion.py. M samples with values in [-1, 1]; T timesteps.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from models import losses
from models.diffusion.bound import FixedVariance, vlb_term
from models.diffusion.parameterisation import Prediction, Target, predict, split_variance, target
from models.diffusion.schedules import LinearScheduleConfig, NoiseSchedule, ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class SimpleLossConfig:
    """The unweighted mean squared error of the prediction (Ho et al. 2020, eq. 14)."""

    name: Literal["simple"] = "simple"
    """Selects this loss."""
    variance: FixedVariance = "small"
    """Variance of the reverse steps: beta tilde (small) or beta (large)."""


@dataclass(frozen=True, kw_only=True)
class MinSNRLossConfig:
    """The squared error of x0 weighted by min(SNR, gamma), whichever quantity is predicted (Hang et
    al. 2023, eq. 8)."""

    name: Literal["min_snr"] = "min_snr"
    """Selects this loss."""
    gamma: float = 5.0
    """Upper bound of the weight of a timestep."""
    variance: FixedVariance = "small"
    """Variance of the reverse steps: beta tilde (small) or beta (large)."""


@dataclass(frozen=True, kw_only=True)
class HybridLossConfig:
    """L_simple plus a small share of the variational bound, which trains the variance alone (Nichol
    & Dhariwal 2021, eq. 16). It doubles the network's output channels."""

    name: Literal["hybrid"] = "hybrid"
    """Selects this loss."""
    vlb_weight: float = 0.001
    """Weight of the bound, in bits per dimension."""


LossConfig = SimpleLossConfig | MinSNRLossConfig | HybridLossConfig


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The noise schedule, the prediction target and the loss of a diffusion."""

    schedule: ScheduleConfig = field(default_factory=LinearScheduleConfig)
    """Noise schedule."""
    prediction: Target = "noise"
    """Quantity that the network predicts."""
    loss: LossConfig = field(default_factory=SimpleLossConfig)
    """Loss that training minimises."""
    levels: int = 256
    """Number of grey values in the data, for the variational bound."""

    @property
    def output_multiple(self) -> int:
        """Output channels of the network per channel of the data: 2 if the variance is learned,
        else 1."""
        return 2 if isinstance(self.loss, HybridLossConfig) else 1

    @property
    def fixed_variance(self) -> FixedVariance:
        """Variance of the reverse steps where it is not learned."""
        return "small" if isinstance(self.loss, HybridLossConfig) else self.loss.variance


def snr_weight(kind: Target, snr_M: Tensor, gamma: float) -> Tensor:
    """Return the weight (M,) of the predicted quantity's squared error for which the error of x0
    has weight min(SNR, gamma) (Hang et al. 2023, section 3.4)."""
    weight_M = snr_M.clamp_max(gamma)
    match kind:
        case "x0":
            return weight_M
        case "noise":
            return weight_M / snr_M
        case "v":
            return weight_M / (snr_M + 1)


def diffusion_loss(
    config: DiffusionConfig, schedule: NoiseSchedule, output: Tensor, x0: Tensor, t_M: Tensor, noise: Tensor
) -> Tensor:
    """Return the loss of each sample, averaged over its dimensions, shape (M,). `output` is the
    network's output at x_t = schedule.diffuse(x0, t_M, noise)."""
    mean_output, fraction = split_variance(output, x0)
    error_M = squared_error(config.prediction, schedule, mean_output, x0, t_M, noise)
    match config.loss:
        case SimpleLossConfig():
            return error_M
        case MinSNRLossConfig(gamma=gamma):
            return error_M * snr_weight(config.prediction, schedule.snr(t_M), gamma).to(error_M)
        case HybridLossConfig(vlb_weight=vlb_weight):
            assert fraction is not None, "the hybrid loss needs a network with twice the channels"
            x_t = schedule.diffuse(x0, t_M, noise)
            # The bound must not train the mean, which L_simple trains with less variance.
            mean = predict(config.prediction, schedule, mean_output.detach(), x_t, t_M)
            bits_M = vlb_term(schedule, Prediction(mean.x0, mean.noise, fraction), x0, x_t, t_M, levels=config.levels)
            return error_M + vlb_weight * schedule.steps * bits_M


def squared_error(
    kind: Target, schedule: NoiseSchedule, mean_output: Tensor, x0: Tensor, t_M: Tensor, noise: Tensor
) -> Tensor:
    """Return L_simple of each sample, shape (M,): the squared error of the predicted quantity,
    averaged over dimensions."""
    return losses.squared_error(mean_output, target(kind, schedule, x0, t_M, noise))


def loss_by_timestep(loss_M: Tensor, t_M: Tensor, steps: int, buckets: int) -> Tensor:
    """Return sums and counts of `loss_M` in equal ranges of timesteps, float64, shape (2, buckets).
    Add them over batches and ranks, then divide."""
    bucket_M = t_M * buckets // steps
    sums = torch.zeros(2, buckets, dtype=torch.float64, device=loss_M.device)
    sums[0].index_add_(0, bucket_M, loss_M.detach().double())
    sums[1].index_add_(0, bucket_M, torch.ones_like(loss_M, dtype=torch.float64))
    return sums
