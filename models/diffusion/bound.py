"""The variational bound of a diffusion on -log p(x_0), term by term, in bits per dimension (Ho et
al. 2020, eq. 5).

M samples with values in [-1, 1] that lie on `levels` grey values; T timesteps. The bound is L_T +
sum over t of L_t. L_0 is the negative log-likelihood of the discretised decoder, and the other
terms are KL divergences.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from models.diffusion.parameterisation import Prediction
from models.diffusion.schedules import NoiseSchedule, expand
from models.losses import gaussian_kl

FixedVariance = Literal["small", "large"]
"""Variance of the reverse step if it is not learned: beta tilde (`small`) or beta (`large`) (Ho et
al. 2020, section 3.2)."""


def log_variance(
    schedule: NoiseSchedule, prediction: Prediction, fixed: FixedVariance, t: Tensor | int, previous: Tensor | int
) -> Tensor:
    """Return the log variance of p(x_previous | x_t), shaped to multiply x_t: learned if the
    prediction has a variance, else `fixed`."""
    small = expand(_small_log_variance(schedule, t, previous), prediction.x0)
    large = expand(schedule.beta(t, previous).log(), prediction.x0)
    if prediction.variance_fraction is not None:
        return prediction.variance_fraction * large + (1 - prediction.variance_fraction) * small
    return small if fixed == "small" else large


def _small_log_variance(schedule: NoiseSchedule, t: Tensor | int, previous: Tensor | int) -> Tensor:
    # beta tilde is 0 at the step to x_0; the variance of the preceding step replaces it (Nichol &
    # Dhariwal 2021, their code).
    return schedule.posterior_variance(torch.as_tensor(t).clamp_min(1), torch.as_tensor(previous).clamp_min(0)).log()


def discretised_gaussian_log_prob(x: Tensor, mean: Tensor, log_var: Tensor, levels: int = 256) -> Tensor:
    """Return log P(grey value x), elementwise, in nats: the normal density integrated over the bin
    around x, with open outermost bins (Ho et al. 2020, eq. 13)."""
    half = 1 / (levels - 1)
    inverse_std = torch.exp(-0.5 * log_var)
    upper = ((x - mean + half) * inverse_std).masked_fill(x > 1 - half, math.inf)
    lower = ((x - mean - half) * inverse_std).masked_fill(x < half - 1, -math.inf)
    # Both ends are mirrored to the side where the distribution function is small and its logarithm
    # exact.
    mirror = x > mean
    upper, lower = torch.where(mirror, -lower, upper), torch.where(mirror, -upper, lower)
    log_upper = torch.special.log_ndtr(upper)
    log_lower = torch.special.log_ndtr(lower)
    log_p: Tensor = log_upper + torch.log1p(-torch.exp(log_lower - log_upper))
    return log_p


def vlb_term(
    schedule: NoiseSchedule,
    prediction: Prediction,
    x0: Tensor,
    x_t: Tensor,
    t_M: Tensor,
    *,
    fixed: FixedVariance = "small",
    levels: int = 256,
) -> Tensor:
    """Return L_t of each sample in bits per dimension, shape (M,).

    L_t is KL(q(x_{t-1} | x_t, x_0) || p) for t > 0, and -log p(x_0 | x_0's first noising) at t = 0.
    """
    true_mean = schedule.posterior_mean(x0, x_t, t_M, t_M - 1)
    true_log_var = expand(_small_log_variance(schedule, t_M, t_M - 1), x0)
    mean = schedule.posterior_mean(prediction.x0, x_t, t_M, t_M - 1)
    log_var = log_variance(schedule, prediction, fixed, t_M, t_M - 1)
    kl_M = gaussian_kl(true_mean, true_log_var, mean, log_var).flatten(1).mean(1)
    decoder_M = -discretised_gaussian_log_prob(x0, mean, log_var, levels).flatten(1).mean(1)
    return torch.where(t_M == 0, decoder_M, kl_M) / math.log(2)


def prior_term(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    """Return L_T = KL(q(x_T | x_0) || N(0, I)) of each sample in bits per dimension, shape (M,)."""
    signal, spread = schedule.scales(schedule.steps - 1, x0)
    kl = gaussian_kl(signal * x0, 2 * spread.log(), torch.zeros_like(x0), torch.zeros_like(x0))
    return kl.flatten(1).mean(1) / math.log(2)
