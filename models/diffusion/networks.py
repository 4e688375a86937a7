"""Networks that a diffusion job can name: the U-Net for images, and a residual MLP for vectors (toy
data).

All map (x_t, t (M,), labels (M,) or None) to a prediction with `output_multiple` times the channels
of x_t. M samples, E embedding width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.diffusion.unet import UNet, UNetConfig, ZeroLinear, timestep_embedding
from models.layers import mlp


@dataclass(frozen=True, kw_only=True)
class MLPDenoiserConfig:
    """A residual MLP with a time embedding, for samples of shape (D,)."""

    name: Literal["mlp"] = "mlp"
    """Selects this network."""
    hidden: int = 128
    """Width of the residual stream."""
    blocks: int = 3
    """Number of residual blocks."""


DiffusionNetworkConfig = UNetConfig | MLPDenoiserConfig


class MLPBlock(nn.Module):
    """One residual block, shifted by the embedding of time and class."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.linear_1 = nn.Linear(hidden, hidden)
        self.embedding = nn.Linear(hidden, hidden)
        self.linear_2 = ZeroLinear(hidden, hidden)

    def forward(self, h: Tensor, embedding_ME: Tensor) -> Tensor:
        y: Tensor = h + self.linear_2(F.silu(self.linear_1(self.norm(h)) + self.embedding(embedding_ME)))
        return y


class MLPDenoiser(nn.Module):
    """A residual MLP that predicts from (x_t, t, labels). With `num_classes`, label `num_classes`
    is the null label of classifier-free guidance."""

    def __init__(self, config: MLPDenoiserConfig, inputs: int, outputs: int, num_classes: int | None = None) -> None:
        super().__init__()
        self.hidden = config.hidden
        self.null_label = num_classes
        self.time_embedding = mlp((config.hidden, config.hidden, config.hidden))
        self.class_embedding = nn.Embedding(num_classes + 1, config.hidden) if num_classes is not None else None
        self.input = nn.Linear(inputs, config.hidden)
        self.blocks = nn.ModuleList([MLPBlock(config.hidden) for _ in range(config.blocks)])
        self.norm = nn.LayerNorm(config.hidden)
        self.output = ZeroLinear(config.hidden, outputs)

    def forward(self, x: Tensor, t_M: Tensor, labels_M: Tensor | None = None) -> Tensor:
        """Return the prediction for x_t of shape (M, D). Without labels, a class-conditional
        network uses the null label."""
        embedding_ME = self.time_embedding(timestep_embedding(t_M, self.hidden).to(x.dtype))
        if self.class_embedding is not None and self.null_label is not None:
            labels_M = torch.full_like(t_M, self.null_label) if labels_M is None else labels_M
            embedding_ME = embedding_ME + self.class_embedding(labels_M)
        h = self.input(x)
        for block in self.blocks:
            h = block(h, embedding_ME)
        y: Tensor = self.output(self.norm(h))
        return y


def build_diffusion_network(
    config: DiffusionNetworkConfig, shape: Sequence[int], output_multiple: int = 1, num_classes: int | None = None
) -> UNet | MLPDenoiser:
    """Build the network that `config` names, for samples of `shape`, (C, H, W) or (D,).

    Raises ValueError if the network does not accept samples of that shape.
    """
    outputs = shape[0] * output_multiple
    match config:
        case UNetConfig():
            if len(shape) != 3:
                raise ValueError(
                    f"network unet accepts images of shape (C, H, W), but the samples have shape {tuple(shape)}; "
                    "choose network mlp"
                )
            return UNet(config, shape[0], outputs, num_classes)
        case MLPDenoiserConfig():
            if len(shape) != 1:
                raise ValueError(
                    f"network mlp accepts vectors of shape (D,), but the samples have shape {tuple(shape)}; "
                    "choose network unet"
                )
            return MLPDenoiser(config, shape[0], outputs, num_classes)
