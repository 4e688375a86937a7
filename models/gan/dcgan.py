"""DCGAN (Radford et al. 2016): strided convolutions, batch norm, initial weights from N(0, 0.02).
Images are in [-1, 1]."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from models.gan.batch_norm import ScaledBatchNorm
from models.gan.layers import Discriminator, LabelledLatent
from models.gan.spectral import SpectralConv2d
from models.layers import check_halvings


@dataclass(frozen=True, kw_only=True)
class DCGANConfig:
    """DCGAN's generator and discriminator: strided convolutions with batch norm."""

    name: Literal["dcgan"] = "dcgan"
    """Selects this network."""
    latent: int = 100
    """Dimensions of z."""
    channels: tuple[int, ...] = (64, 128)
    """Channels of each level of both networks, at 1/2, 1/4, ... of the image's resolution."""
    batch_norm_group: int = 32
    """Consecutive samples that share batch-norm statistics."""
    discriminator_norm: Literal["batch", "spectral", "none"] = "batch"
    """Normalisation in the discriminator. Use `none` or `spectral` with gradient penalties, which
    batch norm would mix across samples."""


class _Conv2d(nn.Conv2d):
    def reset_parameters(self) -> None:
        _small_normal(self)


class _ConvTranspose2d(nn.ConvTranspose2d):
    def reset_parameters(self) -> None:
        _small_normal(self)


def _small_normal(layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
    nn.init.normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class DCGANGenerator(nn.Module):
    """Maps z (M, L) to images (M, C, H, W)."""

    def __init__(self, config: DCGANConfig, shape: Sequence[int], num_classes: int | None) -> None:
        super().__init__()
        check_halvings(shape, len(config.channels))
        height, width = (side >> len(config.channels) for side in shape[1:])
        *finer, inputs = config.channels
        self.condition = LabelledLatent(config.latent, num_classes)
        layers: list[nn.Module] = [
            nn.Linear(self.condition.width, inputs * height * width),
            nn.Unflatten(1, (inputs, height, width)),
        ]
        for outputs in reversed(finer):
            layers += [
                ScaledBatchNorm(inputs, config.batch_norm_group),
                nn.ReLU(),
                _ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=False),
            ]
            inputs = outputs
        layers += [
            ScaledBatchNorm(inputs, config.batch_norm_group),
            nn.ReLU(),
            _ConvTranspose2d(inputs, shape[0], 4, stride=2, padding=1),
            nn.Tanh(),
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor, labels_M: Tensor | None = None) -> Tensor:
        y: Tensor = self.layers(self.condition(z, labels_M))
        return y


def dcgan_discriminator(config: DCGANConfig, shape: Sequence[int], num_classes: int | None, pack: int) -> Discriminator:
    """Build a discriminator that maps images (M, C, H, W) to logits (M / pack,). Batch-norm groups
    count packs."""
    check_halvings(shape, len(config.channels))
    spectral = config.discriminator_norm == "spectral"
    inputs = shape[0] * pack
    layers = list[nn.Module]()
    for level, outputs in enumerate(config.channels):
        layers.append((SpectralConv2d if spectral else _Conv2d)(inputs, outputs, 4, stride=2, padding=1))
        if config.discriminator_norm == "batch" and level > 0:
            layers.append(ScaledBatchNorm(outputs, config.batch_norm_group))
        layers.append(nn.LeakyReLU(0.2))
        inputs = outputs
    features = inputs * (shape[1] >> len(config.channels)) * (shape[2] >> len(config.channels))
    return Discriminator(
        nn.Sequential(*layers, nn.Flatten()), features, num_classes=num_classes, pack=pack, spectral=spectral
    )
