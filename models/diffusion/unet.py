"""The U-Net of DDPM (Ho et al. 2020, appendix B), built and named like diffusers' `UNet2DModel`:
their state dicts are interchangeable.

M samples, E time-embedding width. The network predicts noise, x0 or v at (x_t, t), and is the same
for all three.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """A U-Net with residual blocks and self-attention."""

    name: Literal["unet"] = "unet"
    """Selects this network."""
    channels: tuple[int, ...] = (128, 256, 256)
    """Channels of each level; every level but the last halves the resolution."""
    layers_per_level: int = 2
    """Residual blocks per level on the way down; the way up has one more."""
    attention_levels: tuple[int, ...] = (1,)
    """Levels with self-attention after each residual block, 0 being the full resolution; the middle
    always has it."""
    head_channels: int | None = None
    """Channels per attention head; null: one head."""
    norm_groups: int = 32
    """Groups of each group normalisation."""

    def __post_init__(self) -> None:
        for channels in self.channels:
            if channels % self.norm_groups:
                raise ValueError(
                    f"network.channels has {channels}, not a multiple of norm_groups {self.norm_groups}; change either"
                )
            if channels % (self.head_channels or channels):
                raise ValueError(
                    f"network.channels has {channels}, not a multiple of head_channels {self.head_channels}; "
                    "change either"
                )
        for level in self.attention_levels:
            if not 0 <= level < len(self.channels):
                raise ValueError(
                    f"network.attention_levels has {level}, but channels has {len(self.channels)} levels; "
                    f"choose 0 to {len(self.channels) - 1}"
                )


class Level(nn.Module):
    """The residual blocks of one resolution."""

    def __init__(self, config: UNetConfig, inputs: list[int], outputs: int, attention: bool) -> None:
        """`inputs` are the input channels of each block."""
        super().__init__()
        width = 4 * config.channels[0]
        self.resnets = nn.ModuleList([ResidualBlock(i, outputs, width, config.norm_groups) for i in inputs])
        self.attentions = nn.ModuleList(
            [SpatialAttention(outputs, config.head_channels, config.norm_groups) for _ in inputs] if attention else []
        )

    def block(self, index: int, x: Tensor, embedding_ME: Tensor) -> Tensor:
        """Apply residual block `index`, and its attention if there is one."""
        x = self.resnets[index](x, embedding_ME)
        return self.attentions[index](x) if self.attentions else x


class DownLevel(Level):
    """A level on the way down, with a downsampler unless it is the last."""

    def __init__(self, config: UNetConfig, inputs: list[int], outputs: int, attention: bool, last: bool) -> None:
        super().__init__(config, inputs, outputs, attention)
        self.downsamplers = nn.ModuleList([] if last else [Resample(outputs, "down")])

    def forward(self, x: Tensor, embedding_ME: Tensor) -> list[Tensor]:
        """Return the outputs of each block and of the downsampler; the last is the input of the
        next level."""
        steps = []
        for i in range(len(self.resnets)):
            x = self.block(i, x, embedding_ME)
            steps.append(x)
        return steps + [downsample(x) for downsample in self.downsamplers]


class UpLevel(Level):
    """A level on the way up, with an upsampler unless it is the last."""

    def __init__(self, config: UNetConfig, inputs: list[int], outputs: int, attention: bool, last: bool) -> None:
        super().__init__(config, inputs, outputs, attention)
        self.upsamplers = nn.ModuleList([] if last else [Resample(outputs, "up")])

    def forward(self, x: Tensor, skips: list[Tensor], embedding_ME: Tensor) -> Tensor:
        """Return the level's output. `skips` are the skip connections of its blocks, used from last
        to first."""
        for i, skip in enumerate(reversed(skips)):
            x = self.block(i, torch.cat([x, skip], dim=1), embedding_ME)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class Middle(nn.Module):
    """Residual block, attention and residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels = config.channels[-1]
        width = 4 * config.channels[0]
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels, width, config.norm_groups) for _ in range(2)])
        self.attentions = nn.ModuleList([SpatialAttention(channels, config.head_channels, config.norm_groups)])

    def forward(self, x: Tensor, embedding_ME: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, embedding_ME))
        y: Tensor = self.resnets[1](x, embedding_ME)
        return y


class UNet(nn.Module):
    """Maps (x_t, t, labels) to a prediction. With `num_classes`, label `num_classes` is the null
    label of classifier-free guidance."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, num_classes: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.null_label = num_classes
        width = 4 * config.channels[0]
        levels = len(config.channels)
        self.conv_in = nn.Conv2d(in_channels, config.channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(config.channels[0], width)
        self.class_embedding = nn.Embedding(num_classes + 1, width) if num_classes is not None else None

        skips = [config.channels[0]]
        self.down_blocks = nn.ModuleList()
        for i, outputs in enumerate(config.channels):
            last = i == levels - 1
            inputs = [skips[-1]] + [outputs] * (config.layers_per_level - 1)
            self.down_blocks.append(DownLevel(config, inputs, outputs, i in config.attention_levels, last))
            skips += [outputs] * (config.layers_per_level + (not last))
        self.mid_block = Middle(config)
        self.up_blocks = nn.ModuleList()
        channels = config.channels[-1]
        for i, outputs in reversed(list(enumerate(config.channels))):
            inputs = [(channels if j == 0 else outputs) + skips.pop() for j in range(config.layers_per_level + 1)]
            self.up_blocks.append(UpLevel(config, inputs, outputs, i in config.attention_levels, last=i == 0))
            channels = outputs
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, channels, eps=1e-5)
        self.conv_out = ZeroConv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, t_M: Tensor, labels_M: Tensor | None = None) -> Tensor:
        """Return the prediction for x_t of shape (M, C, H, W) at timesteps t (M,). Without labels,
        a class-conditional network uses the null label.

        Raises ValueError if the levels cannot halve the images.
        """
        if (x.shape[2] | x.shape[3]) % 2 ** (len(self.config.channels) - 1):
            raise ValueError(
                f"images of {x.shape[2]}x{x.shape[3]} cannot be halved {len(self.config.channels) - 1} times; "
                "give network.channels fewer levels"
            )
        embedding_ME = self.time_embedding(timestep_embedding(t_M, self.config.channels[0]).to(x.dtype))
        if self.class_embedding is not None and self.null_label is not None:
            labels_M = torch.full_like(t_M, self.null_label) if labels_M is None else labels_M
            embedding_ME = embedding_ME + self.class_embedding(labels_M)
        skips = [self.conv_in(x)]
        for level in self.down_blocks:
            skips += level(skips[-1], embedding_ME)
        h = self.mid_block(skips[-1], embedding_ME)
        for level in self.up_blocks:
            left = len(skips) - self.config.layers_per_level - 1
            h = level(h, skips[left:], embedding_ME)
            skips = skips[:left]
        y: Tensor = self.conv_out(F.silu(self.conv_norm_out(h)))
        return y


class ZeroConv2d(nn.Conv2d):
    """A convolution that starts at 0, so that its block starts as the identity (Ho et al. 2020,
    their code)."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)


class ZeroLinear(nn.Linear):
    """A linear layer that starts at 0."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def timestep_embedding(t_M: Tensor, channels: int) -> Tensor:
    """Return cosines, then sines, of t at wavelengths from 2 pi to 20000 pi, shape (M, channels)
    (Vaswani et al. 2017, section 3.5)."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t_M.device) / half)
    angles = t_M[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """Two linear layers after the sinusoidal embedding."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, embedding: Tensor) -> Tensor:
        y: Tensor = self.linear_2(F.silu(self.linear_1(embedding)))
        return y


class ResidualBlock(nn.Module):
    """Two normalised convolutions, with the time embedding added between them."""

    def __init__(self, inputs: int, outputs: int, embedding: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, inputs, eps=1e-5)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, outputs)
        self.norm2 = nn.GroupNorm(norm_groups, outputs, eps=1e-5)
        self.conv2 = ZeroConv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding_ME: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(embedding_ME))[:, :, None, None]
        y: Tensor = self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))
        return y


class SpatialAttention(nn.Module):
    """Self-attention over the positions of an image."""

    def __init__(self, channels: int, head_channels: int | None, norm_groups: int) -> None:
        super().__init__()
        self.heads = channels // (head_channels or channels)
        self.group_norm = nn.GroupNorm(norm_groups, channels, eps=1e-5)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([ZeroLinear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h_MNC = self.group_norm(x).flatten(2).transpose(1, 2)
        projections = (layer(h_MNC) for layer in (self.to_q, self.to_k, self.to_v))
        q, k, v = (rows.unflatten(2, (self.heads, -1)).transpose(1, 2) for rows in projections)
        attended_MNC = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y: Tensor = x + self.to_out[0](attended_MNC).transpose(1, 2).unflatten(2, x.shape[2:])
        return y


class Resample(nn.Module):
    """Halves the resolution by a strided convolution, or doubles it by nearest neighbours and a
    convolution."""

    def __init__(self, channels: int, direction: Literal["down", "up"]) -> None:
        super().__init__()
        self.up = direction == "up"
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if self.up else 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else x)
        return y
