"""The residual GAN of BigGAN (Brock et al. 2019, appendix B): conditional batch norm, spectral
norm, self-attention. Images are in [-1, 1]."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.gan.batch_norm import ConditionalBatchNorm, ScaledBatchNorm
from models.gan.layers import Discriminator, ImageSelfAttention, LabelledLatent
from models.gan.spectral import SpectralConv2d, SpectralLinear
from models.layers import check_halvings


@dataclass(frozen=True, kw_only=True)
class ResidualGanConfig:
    """BigGAN's generator and discriminator: residual blocks with conditional batch norm."""

    name: Literal["residual"] = "residual"
    """Selects this network."""
    latent: int = 120
    """Dimensions of z. Every batch norm is conditioned on all of z and on the class."""
    channels: tuple[int, ...] = (64, 128)
    """Channels of each level of both networks, at the image's resolution, 1/2 of it, and so on."""
    attention_level: int | None = 0
    """Level with self-attention, 0 being the full resolution; null for none."""
    class_embedding: int = 128
    """Width of the class vectors."""
    batch_norm_group: int = 32
    """Consecutive samples that share batch-norm statistics."""

    def __post_init__(self) -> None:
        if self.attention_level is not None and not 0 <= self.attention_level < len(self.channels):
            levels = len(self.channels)
            raise ValueError(
                f"network.attention_level is {self.attention_level}, but channels has {levels} levels; "
                f"choose 0 to {levels - 1}"
            )


class GeneratorBlock(nn.Module):
    """A residual block that doubles the resolution."""

    def __init__(self, inputs: int, outputs: int, condition: int, group: int) -> None:
        super().__init__()

        def gain(inputs: int, outputs: int) -> nn.Linear:
            return SpectralLinear(inputs, outputs, bias=False)

        # No biases: batch norm follows on every path and cancels them, but Adam would turn their
        # rounding errors into steps.
        self.norm1 = ConditionalBatchNorm(inputs, condition, group, gain)
        self.conv1 = SpectralConv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm2 = ConditionalBatchNorm(outputs, condition, group, gain)
        self.conv2 = SpectralConv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = SpectralConv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor, condition_MD: Tensor) -> Tensor:
        h = self.conv1(F.interpolate(F.relu(self.norm1(x, condition_MD)), scale_factor=2.0))
        h = self.conv2(F.relu(self.norm2(h, condition_MD)))
        y: Tensor = h + self.shortcut(F.interpolate(x, scale_factor=2.0))
        return y


class ResidualGenerator(nn.Module):
    """Maps z (M, L) to images (M, C, H, W)."""

    def __init__(self, config: ResidualGanConfig, shape: Sequence[int], num_classes: int | None) -> None:
        super().__init__()
        levels = len(config.channels)
        check_halvings(shape, levels)
        self.base = (config.channels[-1], shape[1] >> levels, shape[2] >> levels)
        self.condition = LabelledLatent(config.latent, num_classes, config.class_embedding)
        self.project = SpectralLinear(config.latent, self.base[0] * self.base[1] * self.base[2])
        self.blocks = nn.ModuleList()
        inputs = config.channels[-1]
        for outputs in reversed(config.channels):
            self.blocks.append(GeneratorBlock(inputs, outputs, self.condition.width, config.batch_norm_group))
            inputs = outputs
        self.attend_after = None if config.attention_level is None else levels - 1 - config.attention_level
        self.attention: nn.Module = nn.Identity()
        if config.attention_level is not None:
            self.attention = ImageSelfAttention(config.channels[config.attention_level])
        self.norm = ScaledBatchNorm(inputs, config.batch_norm_group)
        self.to_image = SpectralConv2d(inputs, shape[0], 3, padding=1)

    def forward(self, z: Tensor, labels_M: Tensor | None = None) -> Tensor:
        condition_MD = self.condition(z, labels_M)
        x = self.project(z).unflatten(1, self.base)
        for i, block in enumerate(self.blocks):
            x = block(x, condition_MD)
            if i == self.attend_after:
                x = self.attention(x)
        return torch.tanh(self.to_image(F.relu(self.norm(x))))


class DiscriminatorBlock(nn.Module):
    """A residual block that halves the resolution. The first block sees raw pixels, which no ReLU
    may clip."""

    def __init__(self, inputs: int, outputs: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.conv1 = SpectralConv2d(inputs, outputs, 3, padding=1)
        self.conv2 = SpectralConv2d(outputs, outputs, 3, padding=1)
        self.shortcut = SpectralConv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        return F.avg_pool2d(h + self.shortcut(x), 2)


class SumPool(nn.Module):
    """ReLU, then the sum over positions: (M, C, H, W) -> (M, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).sum(dim=(2, 3))


def residual_discriminator(
    config: ResidualGanConfig, shape: Sequence[int], num_classes: int | None, pack: int
) -> Discriminator:
    """Build a discriminator that maps images (M, C, H, W) to logits (M / pack,)."""
    check_halvings(shape, len(config.channels))
    inputs = shape[0] * pack
    layers = list[nn.Module]()
    for level, outputs in enumerate(config.channels):
        if level == config.attention_level and level > 0:
            layers.append(ImageSelfAttention(inputs))
        layers.append(DiscriminatorBlock(inputs, outputs, first=level == 0))
        inputs = outputs
    # At full resolution the discriminator has only raw pixels, so its attention sits one level
    # below the generator's.
    if config.attention_level == 0:
        layers.insert(1, ImageSelfAttention(config.channels[0]))
    return Discriminator(nn.Sequential(*layers, SumPool()), inputs, num_classes=num_classes, pack=pack, spectral=True)
