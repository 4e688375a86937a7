"""Base classes of the image objectives: they read the data and measure generated samples."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from data.config import ImageConfig
from data.share import Batch, RunState, Share
from trainer.core.protocols import Gather, Stream
from trainer.objectives.base import BaseObjective
from trainer.objectives.images.data import ImageData, PointData, ToyConfig, build_data
from trainer.objectives.images.quality import QualityConfig, image_quality, point_quality, quality_alarms


class ImageObjective(BaseObjective):
    """Base of the objectives whose sample is an image, or a point of toy data.

    It serves the data; subclasses define the networks and the loss.
    """

    def __init__(self, data: ImageConfig | ToyConfig, group: int, seed: int):
        self.data: ImageData | PointData = build_data(data, seed)
        self.seed = seed
        self.group = group

    @property
    def device(self) -> torch.device:
        return next(next(iter(self.networks.values())).parameters()).device

    def stream(self, share: Share, state: RunState | None) -> Stream:
        return self.data.stream(share, state)

    def held_out(self, share: Share) -> Iterable[Batch]:
        return self.data.held_out(share)

    def manifest(self) -> Mapping[str, object]:
        return self.data.manifest()


class GenerativeObjective(ImageObjective, ABC):
    """Base of the image generators, whose samples are scored."""

    def __init__(self, data: ImageConfig | ToyConfig, quality: QualityConfig | None, group: int, seed: int):
        super().__init__(data, group, seed)
        self.measures = quality

    @abstractmethod
    def draw_samples(self, keys_M: Tensor, labels_M: Tensor) -> Tensor:
        """Generates one sample per key and label; images are in [-1, 1]."""

    def quality(self, nets: Mapping[str, nn.Module], share: Share, gather: Gather) -> dict[str, float]:
        if self.measures is None:
            return {}
        if isinstance(self.data, ImageData):
            return image_quality(self.measures, self.data, self.draw_samples, self.seed, share, gather, self.device)
        return point_quality(self.measures, self.data, self.draw_samples, self.seed, share, gather, self.device)

    def alarms(self, quality: Mapping[str, float]) -> list[str]:
        return quality_alarms(self.measures, quality)
