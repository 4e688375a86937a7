"""The evidence lower bound (ELBO) of a VAE with posterior N(mean, exp(log_var)) and prior N(0, I),
and its diagnostics.

M samples, L latent dimensions, K importance samples. Values are per sample, in nats.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.losses import standard_gaussian_kl


def reparameterise(mean_ML: Tensor, log_var_ML: Tensor, noise_ML: Tensor) -> Tensor:
    """Return z = mean + std * noise (Kingma & Welling 2014, section 2.4), broadcasting over leading
    dimensions of the noise."""
    return mean_ML + torch.exp(0.5 * log_var_ML) * noise_ML


def log_normal(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Return log N(z; mean, exp(log_var)) in nats, summed over the last dimension."""
    return -0.5 * ((z - mean).square() * torch.exp(-log_var) + log_var + math.log(2 * math.pi)).sum(-1)


def free_bits(kl_ML: Tensor, nats: float, group: int = 1) -> Tensor:
    """Return the KL term of each sample with `nats` free in every latent dimension, shape (M,)
    (Kingma et al. 2016, eq. 15).

    The paper's minibatch mean is taken over each `group` of consecutive samples, so that the split
    into micro-batches does not matter. Raises ValueError if M is not a multiple of `group`.
    """
    if kl_ML.shape[0] % group:
        raise ValueError(
            f"a batch of {kl_ML.shape[0]} samples does not divide into free-bits groups of {group}; "
            "make the micro-batch a multiple of the group"
        )
    mean_GL = kl_ML.unflatten(0, (-1, group)).mean(1)
    kl_M: Tensor = mean_GL.clamp_min(nats).sum(-1).repeat_interleave(group)
    return kl_M


def kl_weight(step: int, beta: float, warm_up_steps: int) -> float:
    """Return beta times the linear KL warm-up (Bowman et al. 2016; Soenderby et al. 2016): 0 at
    step 0, beta from `warm_up_steps` on."""
    return beta * min(1.0, step / warm_up_steps) if warm_up_steps else beta


def importance_bound(log_weights_KM: Tensor) -> Tensor:
    """Return IWAE-K, shape (M,): log of the mean weight p(x, z) / q(z | x) (Burda et al. 2016, eq.
    8). K = 1 is a one-sample ELBO."""
    return torch.logsumexp(log_weights_KM, dim=0) - math.log(log_weights_KM.shape[0])


def bits_per_dimension(log_p_M: Tensor, dimensions: int, bin_width: float = 1.0) -> Tensor:
    """Return -log_p in bits per dimension, shape (M,). For a density, `bin_width` (1 / 255 for
    bytes scaled to [0, 1]) makes it comparable with a probability."""
    return -(log_p_M / dimensions + math.log(bin_width)) / math.log(2)


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """Sums over samples that show which latent dimensions are used. `+` merges them in any order,
    also across ranks."""

    count: Tensor
    """Number of samples, a float64 scalar."""
    kl_L: Tensor
    """Sum of the KL of each dimension, in nats."""
    mean_L: Tensor
    """Sum of the posterior means."""
    square_L: Tensor
    """Sum of the squared posterior means."""

    @staticmethod
    def of(mean_ML: Tensor, log_var_ML: Tensor) -> "LatentStatistics":
        """Compute the statistics of one batch of posteriors."""
        mean = mean_ML.detach().double()
        kl = standard_gaussian_kl(mean_ML, log_var_ML).detach().double()
        return LatentStatistics(
            count=mean.new_tensor(len(mean)), kl_L=kl.sum(0), mean_L=mean.sum(0), square_L=mean.square().sum(0)
        )

    def __add__(self, other: "LatentStatistics") -> "LatentStatistics":
        return LatentStatistics(
            count=self.count + other.count,
            kl_L=self.kl_L + other.kl_L,
            mean_L=self.mean_L + other.mean_L,
            square_L=self.square_L + other.square_L,
        )

    def kl(self) -> Tensor:
        """Return the mean KL of each dimension in nats, shape (L,)."""
        return self.kl_L / self.count

    def activity(self) -> Tensor:
        """Return the variance of the posterior mean over the data, shape (L,) (Burda et al. 2016,
        section 5.2). A dimension is active above 0.01."""
        return self.square_L / self.count - (self.mean_L / self.count).square()
