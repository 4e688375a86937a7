"""The config that text and images share: where the data come from, and how they are dealt out."""

from dataclasses import dataclass
from typing import Literal

from data.sources import Source


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """The data that a run trains on, dealt out in lanes."""

    source: Source
    """Training data."""
    eval_source: Source | None = None
    """Evaluation data. null: a share of `source` is held out."""
    key_column: str | None = None
    """Column whose hash decides which samples are held out.
    null: the sample itself (`key` for python_stdlib)."""
    held_out: float = 0.02
    """Share of `source` held out for evaluation by a hash of the key; unused with `eval_source`."""
    max_eval_samples: int | None = None
    """Number of held-out samples to evaluate on. null: all, which reads the whole source."""
    lanes: int | None = None
    """Number of deterministic streams that serve the run, a multiple of every number of workers.
    null: 8, or a multiple of 8."""
    window: int = 1024
    """Number of documents or images that are shuffled together in a lane."""
    prefetch: int = 8
    """Number of steps prepared in the background. 0: none."""
    processes: int = 0
    """Number of processes per worker that read and decode ahead. 0: a thread does it."""
    retry_seconds: float = 300.0
    """How long to retry a source that does not answer before it counts as unreadable."""
    on_unreadable: Literal["fail", "skip"] = "fail"
    """fail: the run ends and names what is unreadable, an image or a shard.
    skip: it is left out, counted and logged."""

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("prefetch", 0), ("processes", 0), ("retry_seconds", 0)):
            self._check_least(name, least)
        self._check_positive("lanes", "max_eval_samples")
        if not 0.0 <= self.held_out < 1.0:
            fix = f"use at least 0 and less than 1, such as {type(self).held_out}"
            raise ValueError(f"run.objective.data.held_out: {self.held_out} is not a share; {fix}")

    def _check_least(self, name: str, least: float) -> None:
        value = getattr(self, name)
        if value < least:
            raise ValueError(f"run.objective.data.{name}: {value} is less than {least}; use {least} or more")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                self._check_least(name, 1)

    @property
    def training_held_out(self) -> float:
        """The share of `source` that is kept out of training."""
        return 0.0 if self.eval_source else self.held_out
