"""Fits a line through noisy points, by least squares."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from data.share import Batch, RunState, Share
from models.random import derive, normal, sample_keys
from trainer.core.protocols import SampleSet, Stream, Sums
from trainer.objectives.base import BaseObjective
from trainer.objectives.config import ObjectiveConfig
from trainer.objectives.made import MadeStream, made_held_out


@dataclass(frozen=True, kw_only=True)
class LineConfig(ObjectiveConfig):
    """Least squares on points around a line."""

    name: Literal["line"] = "line"
    slope: float = 3.0
    """Slope of the line that the points lie around."""
    noise: float = 0.1
    """Standard deviation of the points' distance from the line."""


class LineObjective(BaseObjective):
    """One linear layer, trained on points that are drawn while training."""

    def __init__(self, config: LineConfig, seed: int):
        self.config = config
        self.seed = seed
        self.model = nn.Linear(1, 1)
        self.networks = {"model": self.model}

    def stream(self, share: Share, state: RunState | None) -> Stream:
        return MadeStream(self._points, share, state)

    def held_out(self, share: Share) -> Iterable[Batch]:
        return made_held_out(self._points, 64, share)

    def manifest(self) -> Mapping[str, object]:
        return {"source": [], "name": "line", "seed": self.seed, "digest": str(self.config)}

    def _points(self, number_M: Tensor, split: str) -> Batch:
        keys_M = sample_keys(self.seed, number_M, "points", split)
        x_M1 = normal(derive(keys_M, "x"), (1,))
        noise_M1 = normal(derive(keys_M, "noise"), (1,))
        return {"x": x_M1, "y": self.config.slope * x_M1 + self.config.noise * noise_M1, "sample": number_M}

    def loss(self, phase: str, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Sums]:
        loss = (net(batch["x"]) - batch["y"]).square().sum()
        return loss, {"loss": loss.detach().double(), "samples": loss.new_tensor(len(batch["x"])).double()}

    @torch.no_grad()
    def evaluate(self, nets: Mapping[str, nn.Module], batch: Batch) -> Sums:
        error_M = (nets["model"](batch["x"]) - batch["y"]).square().sum(1)
        return {"loss": error_M[batch["mask"]].sum().double(), "samples": batch["mask"].sum().double()}

    def report(self, sums: Sums) -> dict[str, float]:
        return {"loss": (sums["loss"] / sums["samples"]).item()}

    def sample(self, nets: Mapping[str, nn.Module], n: int, generator: torch.Generator) -> SampleSet:
        return SampleSet(text={"line": f"y = {self.model.weight.item():.0f} x"})
