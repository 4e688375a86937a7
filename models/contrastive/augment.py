"""Random views of images (Chen et al. 2020, SimCLR, appendix A): crops, rotations, colours, noise,
each drawn from the sample's key alone.

M samples, images (C, H, W) in [-1, 1].
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.random import derive, normal, uniform

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Ranges and probabilities of the random changes that make a view of an image."""

    crop: tuple[float, float] = (0.3, 1.0)
    """Smallest and largest share of the area that is cut out and scaled to full size."""
    ratio: float = 4 / 3
    """Largest ratio of width to height, and of height to width, of the crop."""
    rotate: float = 0.0
    """Largest rotation in degrees, to either side."""
    flip: bool = False
    """Mirror left to right with probability 1/2."""
    brightness: float = 0.4
    """Largest change of brightness, as a share."""
    contrast: float = 0.4
    """Largest change of contrast, as a share of each value's distance from the image's mean."""
    saturation: float = 0.4
    """Largest change of saturation, as a share of each pixel's distance from grey; no effect on
    grey images."""
    grey: float = 0.2
    """Probability that a view loses all colour."""
    noise: float = 0.0
    """Standard deviation of the Gaussian noise added to each value, where black to white is 2."""

    def __post_init__(self) -> None:
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(
                f"augment.crop is {list(self.crop)}; "
                "give two shares of the area, ascending, above 0 and at most 1, such as [0.3, 1.0]"
            )
        if self.ratio < 1:
            raise ValueError(f"augment.ratio is {self.ratio}, which must be at least 1")
        for name in ("brightness", "contrast", "saturation", "grey"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} is {getattr(self, name)}; it must be between 0 and 1")
        if min(self.noise, self.rotate) < 0:
            raise ValueError(f"augment: noise {self.noise} and rotate {self.rotate} must be at least 0")


def augment(config: AugmentConfig, x: Tensor, keys_M: Tensor) -> Tensor:
    """Draw one view of each image: (M, C, H, W) -> the same shape, in [-1, 1] except for the noise.
    `keys_M` are the samples' random keys."""
    x = _colours(config, _cut(config, x, keys_M), keys_M)
    return x + config.noise * normal(derive(keys_M, "noise"), x.shape[1:]) if config.noise else x


def _cut(config: AugmentConfig, x: Tensor, keys_M: Tensor) -> Tensor:
    """Crop, rotate and mirror each image, and scale it to full size; edge values continue beyond
    the edges."""
    area_M, ratio_M, turn_M, flip_M, row_M, column_M = uniform(derive(keys_M, "crop"), (6,)).unbind(1)
    area_M = config.crop[0] + (config.crop[1] - config.crop[0]) * area_M
    ratio_M = torch.exp((2 * ratio_M - 1) * math.log(config.ratio))
    width_M = (area_M * ratio_M).sqrt().clamp(max=1)
    height_M = (area_M / ratio_M).sqrt().clamp(max=1)
    angle_M = (2 * turn_M - 1) * math.radians(config.rotate)
    side_M = torch.where(flip_M < 0.5, -1.0, 1.0) if config.flip else torch.ones_like(flip_M)
    across = torch.stack(
        [side_M * width_M * angle_M.cos(), -width_M * angle_M.sin(), (2 * column_M - 1) * (1 - width_M)], dim=1
    )
    down = torch.stack(
        [side_M * height_M * angle_M.sin(), height_M * angle_M.cos(), (2 * row_M - 1) * (1 - height_M)], dim=1
    )
    grid = F.affine_grid(torch.stack([across, down], dim=1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid.to(x), mode="bilinear", padding_mode="border", align_corners=False)


def _colours(config: AugmentConfig, x: Tensor, keys_M: Tensor) -> Tensor:
    """Change brightness, contrast and saturation, and perhaps remove all colour, in this order, on
    [0, 1]."""
    brightness, contrast, saturation, grey = uniform(derive(keys_M, "colour"), (4,)).view(-1, 4, 1, 1, 1).unbind(1)
    x = ((x + 1) / 2 * (1 + config.brightness * (2 * brightness - 1))).clamp(0, 1)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = (mean + (x - mean) * (1 + config.contrast * (2 * contrast - 1))).clamp(0, 1)
    if x.shape[1] == 3:
        colourless = (x * x.new_tensor(_GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)
        x = (colourless + (x - colourless) * (1 + config.saturation * (2 * saturation - 1))).clamp(0, 1)
        x = torch.where(grey < config.grey, colourless, x)
    return 2 * x - 1
