"""The state of a training, which the loop writes and the hooks read, and the hooks' own type."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.share import Batch, RunState
from trainer.checkpoint.fragments import Fragment
from trainer.core.anomaly import Guard
from trainer.core.ema import Ema
from trainer.core.protocols import Engine, Objective, Sums
from trainer.endings import Stopped
from trainer.run_rows import Spent
from trainer.world import World


@dataclass
class Progress:
    """How far the run is: written by the loop, and restored from the checkpoint on resuming."""

    step: int = 0
    """Number of optimiser steps done."""
    samples: int = 0
    """Number of samples that all ranks have seen."""
    replay_until: int = 0
    """Steps up to this one are replays.

    An earlier attempt, or this one before a rollback, has already done them.
    """
    must_roll_back: bool = False
    """Whether to roll back to the newest checkpoint before the next step."""
    last_progress: float = field(default_factory=time.perf_counter)
    """When this rank last made progress, as time.perf_counter()."""


@dataclass
class Training:
    """The state of a run in this process. The loop writes it; hooks read it."""

    objective: Objective
    engines: Mapping[str, Engine]
    world: World
    learning_rate: Callable[[str, int], float]
    """The learning rate of a phase at a step (from 0)."""
    ema: Ema
    """The moving average of the weights; empty if the job asks for none."""
    guard: Guard
    """Decides which losses and gradients are learned from."""
    progress: Progress = field(default_factory=Progress)
    sums: Sums = field(default_factory=dict)
    """This rank's metrics since they were last reported."""
    norms: dict[str, Tensor | float] = field(default_factory=dict)
    """Gradient norm of each phase in its last update."""
    data_state: RunState | None = None
    """State of the data stream after the last step; None before the first step."""
    seconds: dict[Spent, float] = field(default_factory=dict)
    """Wall-clock seconds of this attempt, by purpose: see trainer/records/goodput.py."""
    wants_stop: Stopped | None = None
    """Why this rank asks to stop; None if it does not."""
    stopped: Stopped | None = None
    """Why all ranks stop, once they have agreed to; None before."""

    @property
    def step(self) -> int:
        return self.progress.step

    @property
    def samples(self) -> int:
        return self.progress.samples

    @property
    def failed(self) -> bool:
        """Whether the run has stopped with a failure."""
        return self.stopped is not None and self.stopped.ending.is_failure

    @property
    def tokens(self) -> int:
        return self.samples * self.objective.tokens_per_sample

    @property
    def nets(self) -> dict[str, torch.nn.Module]:
        """The networks inside their engines, by name."""
        return {name: engine.module for name, engine in self.engines.items()}

    def spend(self, purpose: Spent, since: float) -> float:
        """Book the time from `since` until now under `purpose`; returns now."""
        now = self.note_progress()
        self.seconds[purpose] = self.seconds.get(purpose, 0.0) + now - since
        return now

    def note_progress(self) -> float:
        """Tell the watchdog that this rank makes progress; returns now."""
        self.progress.last_progress = time.perf_counter()
        return self.progress.last_progress


def fragments(training: Training) -> list[Fragment]:
    """Return all training state that this rank holds, as views."""
    held: list[Fragment] = []
    for name, engine in training.engines.items():
        held += [fragment.named(name) for fragment in engine.fragments()]
    return held + training.ema.fragments


@dataclass(frozen=True)
class Hook:
    """A function that the loop calls between steps."""

    every: int
    """Number of steps between calls; 0: only at the end."""
    call: Callable[[Training], None]
    books_as: Spent = "other"
    """The purpose that the time of a call counts for: see trainer/records/goodput.py."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy `batch` to `device`; from pinned memory, without waiting for the copy."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def add(total: Sums, sums: Sums) -> None:
    """Add `sums` to `total`, in place."""
    for key, value in sums.items():
        total[key] = total[key] + value if key in total else value


def over_ranks(sums: Sums, world: World) -> Sums:
    """Add up `sums` across ranks, in one all-reduce of float64."""
    if world.size == 1 or not sums:
        return sums
    flat = torch.cat([value.reshape(-1).double() for value in sums.values()])
    parts = world.sum(flat).split([value.numel() for value in sums.values()])
    return {key: part.view(value.shape) for (key, value), part in zip(sums.items(), parts, strict=True)}
