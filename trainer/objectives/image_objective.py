"""What the image objectives have in common: their data, and the measures of their samples."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data.images import ImageConfig
from data.steps import Batch, RunState, Share
from trainer.core.protocols import Gather, GatherRows, Stream, Sums
from trainer.objectives.image_data import Images, Points, ToyConfig, build_data
from trainer.objectives.quality import QualityConfig, image_quality, point_quality, quality_alarms


class ImageObjective:
    """What objectives share whose one sample is one image, or point of toy data. Subclasses say what is minimised."""

    phases: tuple[str, ...] = ("model",)
    averaged: tuple[str, ...] = ("model",)
    rates: Mapping[str, float] = {"model": 1.0}
    networks: dict[str, nn.Module]
    tokens_per_sample = 0
    flops_per_sample = 0.0

    def __init__(self, data: ImageConfig | ToyConfig, group: int, seed: int):
        self.data: Images | Points = build_data(data, seed)
        self.seed, self.group = seed, group

    @property
    def device(self) -> torch.device:
        return next(next(iter(self.networks.values())).parameters()).device

    def stream(self, share: Share, state: RunState | None) -> Stream:
        return self.data.stream(share, state)

    def held_out(self, share: Share) -> Iterable[Batch]:
        return self.data.held_out(share)

    def weight(self, phase: str, batch: Batch) -> Tensor:
        return torch.tensor(len(batch["sample"]), dtype=torch.float64)

    def is_due(self, phase: str, step: int) -> bool:
        return True

    def prepare(self, phase: str, net: nn.Module, batches: Sequence[Batch], rows: GatherRows) -> Sequence[Batch]:
        return batches

    def after_step(self, sums: Sums, add_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Nothing: all changes by gradients here."""

    def alarms(self, quality: Mapping[str, float]) -> list[str]:
        return []

    def baselines(self) -> dict[str, float]:
        return {}

    def manifest(self) -> dict[str, Any]:
        return self.data.manifest()


class GenerativeObjective(ImageObjective, ABC):
    """Those that make images, whose samples are measured."""

    def __init__(self, data: ImageConfig | ToyConfig, quality: QualityConfig | None, group: int, seed: int):
        super().__init__(data, group, seed)
        self.measures = quality

    @abstractmethod
    def draw(self, keys_M: Tensor, labels_M: Tensor) -> Tensor:
        """A sample for each key, images in [-1, 1]."""

    def quality(self, nets: Mapping[str, nn.Module], share: Share, gather: Gather) -> dict[str, float]:
        if self.measures is None:
            return {}
        if isinstance(self.data, Images):
            return image_quality(self.measures, self.data, self.draw, self.seed, share, gather, self.device)
        return point_quality(self.measures, self.data, self.draw, self.seed, share, gather, self.device)

    def alarms(self, quality: Mapping[str, float]) -> list[str]:
        return quality_alarms(self.measures, quality)
