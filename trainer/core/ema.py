"""Exponential moving average of the weights.

It is kept on the fragments that this rank holds, so training needs no gather at any ZeRO stage.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from trainer.checkpoint.fragments import Fragment
from trainer.core.protocols import Engine


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """A moving average of the weights, used for samples and evaluation.

    Polyak & Juditsky 1992; Ho et al. 2020, appendix B.
    """

    decay: float = 0.999
    """Share of the average that each step keeps; at step s at most (1 + s) / (10 + s), so that the
    initial weights are soon forgotten."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}; it must be at least 0 and below 1, such as 0.999")


class Ema:
    """The moving averages of this rank's weights; if `config` is None, empty and without effect."""

    def __init__(self, config: EmaConfig | None, engines: Mapping[str, Engine], networks: Sequence[str]):
        self.engines = {name: engines[name] for name in networks} if config else {}
        self.decay = config.decay if config else 0.0
        fragments = [fragment.named(name) for name, engine in self.engines.items() for fragment in engine.fragments()]
        self.weights = [fragment for fragment in fragments if fragment.kind == "weight"]
        self.fragments: list[Fragment] = [
            replace(fragment, kind="ema", values=fragment.values.clone()) for fragment in self.weights
        ]
        """The averages, in the layout of the weights."""

    def update(self, step: int) -> None:
        """Move the averages towards the weights, after each step; `step` is the one just done."""
        decay = min(self.decay, (1 + step) / (10 + step))
        if self.weights:
            averages = [fragment.values for fragment in self.fragments]
            torch._foreach_lerp_(averages, [fragment.values for fragment in self.weights], 1 - decay)

    def restart(self) -> None:
        """Set the averages to the current weights."""
        for average, weight in zip(self.fragments, self.weights, strict=True):
            average.values.copy_(weight.values)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the networks the averages as their weights, for a `with` block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for average, weight in zip(self.fragments, self.weights, strict=True):
            weights = weight.values.clone()
            weight.values.copy_(average.values)
            average.values.copy_(weights)
        for engine in self.engines.values():
            engine.refresh()
