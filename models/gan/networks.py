"""Pairs of networks that a GAN job can name.

Generators map (z (M, latent), labels (M,) or None) to samples (M, *shape). Discriminators map
(samples, labels or None) to logits (M / pack,).
"""

import math
from collections.abc import Sequence

from torch import nn

from models.gan.dcgan import DCGANConfig, DCGANGenerator, dcgan_discriminator
from models.gan.layers import Discriminator
from models.gan.mlp import MLPGanConfig, MLPGenerator, mlp_discriminator
from models.gan.residual import ResidualGanConfig, ResidualGenerator, residual_discriminator
from models.gan.style import StyleGanConfig, StyleGenerator, style_discriminator

GanNetworkConfig = MLPGanConfig | DCGANConfig | ResidualGanConfig | StyleGanConfig


def samples_together(config: GanNetworkConfig, pack: int = 1) -> int:
    """Return the number of consecutive samples that must stay in one micro-batch, because they
    share a batch norm, a standard deviation or a logit."""
    match config:
        case MLPGanConfig():
            return math.lcm(pack, config.batch_norm_group if config.batch_norm else 1)
        case DCGANConfig():
            return math.lcm(
                config.batch_norm_group, pack * (config.batch_norm_group if config.discriminator_norm == "batch" else 1)
            )
        case ResidualGanConfig():
            return math.lcm(pack, config.batch_norm_group)
        case StyleGanConfig():
            return pack * config.std_group


def build_generator(config: GanNetworkConfig, shape: Sequence[int], num_classes: int | None = None) -> nn.Module:
    """Build the generator that `config` names, for samples of `shape`."""
    match config:
        case MLPGanConfig():
            return MLPGenerator(config, shape, num_classes)
        case DCGANConfig():
            return DCGANGenerator(config, shape, num_classes)
        case ResidualGanConfig():
            return ResidualGenerator(config, shape, num_classes)
        case StyleGanConfig():
            return StyleGenerator(config, shape, num_classes)


def build_discriminator(
    config: GanNetworkConfig, shape: Sequence[int], num_classes: int | None = None, pack: int = 1
) -> Discriminator:
    """Build the discriminator that `config` names; it judges `pack` consecutive samples
    together."""
    match config:
        case MLPGanConfig():
            return mlp_discriminator(config, shape, num_classes, pack)
        case DCGANConfig():
            return dcgan_discriminator(config, shape, num_classes, pack)
        case ResidualGanConfig():
            return residual_discriminator(config, shape, num_classes, pack)
        case StyleGanConfig():
            return style_discriminator(config, shape, num_classes, pack)
