"""The variational auto-encoder: encoders, decoders and their composition with a likelihood.

The objective is trainer/objectives/vae.py. M samples, K importance samples, L latent dimensions;
images are (M, C, H, W) in [0, 1].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from models.layers import check_halvings, mlp
from models.losses import standard_gaussian_kl
from models.vae.elbo import log_normal, reparameterise
from models.vae.likelihoods import LikelihoodConfig, build_likelihood


@dataclass(frozen=True, kw_only=True)
class MLPVAEConfig:
    """Fully connected encoder and decoder. With `hidden: []` both are linear, and the optimum is
    probabilistic PCA."""

    name: Literal["mlp"] = "mlp"
    """Selects this network."""
    latent: int = 16
    """Number of latent dimensions."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the encoder's hidden layers; the decoder has them in reverse order."""


@dataclass(frozen=True, kw_only=True)
class ConvVAEConfig:
    """Convolutional encoder and decoder; every level halves the resolution."""

    name: Literal["convolutional"] = "convolutional"
    """Selects this network."""
    latent: int = 32
    """Number of latent dimensions."""
    channels: tuple[int, ...] = (64, 128)
    """Channels of each level, at 1/2, 1/4, ... of the image's resolution."""
    hidden: int = 256
    """Width of the fully connected layer between the convolutions and the latent code."""


VAENetworkConfig = MLPVAEConfig | ConvVAEConfig


class Elbo(NamedTuple):
    """The two parts of the ELBO, in nats, and the posterior's parameters. The bound is
    log_likelihood_M - kl_ML.sum(1)."""

    log_likelihood_M: Tensor
    """log p(x | z) of each sample."""
    kl_ML: Tensor
    """KL divergence of the posterior from the prior, for each latent dimension."""
    mean_ML: Tensor
    """Mean of the posterior."""
    log_var_ML: Tensor
    """Log variance of the posterior."""


class VAE(nn.Module):
    """Encoder q(z | x), decoder and likelihood p(x | z), prior N(0, I)."""

    def __init__(self, config: VAENetworkConfig, likelihood: LikelihoodConfig, shape: Sequence[int]) -> None:
        """`shape` is the shape of one sample: (C, H, W), or (C,) for the MLP."""
        super().__init__()
        self.latent = config.latent
        self.likelihood = build_likelihood(likelihood)
        output_shape = (shape[0] * self.likelihood.parameters_per_value, *shape[1:])
        match config:
            case MLPVAEConfig():
                self.encoder = _mlp_encoder(config, shape)
                self.decoder = _mlp_decoder(config, output_shape)
            case ConvVAEConfig():
                check_halvings(shape, len(config.channels))
                self.encoder = _conv_encoder(config, shape)
                self.decoder = _conv_decoder(config, output_shape)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z | x), each (M, L)."""
        mean_ML, log_var_ML = self.encoder(x).chunk(2, dim=1)
        return mean_ML, log_var_ML

    def forward(self, x: Tensor, noise_ML: Tensor) -> Elbo:
        """Return the parts of each x's one-sample ELBO at z = mean + std * noise."""
        mean_ML, log_var_ML = self.encode(x)
        output = self.decoder(reparameterise(mean_ML, log_var_ML, noise_ML))
        return Elbo(self.likelihood(output, x), standard_gaussian_kl(mean_ML, log_var_ML), mean_ML, log_var_ML)

    def log_weights(self, x: Tensor, noise_KML: Tensor) -> Tensor:
        """Return log p(x, z) - log q(z | x) for K draws of z, shape (K, M); `elbo.importance_bound`
        turns them into a bound."""
        mean_ML, log_var_ML = self.encode(x)
        z_KML = reparameterise(mean_ML, log_var_ML, noise_KML)
        k = len(noise_KML)
        log_likelihood_KM = self.likelihood(
            self.decoder(z_KML.flatten(0, 1)), x.repeat(k, *[1] * (x.ndim - 1))
        ).unflatten(0, (k, -1))
        log_weight_KM: Tensor = (
            log_likelihood_KM
            + log_normal(z_KML, z_KML.new_zeros(()), z_KML.new_zeros(()))
            - log_normal(z_KML, mean_ML, log_var_ML)
        )
        return log_weight_KM

    def generate(self, z_ML: Tensor) -> Tensor:
        """Return the expected image of each latent code, shape (M, C, H, W)."""
        return self.likelihood.mean(self.decoder(z_ML))

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the expected image at the posterior's mean."""
        return self.generate(self.encode(x)[0])


def _mlp_encoder(config: MLPVAEConfig, shape: Sequence[int]) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), mlp((math.prod(shape), *config.hidden, 2 * config.latent)))


def _mlp_decoder(config: MLPVAEConfig, shape: Sequence[int]) -> nn.Sequential:
    return nn.Sequential(
        mlp((config.latent, *reversed(config.hidden), math.prod(shape))), nn.Unflatten(1, tuple(shape))
    )


def _conv_encoder(config: ConvVAEConfig, shape: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = shape[0]
    for channels in config.channels:
        layers += [
            nn.Conv2d(inputs, channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 4, stride=2, padding=1),
            nn.SiLU(),
        ]
        inputs = channels
    features = inputs * math.prod(shape[1:]) // 4 ** len(config.channels)
    return nn.Sequential(*layers, nn.Flatten(), mlp((features, config.hidden, 2 * config.latent)))


def _conv_decoder(config: ConvVAEConfig, shape: Sequence[int]) -> nn.Sequential:
    levels = len(config.channels)
    inputs = config.channels[-1]
    height = shape[1] >> levels
    width = shape[2] >> levels
    layers: list[nn.Module] = [
        mlp((config.latent, config.hidden, inputs * height * width)),
        nn.Unflatten(1, (inputs, height, width)),
        nn.SiLU(),
    ]
    for channels in reversed(config.channels):
        layers += [
            nn.Upsample(scale_factor=2),
            nn.Conv2d(inputs, channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.SiLU(),
        ]
        inputs = channels
    return nn.Sequential(*layers, nn.Conv2d(inputs, shape[0], 3, padding=1))
