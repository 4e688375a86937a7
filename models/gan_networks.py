"""The pairs of networks that a GAN job can name.

Generators map (z of shape (M, latent), labels (M,) or None) to samples (M, *shape); discriminators map (samples, labels or None) to logits (M / pack,).
"""

import math
from collections.abc import Sequence

from torch import nn

from models.gan_dcgan import DCGANConfig, DCGANGenerator, dcgan_discriminator
from models.gan_layers import Discriminator
from models.gan_mlp import MLPGanConfig, MLPGenerator, mlp_discriminator
from models.gan_residual import ResidualGanConfig, ResidualGenerator, residual_discriminator
from models.gan_style import StyleGanConfig, StyleGenerator, style_discriminator

GanNetworkConfig = MLPGanConfig | DCGANConfig | ResidualGanConfig | StyleGanConfig


def samples_together(config: GanNetworkConfig, pack: int = 1) -> int:
    """Consecutive samples that must stay in one micro-batch: those that share a batch norm, a standard deviation or a verdict."""
    match config:
        case MLPGanConfig():
            return math.lcm(pack, config.batch_norm_group if config.batch_norm else 1)
        case DCGANConfig():
            return math.lcm(config.batch_norm_group, pack * (config.batch_norm_group if config.discriminator_norm == "batch" else 1))
        case ResidualGanConfig():
            return math.lcm(pack, config.batch_norm_group)
        case StyleGanConfig():
            return pack * config.std_group


def build_generator(config: GanNetworkConfig, shape: Sequence[int], num_classes: int | None = None) -> nn.Module:
    """The generator that `config` names, for samples of `shape`."""
    match config:
        case MLPGanConfig():
            return MLPGenerator(config, shape, num_classes)
        case DCGANConfig():
            return DCGANGenerator(config, shape, num_classes)
        case ResidualGanConfig():
            return ResidualGenerator(config, shape, num_classes)
        case StyleGanConfig():
            return StyleGenerator(config, shape, num_classes)


def build_discriminator(config: GanNetworkConfig, shape: Sequence[int], num_classes: int | None = None, pack: int = 1) -> Discriminator:
    """The discriminator that `config` names; it judges `pack` consecutive samples at a time."""
    match config:
        case MLPGanConfig():
            return mlp_discriminator(config, shape, num_classes, pack)
        case DCGANConfig():
            return dcgan_discriminator(config, shape, num_classes, pack)
        case ResidualGanConfig():
            return residual_discriminator(config, shape, num_classes, pack)
        case StyleGanConfig():
            return style_discriminator(config, shape, num_classes, pack)
