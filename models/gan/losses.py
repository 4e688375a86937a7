"""The losses of a GAN, its gradient penalties, and measures of its game.

The objective is trainer/objectives/gan.py. M logits, one per sample or pack of samples; D(x) =
sigmoid(logit). All values are per logit, shape (M,), and minimised.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

GanLoss = Literal["minimax", "non_saturating", "least_squares", "wasserstein", "hinge", "relativistic"]


@dataclass(frozen=True, kw_only=True)
class PenaltyConfig:
    """Gradient penalties on the discriminator; a penalty is off at weight 0."""

    r1: float = 0.0
    """Weight gamma of R1, on real samples (Mescheder et al. 2018, eq. 9)."""
    r2: float = 0.0
    """Weight gamma of R2, on generated samples (Mescheder et al. 2018, eq. 10)."""
    gradient_penalty: float = 0.0
    """Weight lambda of the two-sided penalty between real and generated samples (Gulrajani et al.
    2017, eq. 3); 10 is usual with `wasserstein`."""
    every: int = 1
    """Number of discriminator steps per evaluation of the penalties, which are multiplied by it
    (Karras et al. 2020, appendix B)."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"penalty.every is {self.every}; choose 1 or more discriminator steps")


def discriminator_loss(kind: GanLoss, real_M: Tensor, fake_M: Tensor) -> Tensor:
    """Return the discriminator's loss (M,), given its logits of real and of generated samples."""
    match kind:
        case "minimax" | "non_saturating":
            # -log D(x) - log(1 - D(G(z))), Goodfellow et al. 2014, eq. 1
            return F.softplus(-real_M) + F.softplus(fake_M)
        case "least_squares":
            # Mao et al. 2017, eq. 9: targets 1 and 0
            return 0.5 * (real_M - 1).square() + 0.5 * fake_M.square()
        case "wasserstein":
            # Arjovsky et al. 2017, eq. 2
            return fake_M - real_M
        case "hinge":
            # Miyato et al. 2018, eq. 16
            return F.relu(1 - real_M) + F.relu(1 + fake_M)
        case "relativistic":
            # Jolicoeur-Martineau 2019, section 4.1 (RpGAN); Huang et al. 2024, eq. 2
            return F.softplus(fake_M - real_M)


def generator_loss(kind: GanLoss, fake_M: Tensor, real_M: Tensor) -> Tensor:
    """Return the generator's loss (M,); only `relativistic` uses the logits of real samples."""
    match kind:
        case "minimax":
            # log(1 - D(G(z))): its gradient vanishes where the discriminator is sure
            return -F.softplus(fake_M)
        case "non_saturating":
            return F.softplus(-fake_M)
        case "least_squares":
            return 0.5 * (fake_M - 1).square()
        case "wasserstein" | "hinge":
            return -fake_M
        case "relativistic":
            return F.softplus(real_M - fake_M)


def value(real_M: Tensor, fake_M: Tensor) -> Tensor:
    """Return V(D, G) = log D(x) + log(1 - D(G(z))) of each pair, shape (M,) (Goodfellow et al.
    2014, eq. 1)."""
    return -F.softplus(-real_M) - F.softplus(fake_M)


def jensen_shannon_estimate(mean_value: float) -> float:
    """Return (V + log 4) / 2 in nats, a lower bound of the Jensen-Shannon divergence, which is at
    most log 2 (Goodfellow et al. 2014, theorem 1)."""
    return (mean_value + math.log(4)) / 2


def squared_gradient_norm(logits_M: Tensor, x: Tensor) -> Tensor:
    """Return || d logit / d x ||^2 of each logit, shape (M,), differentiable. `x` requires grad and
    holds the samples of a pack consecutively."""
    (gradient,) = torch.autograd.grad(logits_M.sum(), x, create_graph=True)
    return gradient.reshape(len(logits_M), -1).square().sum(1)


def r1_penalty(logits_M: Tensor, x: Tensor, gamma: float) -> Tensor:
    """Return gamma / 2 * || d logit / d x ||^2, shape (M,): R1 at real samples, R2 at generated
    samples (Mescheder et al. 2018, section 4.1)."""
    return 0.5 * gamma * squared_gradient_norm(logits_M, x)


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, mix_M: Tensor, weight: float
) -> Tensor:
    """Return weight * (|| d logit / d x || - 1)^2, shape (M,), at x = mix * real + (1 - mix) * fake
    (Gulrajani et al. 2017, algorithm 1). `mix_M` is uniform, one number per logit."""
    mix = mix_M.repeat_interleave(len(real) // len(mix_M)).reshape(-1, *[1] * (real.ndim - 1)).to(real)
    between = (mix * real.detach() + (1 - mix) * fake.detach()).requires_grad_()
    # The square root has no gradient at 0, where a critic may start.
    norm_M = (squared_gradient_norm(critic(between), between) + 1e-12).sqrt()
    return weight * (norm_M - 1).square()
