"""The style-based GAN (Karras et al. 2020, StyleGAN2): mapping network, modulated convolutions,
residual discriminator.

Images are in [-1, 1]. Noise inputs are left out, as in StyleGAN3 (Karras et al. 2021), so an image
depends on z alone.

M samples, W style width, C channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.gan.layers import Discriminator, LabelledLatent, append_group_std
from models.layers import check_halvings


@dataclass(frozen=True, kw_only=True)
class StyleGanConfig:
    """StyleGAN2's generator and discriminator: mapping network and modulated convolutions."""

    name: Literal["style"] = "style"
    """Selects this network."""
    latent: int = 128
    """Dimensions of z and of the style w."""
    mapping_layers: int = 2
    """Layers of the mapping network, whose learning rate is a hundredth of the other layers'
    (Karras et al. 2019, appendix C)."""
    channels: tuple[int, ...] = (64, 128)
    """Channels of each level of both networks, at the image's resolution, 1/2 of it, and so on."""
    std_group: int = 4
    """Number of consecutive packs over which the discriminator computes a standard deviation."""


class EqualLinear(nn.Linear):
    """A linear layer whose weights are stored as N(0, 1) / rate and scaled when used, so that Adam
    moves all layers alike (Karras et al. 2018, section 4.1)."""

    def __init__(self, inputs: int, outputs: int, rate: float = 1.0, bias: float = 0.0) -> None:
        self.rate = rate
        self.start = bias
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1 / self.rate)
        nn.init.constant_(self.bias, self.start / self.rate)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (self.rate / math.sqrt(self.in_features)), self.bias * self.rate)


class EqualConv2d(nn.Conv2d):
    """A convolution with an odd kernel that keeps the resolution; its weights are scaled when
    used."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        self.scale = 1 / math.sqrt(inputs * kernel**2)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._conv_forward(x, self.weight * self.scale, self.bias)
        return y


class ModulatedConv2d(EqualConv2d):
    """A convolution whose input channels are scaled by a style, and whose output is rescaled to
    unit variance (Karras et al. 2020, eq. 1 to 3)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, style: int, demodulate: bool = True) -> None:
        super().__init__(inputs, outputs, kernel)
        self.demodulate = demodulate
        self.affine = EqualLinear(style, inputs, bias=1.0)

    def forward(self, x: Tensor, w_MW: Tensor | None = None) -> Tensor:
        assert w_MW is not None
        style_MC = self.affine(w_MW)
        weight = self.weight * self.scale
        # Scaling the activations equals scaling each sample's kernel, and needs one convolution for
        # all samples.
        y = F.conv2d(x * style_MC[:, :, None, None], weight, padding=self.padding)
        if self.demodulate:
            y = y * torch.rsqrt(style_MC.square() @ weight.square().sum(dim=(2, 3)).T + 1e-8)[:, :, None, None]
        assert self.bias is not None
        return y + self.bias[:, None, None]


class Mapping(nn.Module):
    """Maps (z, label) to the style w (M, W)."""

    def __init__(self, config: StyleGanConfig, num_classes: int | None) -> None:
        super().__init__()
        self.condition = LabelledLatent(config.latent, num_classes, config.latent)
        widths = [self.condition.width] + [config.latent] * config.mapping_layers
        self.layers = nn.ModuleList([EqualLinear(i, o, rate=0.01) for i, o in pairwise(widths)])

    def forward(self, z: Tensor, labels_M: Tensor | None) -> Tensor:
        h: Tensor = self.condition(z, labels_M)
        h = h * torch.rsqrt(h.square().mean(dim=1, keepdim=True) + 1e-8)
        for layer in self.layers:
            h = F.leaky_relu(layer(h), 0.2) * math.sqrt(2)
        return h


class StyledPair(nn.Module):
    """Two modulated convolutions at one resolution."""

    def __init__(self, inputs: int, outputs: int, style: int) -> None:
        super().__init__()
        self.conv1 = ModulatedConv2d(inputs, outputs, 3, style)
        self.conv2 = ModulatedConv2d(outputs, outputs, 3, style)

    def forward(self, x: Tensor, w_MW: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(x, w_MW), 0.2) * math.sqrt(2)
        return F.leaky_relu(self.conv2(x, w_MW), 0.2) * math.sqrt(2)


class StyleGenerator(nn.Module):
    """Maps z (M, L) to images (M, C, H, W), as the sum of the images of all resolutions (Karras et
    al. 2020, figure 7)."""

    def __init__(self, config: StyleGanConfig, shape: Sequence[int], num_classes: int | None) -> None:
        super().__init__()
        levels = len(config.channels)
        check_halvings(shape, levels - 1)
        self.mapping = Mapping(config, num_classes)
        self.constant = nn.Parameter(
            torch.empty(config.channels[-1], shape[1] >> (levels - 1), shape[2] >> (levels - 1))
        )
        self.convolutions = nn.ModuleList()
        self.to_image = nn.ModuleList()
        inputs = config.channels[-1]
        for outputs in reversed(config.channels):
            self.convolutions.append(StyledPair(inputs, outputs, config.latent))
            self.to_image.append(ModulatedConv2d(outputs, shape[0], 1, config.latent, demodulate=False))
            inputs = outputs
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.constant)

    def forward(self, z: Tensor, labels_M: Tensor | None = None) -> Tensor:
        w_MW = self.mapping(z, labels_M)
        x = self.constant.expand(len(z), -1, -1, -1)
        image = x.new_zeros(())
        for level, (pair, to_image) in enumerate(zip(self.convolutions, self.to_image, strict=True)):
            if level > 0:
                x = _double(x)
                image = _double(image)
            x = pair(x, w_MW)
            image = image + to_image(x, w_MW)
        return image


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


class StyleBlock(nn.Module):
    """A residual block that halves the resolution (Karras et al. 2020, section 4.1)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = EqualConv2d(inputs, inputs, 3)
        self.conv2 = EqualConv2d(inputs, outputs, 3)
        self.shortcut = EqualConv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.conv1(x), 0.2) * math.sqrt(2)
        h = F.leaky_relu(self.conv2(F.avg_pool2d(h, 2)), 0.2) * math.sqrt(2)
        y: Tensor = (h + self.shortcut(F.avg_pool2d(x, 2))) / math.sqrt(2)
        return y


class StyleTail(nn.Module):
    """Maps (P, C, h, w) to features (P, F), with the standard deviation over groups of packs as an
    extra channel."""

    def __init__(self, channels: int, positions: int, features: int, group: int) -> None:
        super().__init__()
        self.group = group
        self.conv = EqualConv2d(channels + 1, channels, 3)
        self.linear = EqualLinear(channels * positions, features)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.conv(append_group_std(x, self.group)), 0.2) * math.sqrt(2)
        return F.leaky_relu(self.linear(h.flatten(1)), 0.2) * math.sqrt(2)


def style_discriminator(
    config: StyleGanConfig, shape: Sequence[int], num_classes: int | None, pack: int
) -> Discriminator:
    """Build a discriminator that maps images (M, C, H, W) to logits (M / pack,)."""
    levels = len(config.channels)
    check_halvings(shape, levels - 1)
    layers: list[nn.Module] = [EqualConv2d(shape[0] * pack, config.channels[0], 1), nn.LeakyReLU(0.2)]
    layers += [StyleBlock(i, o) for i, o in pairwise(config.channels)]
    positions = (shape[1] >> (levels - 1)) * (shape[2] >> (levels - 1))
    layers.append(StyleTail(config.channels[-1], positions, config.channels[-1], config.std_group))
    return Discriminator(
        nn.Sequential(*layers), config.channels[-1], num_classes=num_classes, pack=pack, spectral=False
    )
