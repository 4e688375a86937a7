"""Training data of the image objectives, and pictures of samples.

`ImageData` holds the images of a data set; `PointData` holds points of a toy distribution whose
density is known. Both have the same methods.

Legend: M samples, C channels, H height, W width, K modes, D dimensions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from data.config import ImageConfig
from data.images.records import image_shape
from data.share import Batch, RunState, Share
from data.training_stream import ImageStream
from models.quality.mixtures import GaussianMixture, grid, ring
from models.random import normal, sample_keys, uniform
from trainer.core.protocols import Stream
from trainer.objectives.config import ObjectiveConfig, resolved_data
from trainer.objectives.made import MadeStream, made_held_out


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """A square grid of Gaussians; by default the 25 of PacGAN (Lin et al. 2018, section 4.1)."""

    name: Literal["gaussian_grid"] = "gaussian_grid"
    """Selects this data."""
    side: int = 5
    """Number of modes along each side of the grid."""
    spacing: float = 2.0
    """Distance between neighbouring modes."""
    std: float = 0.05
    """Standard deviation of a mode."""
    held_out: int = 2500
    """Held-out samples."""


@dataclass(frozen=True, kw_only=True)
class RingConfig:
    """Gaussians spaced evenly on a circle; by default PacGAN's 2D-ring."""

    name: Literal["gaussian_ring"] = "gaussian_ring"
    """Selects this data."""
    modes: int = 8
    """Number of Gaussians on the circle."""
    radius: float = 1.0
    """Radius of the circle."""
    std: float = 0.01
    """Standard deviation of a mode."""
    held_out: int = 2500
    """Held-out samples."""


ToyConfig = GridConfig | RingConfig


@dataclass(frozen=True, kw_only=True)
class ImageModelConfig(ObjectiveConfig):
    """Base of the image objectives' configs."""

    data: ImageConfig | ToyConfig
    """The images, or points of a toy distribution."""

    @property
    def stored_data(self) -> ImageConfig | None:
        return self.data if isinstance(self.data, ImageConfig) else None

    @property
    def dataset(self) -> str:
        return self.data.source.name if isinstance(self.data, ImageConfig) else self.data.name

    def resolved(self, workers: int, resume: bool) -> Self:
        data = self.stored_data
        return self if data is None else replace(self, data=resolved_data(data, workers))


class ImageData:
    """Images of a data set, in [-1, 1] for the networks."""

    def __init__(self, config: ImageConfig, seed: int):
        self.config = config
        self.seed = seed
        self.shape: tuple[int, ...] = image_shape(config)
        self.classes = config.classes

    def stream(self, share: Share, state: RunState | None) -> Stream:
        """This rank's part of the training data."""
        return ImageStream(self.config, share, seed=self.seed, state=state or None)

    def held_out(self, share: Share) -> list[Batch]:
        """This rank's part of the held-out images."""
        from data.images.held_out import held_out_images

        return held_out_images(self.config, rank=share.rank, world=share.world, micro_batch=share.micro_batch)

    def values(self, batch: Batch) -> Tensor:
        """The batch's images (M, C, H, W) in [-1, 1], in float32 or better."""
        image_MCHW = batch["image"]
        return image_MCHW.to(torch.promote_types(image_MCHW.dtype, torch.float32)) / 127.5 - 1

    def manifest(self) -> Mapping[str, object]:
        from data.manifest import manifest

        return dict(manifest(self.config, seed=self.seed, lanes=self.config.lanes))


class PointData:
    """Points drawn from a mixture of Gaussians; a point depends on (seed, sample number) alone."""

    def __init__(self, config: ToyConfig, seed: int):
        self.config = config
        self.seed = seed
        self.mixture = build_mixture(config)
        self.shape: tuple[int, ...] = tuple(self.mixture.means_KD.shape[1:])
        self.classes = None

    def stream(self, share: Share, state: RunState | None) -> Stream:
        return MadeStream(self.batch, share, state)

    def held_out(self, share: Share) -> list[Batch]:
        return made_held_out(self.batch, self.config.held_out, share)

    def batch(self, number_M: Tensor, split: str) -> Batch:
        """The samples numbered `number_M`."""
        keys_M = sample_keys(self.seed, number_M, "points", split)
        point_MD = self.mixture.sample(uniform(keys_M), normal(keys_M, self.shape))
        return {"image": point_MD, "label": torch.zeros_like(number_M), "sample": number_M}

    def values(self, batch: Batch) -> Tensor:
        """The batch's points (M, D), in float32."""
        return batch["image"]

    def manifest(self) -> Mapping[str, object]:
        return {"source": [], "name": self.config.name, "seed": self.seed, "digest": str(self.config)}


def build_data(config: ImageConfig | ToyConfig, seed: int) -> ImageData | PointData:
    """Opens the images, or makes the points, that `config` describes."""
    return ImageData(config, seed) if isinstance(config, ImageConfig) else PointData(config, seed)


def build_mixture(config: ToyConfig) -> GaussianMixture:
    """The distribution of the toy data."""
    match config:
        case GridConfig(side=side, spacing=spacing, std=std):
            return grid(side, spacing, std)
        case RingConfig(modes=modes, radius=radius, std=std):
            return ring(modes, radius, std)


def grid_of(images_MCHW: Tensor, columns: int, tile: int = 48) -> Tensor:
    """Arranges images in [-1, 1] as one picture (3, H, W) in [0, 1].

    An image is about `tile` pixels high, and thin lines separate the images.
    """
    scale = max(1, tile // images_MCHW.shape[-2])
    images = ((images_MCHW.detach().float().cpu() + 1) / 2).clamp(0, 1)
    images = images.repeat_interleave(scale, -2).repeat_interleave(scale, -1).expand(-1, 3, -1, -1)
    images = torch.nn.functional.pad(images, (1, 1, 1, 1), value=0.35)
    missing = -len(images) % columns
    images = torch.cat([images, images.new_full((missing, *images.shape[1:]), 0.35)])
    rows = images.unflatten(0, (-1, columns))
    return torch.cat([torch.cat(list(row), dim=-1) for row in rows], dim=-2)


def cloud_of(points_MD: Tensor, mixture: GaussianMixture, side: int = 400) -> Tensor:
    """Draws points in the plane as one picture (3, H, W) in [0, 1].

    A pixel is darker the more points it has; the centres of the modes are red.
    """
    reach = 1.3 * mixture.means_KD.abs().max()
    picture = torch.ones(3, side, side)

    def to_pixels(xy: Tensor) -> tuple[Tensor, Tensor]:
        pixel = ((xy.cpu() / reach + 1) / 2 * (side - 1)).round().long().clamp(0, side - 1)
        return side - 1 - pixel[:, 1], pixel[:, 0]

    ones_M = torch.ones(len(points_MD))
    counts = torch.zeros(side, side).index_put_(to_pixels(points_MD.detach()), ones_M, accumulate=True)
    picture *= (-counts.sqrt()).exp()
    row, column = to_pixels(mixture.means_KD)
    red = torch.tensor([0.9, 0.1, 0.1])[:, None]
    for dy, dx in ((0, -4), (0, 4), (-4, 0), (4, 0)):
        picture[:, (row + dy).clamp(0, side - 1), (column + dx).clamp(0, side - 1)] = red
    return picture
