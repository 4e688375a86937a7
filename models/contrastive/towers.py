"""Networks that embed images and texts on one unit sphere: an encoder and a projection for two
views (SimCLR), and two towers (CLIP, SigLIP).

M samples, images (C, H, W), T tokens, F features, P width of an embedding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.contrastive.losses import Embedded
from models.init import no_decay
from models.layers import Linear, check_halvings, mlp
from models.transformer.model import Transformer, TransformerConfig


@dataclass(frozen=True, kw_only=True)
class ConvEncoderConfig:
    """A residual network with group norm, in which samples are independent."""

    name: Literal["convolutional"] = "convolutional"
    """Selects this encoder."""
    channels: tuple[int, ...] = (32, 64, 128)
    """Channels of each level; every level but the first halves the resolution."""
    blocks: int = 1
    """Number of residual blocks per level."""
    norm_groups: int = 8
    """Groups of the group norms; must divide all channels."""

    def __post_init__(self) -> None:
        if not self.channels or self.blocks < 1 or any(channels % self.norm_groups for channels in self.channels):
            raise ValueError(
                f"encoder: channels {list(self.channels)}, blocks {self.blocks}, norm_groups {self.norm_groups}; "
                "give at least one level and one block, and channels that norm_groups divides"
            )


class _Block(nn.Module):
    """Computes x + conv(relu(norm(conv(relu(norm(x)))))) (He et al. 2016, identity mappings)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        halves = [
            [nn.GroupNorm(groups, channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)] for _ in range(2)
        ]
        self.residual = nn.Sequential(*halves[0], *halves[1])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.residual(x)
        return y


class ConvEncoder(nn.Sequential):
    """Maps images (M, C, H, W) to features (M, F): the last level, averaged over positions."""

    def __init__(self, config: ConvEncoderConfig, shape: Sequence[int]) -> None:
        check_halvings(shape, len(config.channels) - 1)
        layers: list[nn.Module] = []
        inputs = shape[0]
        for level, channels in enumerate(config.channels):
            layers.append(nn.Conv2d(inputs, channels, 3, stride=2 if level else 1, padding=1))
            layers += [_Block(channels, config.norm_groups) for _ in range(config.blocks)]
            inputs = channels
        super().__init__(
            *layers, nn.GroupNorm(config.norm_groups, inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.width = inputs


class TwoViews(nn.Module):
    """SimCLR's network: one encoder and one projection head for both views (Chen et al. 2020,
    section 2.1)."""

    def __init__(
        self, encoder: ConvEncoderConfig, shape: Sequence[int], projection: Sequence[int], temperature: float
    ) -> None:
        super().__init__()
        self.encoder = ConvEncoder(encoder, shape)
        self.head = mlp((self.encoder.width, *projection), nn.ReLU)
        self.log_scale = -math.log(temperature)

    def features(self, x: Tensor) -> Tensor:
        """Return the features that are kept after training, before the projection: (M, F)."""
        features_MF: Tensor = self.encoder(x)
        return features_MF

    def forward(self, a: Tensor, b: Tensor) -> Embedded:
        a_MP, b_MP = F.normalize(self.head(self.encoder(torch.cat([a, b]))), dim=1).chunk(2)
        return Embedded(a_MP, b_MP, a_MP.new_full((1,), self.log_scale), a_MP.new_zeros(1))


class Temperature(nn.Module):
    """Learned scale and bias of the logits of two towers: log(1 / temperature), and the bias if
    there is one."""

    def __init__(self, temperature: float, bias: float | None) -> None:
        super().__init__()
        self.start = -math.log(temperature)
        self.start_bias = bias
        self.log_scale = no_decay(nn.Parameter(torch.empty(1)))
        self.bias = None if bias is None else no_decay(nn.Parameter(torch.empty(1)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.log_scale.fill_(self.start)
        if self.bias is not None:
            self.bias.fill_(self.start_bias or 0.0)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.log_scale, torch.zeros_like(self.log_scale) if self.bias is None else self.bias


class TwoTowers(nn.Module):
    """An image encoder and a causal text transformer that is read at the end of the text, both
    projected onto one sphere (Radford et al. 2021, section 2.4)."""

    def __init__(
        self,
        image: ConvEncoderConfig,
        text: TransformerConfig,
        shape: Sequence[int],
        vocab_size: int,
        width: int,
        temperature: float,
        bias: float | None,
    ) -> None:
        super().__init__()
        self.encoder = ConvEncoder(image, shape)
        self.text = Transformer(replace(text, tie_embeddings=True), vocab_size)
        self.image_head = Linear(self.encoder.width, width, self.encoder.width**-0.5)
        self.text_head = Linear(text.d_model, width, text.d_model**-0.5)
        self.temperature = Temperature(temperature, bias)

    def features(self, x: Tensor) -> Tensor:
        """Return the image tower's features, before the projection: (M, F)."""
        features_MF: Tensor = self.encoder(x)
        return features_MF

    def read(self, tokens_MT: Tensor, end_M: Tensor) -> Tensor:
        """Embed texts (M, T) that end at position `end_M`: (M, P). Causal attention hides
        everything behind the end."""
        hidden_MTD, _ = self.text.hidden(tokens_MT)
        return F.normalize(self.text_head(hidden_MTD[torch.arange(len(end_M), device=end_M.device), end_M]), dim=1)

    def forward(self, x: Tensor, tokens_MT: Tensor, end_M: Tensor) -> Embedded:
        a_MP = F.normalize(self.image_head(self.encoder(x)), dim=1)
        return Embedded(a_MP, self.read(tokens_MT, end_M), *self.temperature())
