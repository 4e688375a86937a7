"""Layers of the diffusion U-Net, named like diffusers' so that state dicts are interchangeable.

M samples, C channels, E time-embedding width, N = H * W positions.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
