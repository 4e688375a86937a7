"""The U-Net of DDPM (Ho et al. 2020, appendix B), built and named like diffusers' `UNet2DModel`:
their state dicts are interchangeable.

M samples, E time-embedding width. The network predicts noise, x0 or v at (x_t, t), and is the same
for all three.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.unet_layers import Resample, ResidualBlock, SpatialAttention, TimeEmbedding, ZeroConv2d, timestep_embedding


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
