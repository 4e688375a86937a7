"""The base class of objectives: the answers of an objective that needs nothing special.

A new objective derives from it and writes the rest of the protocol.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from data.share import Batch, Share
from trainer.core.protocols import Gather, GatherRows, Objective, SampleSet, Sums


class BaseObjective(Objective):
    """An objective with one network, "model", updated in every step; each sample has weight 1."""

    phases: tuple[str, ...] = ("model",)
    averaged: tuple[str, ...] = ("model",)
    rates: Mapping[str, float] = {"model": 1.0}
    tokens_per_sample: int = 0
    flops_per_sample: float = 0.0
    group: int = 1

    @property
    def frozen_bytes(self) -> int:
        return 0

    @property
    def frozen_flops_per_sample(self) -> float:
        return 0.0

    def weight(self, phase: str, batch: Batch) -> Tensor:
        return torch.tensor(len(batch["sample"]), dtype=torch.float64)

    def is_due(self, phase: str, step: int) -> bool:
        return True

    def prepare(self, phase: str, net: nn.Module, batches: Sequence[Batch], rows: GatherRows) -> Sequence[Batch]:
        return batches

    def after_step(self, sums: Sums, add_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Changes nothing: everything is learned by gradients."""

    def quality(self, nets: Mapping[str, nn.Module], share: Share, gather: Gather) -> dict[str, float]:
        return {}

    def alarms(self, quality: Mapping[str, float]) -> list[str]:
        return []

    def sample(self, nets: Mapping[str, nn.Module], n: int, generator: torch.Generator) -> SampleSet:
        return SampleSet()

    def baselines(self) -> dict[str, float]:
        return {}
