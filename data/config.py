"""What the configs of text and images have in common: where data comes from, and how it is dealt out."""

from dataclasses import dataclass
from typing import Literal

from data.sources import Source


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Which data a run trains on, dealt out in lanes."""

    source: Source
    """What is trained on."""
    eval_source: Source | None = None
    """What is held out; None: a share of `source` is kept apart."""
    key_column: str | None = None
    """What tells samples apart when some are held out; None: the sample itself, as it is stored (`key` for python_stdlib)."""
    held_out: float = 0.02
    """Share of the source kept for evaluation, by a hash of the key; unused with `eval_source`."""
    max_eval_samples: int | None = None
    """Evaluate on the first so many held-out samples; None: on all, which reads the whole source."""
    lanes: int | None = None
    """Deterministic streams that the run is dealt from: a multiple of every number of workers it may ever have. None: 8, or more where 8 does not divide."""
    window: int = 1024
    """Documents or images shuffled together in a lane."""
    prefetch: int = 8
    """Steps made ready in the background; 0: none."""
    processes: int = 0
    """Processes of a worker that read and decode ahead, its lanes divided among them; 0: a thread of the worker does it."""
    retry_seconds: float = 300.0
    """How long a source that does not answer is tried again before it counts as unreadable."""
    on_unreadable: Literal["fail", "skip"] = "fail"
    """What cannot be read ends the run, with its name; or that image, or the rest of that shard, is left out, counted and logged."""

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("prefetch", 0), ("processes", 0), ("retry_seconds", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} = {getattr(self, name)} is less than {least}; set it to {least} or more")
        self._check_positive("lanes", "max_eval_samples")
        if not 0.0 <= self.held_out < 1.0:
            usual = type(self).held_out
            raise ValueError(f"data.held_out = {self.held_out} is not a share from 0 up to (not including) 1; the usual one is {usual}")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"data.{name} = {value} is less than 1; leave it out or set it to 1 or more")

    @property
    def training_held_out(self) -> float:
        """The share of `source` that is not trained on."""
        return 0.0 if self.eval_source else self.held_out
