"""Exponential moving average of the weights, kept on the fragments that this rank holds: no gather while training, at any ZeRO stage."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from trainer.checkpoint.fragments import Fragment
from trainer.core.protocols import Engine


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """The average that samples and measures are made with (Polyak & Juditsky 1992; Ho et al. 2020, appendix B)."""

    decay: float = 0.999
    """Share of the average that a step leaves; at step s no more than (1 + s) / (10 + s), so that the start is soon forgotten."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}; it must be at least 0 and below 1, such as 0.999")


class Ema:
    """The moving averages of this rank's weights; empty, and doing nothing, where `config` is None."""

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
        """Move the averages towards the weights, once after each step; `step` counts the one just done."""
        decay = min(self.decay, (1 + step) / (10 + step))
        if self.weights:
            averages = [fragment.values for fragment in self.fragments]
            torch._foreach_lerp_(averages, [fragment.values for fragment in self.weights], 1 - decay)

    def restart(self) -> None:
        """The averages begin at the weights as they are now."""
        for average, weight in zip(self.fragments, self.weights, strict=True):
            average.values.copy_(weight.values)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The networks with the averages as their weights, for a `with` block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for average, weight in zip(self.fragments, self.weights, strict=True):
            kept = weight.values.clone()
            weight.values.copy_(average.values)
            average.values.copy_(kept)
        for engine in self.engines.values():
            engine.refresh()
