"""What the image objectives train on: images, or points of a toy distribution whose density is known, behind one face.

M samples; images are (C, H, W), points (D,).
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
    """Modes along each side."""
    spacing: float = 2.0
    """Distance between neighbours."""
    std: float = 0.05
    """Standard deviation of a mode."""
    held_out: int = 2500
    """Held-out samples."""


@dataclass(frozen=True, kw_only=True)
class RingConfig:
    """Gaussians evenly on a circle; by default PacGAN's 2D-ring."""

    name: Literal["gaussian_ring"] = "gaussian_ring"
    """Selects this data."""
    modes: int = 8
    """Number of Gaussians."""
    radius: float = 1.0
    """Of the circle."""
    std: float = 0.01
    """Standard deviation of a mode."""
    held_out: int = 2500
    """Held-out samples."""


ToyConfig = GridConfig | RingConfig


@dataclass(frozen=True, kw_only=True)
class ImageModelConfig(ObjectiveConfig):
    """The base of the image objectives."""

    data: ImageConfig | ToyConfig

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
    """Images of a data set, as networks take them: in [-1, 1]."""

    def __init__(self, config: ImageConfig, seed: int):
        self.config, self.seed = config, seed
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
        """(M, C, H, W) in [-1, 1], float32 at least."""
        return batch["image"].to(torch.promote_types(batch["image"].dtype, torch.float32)) / 127.5 - 1

    def manifest(self) -> Mapping[str, object]:
        from data.manifest import manifest

        return dict(manifest(self.config, seed=self.seed, lanes=self.config.lanes))


class PointData:
    """Samples of a mixture of Gaussians, each a function of (seed, its number)."""

    def __init__(self, config: ToyConfig, seed: int):
        self.config, self.seed = config, seed
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
        """Float32 (M, D)."""
        return batch["image"]

    def manifest(self) -> Mapping[str, object]:
        return {"source": [], "name": self.config.name, "seed": self.seed, "digest": str(self.config)}


def build_data(config: ImageConfig | ToyConfig, seed: int) -> ImageData | PointData:
    """The data that `config` names."""
    return ImageData(config, seed) if isinstance(config, ImageConfig) else PointData(config, seed)


def build_mixture(config: ToyConfig) -> GaussianMixture:
    """The distribution of toy data."""
    match config:
        case GridConfig(side=side, spacing=spacing, std=std):
            return grid(side, spacing, std)
        case RingConfig(modes=modes, radius=radius, std=std):
            return ring(modes, radius, std)


def grid_of(images_MCHW: Tensor, columns: int, tile: int = 48) -> Tensor:
    """Images in [-1, 1] as one picture (3, H, W) in [0, 1], each about `tile` pixels high, a thin line between them."""
    scale = max(1, tile // images_MCHW.shape[-2])
    images = (
        ((images_MCHW.detach().float().cpu() + 1) / 2)
        .clamp(0, 1)
        .repeat_interleave(scale, -2)
        .repeat_interleave(scale, -1)
    )
    images = images.expand(-1, 3, -1, -1)
    images = torch.nn.functional.pad(images, (1, 1, 1, 1), value=0.35)
    missing = -len(images) % columns
    images = torch.cat([images, images.new_full((missing, *images.shape[1:]), 0.35)])
    rows = images.unflatten(0, (-1, columns))
    return torch.cat([torch.cat(list(row), dim=-1) for row in rows], dim=-2)


def cloud_of(points_MD: Tensor, mixture: GaussianMixture, side: int = 400) -> Tensor:
    """Points in the plane as one picture (3, H, W) in [0, 1]: how many fell where, with the centres of the modes in red."""
    reach = 1.3 * mixture.means_KD.abs().max()
    picture = torch.ones(3, side, side)

    def place(xy: Tensor) -> tuple[Tensor, Tensor]:
        pixel = ((xy.cpu() / reach + 1) / 2 * (side - 1)).round().long().clamp(0, side - 1)
        return side - 1 - pixel[:, 1], pixel[:, 0]

    counts = torch.zeros(side, side).index_put_(place(points_MD.detach()), torch.ones(len(points_MD)), accumulate=True)
    picture *= (-counts.sqrt()).exp()
    row, column = place(mixture.means_KD)
    for dy, dx in ((0, -4), (0, 4), (-4, 0), (4, 0)):
        picture[:, (row + dy).clamp(0, side - 1), (column + dx).clamp(0, side - 1)] = torch.tensor([0.9, 0.1, 0.1])[
            :, None
        ]
    return picture
