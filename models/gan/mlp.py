"""The fully connected GAN of the toy protocols (Dumoulin et al. 2017; Lin et al. 2018, PacGAN,
section 4.1)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from models.gan.batch_norm import ScaledBatchNorm
from models.gan.layers import Discriminator, LabelledLatent
from models.gan.spectral import linear


@dataclass(frozen=True, kw_only=True)
class MLPGanConfig:
    """Fully connected generator and discriminator for vectors. The defaults are PacGAN's networks
    for Gaussian grids."""

    name: Literal["mlp"] = "mlp"
    """Selects this network."""
    latent: int = 2
    """Dimensions of z."""
    generator_hidden: tuple[int, ...] = (400, 400, 400, 400)
    """Widths of the generator's hidden layers."""
    discriminator_hidden: tuple[int, ...] = (200, 200, 200)
    """Widths of the discriminator's hidden layers."""
    batch_norm: bool = True
    """Whether each hidden layer of the generator is followed by batch norm."""
    batch_norm_group: int = 100
    """Consecutive samples that share batch-norm statistics."""
    maxout: int = 5
    """Linear pieces per unit of the discriminator; 0 selects leaky ReLU."""
    spectral_norm: bool = False
    """Whether the discriminator has spectral norm."""
    data_scale: float = 1.0
    """Rough scale of the data: multiplies the generator's output and divides the discriminator's
    input."""


class Maxout(nn.Module):
    """A linear layer each of whose outputs is the largest of `pieces` (Goodfellow et al. 2013)."""

    def __init__(self, inputs: int, outputs: int, pieces: int, *, spectral: bool) -> None:
        super().__init__()
        self.pieces = pieces
        self.linear = linear(inputs, outputs * pieces, spectral=spectral)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x).unflatten(-1, (-1, self.pieces)).amax(-1)
        return y


class Scale(nn.Module):
    """Multiplication by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class MLPGenerator(nn.Module):
    """Maps z (M, L) to samples (M, *shape)."""

    def __init__(self, config: MLPGanConfig, shape: Sequence[int], num_classes: int | None) -> None:
        super().__init__()
        self.condition = LabelledLatent(config.latent, num_classes)
        layers: list[nn.Module] = []
        width = self.condition.width
        for hidden in config.generator_hidden:
            # A bias before batch norm has no effect, but rounding gives it gradients, which Adam
            # turns into steps.
            layers.append(nn.Linear(width, hidden, bias=not config.batch_norm))
            if config.batch_norm:
                layers.append(ScaledBatchNorm(hidden, config.batch_norm_group))
            layers.append(nn.ReLU())
            width = hidden
        self.layers = nn.Sequential(
            *layers, nn.Linear(width, math.prod(shape)), Scale(config.data_scale), nn.Unflatten(1, tuple(shape))
        )

    def forward(self, z: Tensor, labels_M: Tensor | None = None) -> Tensor:
        y: Tensor = self.layers(self.condition(z, labels_M))
        return y


def mlp_discriminator(config: MLPGanConfig, shape: Sequence[int], num_classes: int | None, pack: int) -> Discriminator:
    """Build a discriminator that maps samples (M, *shape) to logits (M / pack,)."""
    layers: list[nn.Module] = [nn.Flatten(), Scale(1 / config.data_scale)]
    width = math.prod(shape) * pack
    for hidden in config.discriminator_hidden:
        if config.maxout:
            layers.append(Maxout(width, hidden, config.maxout, spectral=config.spectral_norm))
        else:
            layers += [linear(width, hidden, spectral=config.spectral_norm), nn.LeakyReLU(0.2)]
        width = hidden
    return Discriminator(
        nn.Sequential(*layers), width, num_classes=num_classes, pack=pack, spectral=config.spectral_norm
    )
