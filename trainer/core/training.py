"""Where a training stands, as hooks see it."""

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
    """How far the run is. The loop writes it; a resumed run begins with that of its checkpoint."""

    step: int = 0
    """Optimiser steps done."""
    samples: int = 0
    """Samples seen, by all ranks."""
    replay_until: int = 0
    """The last step that was done before, by an earlier attempt or before a rollback."""
    must_roll_back: bool = False
    """Whether the run must go back to its newest checkpoint and continue from there."""
    last_progress: float = field(default_factory=time.perf_counter)
    """When this rank last made progress, as time.perf_counter()."""


@dataclass
class Training:
    """Where the run stands. Hooks read it; the loop writes it."""

    objective: Objective
    engines: Mapping[str, Engine]
    world: World
    learning_rate: Callable[[str, int], float]
    """The learning rate of a phase at a step (from 0)."""
    ema: Ema
    """The moving average of the weights; empty where none is asked for."""
    guard: Guard
    """Decides what is learned from."""
    progress: Progress = field(default_factory=Progress)
    sums: Sums = field(default_factory=dict)
    """This rank's metrics since they were last reported."""
    norms: dict[str, Tensor | float] = field(default_factory=dict)
    """Gradient norm of each phase in the last step."""
    data_state: RunState | None = None
    """Where the data stand after the last step; None: before the first one."""
    seconds: dict[Spent, float] = field(default_factory=dict)
    """Wall-clock time of this attempt by what it was spent on: see trainer/records/goodput.py."""
    wants_stop: Stopped | None = None
    """Why this rank asks to stop; None: it does not."""
    stopped: Stopped | None = None
    """Why all ranks stop, as agreed on."""

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
        """Networks inside their engines."""
        return {name: engine.module for name, engine in self.engines.items()}

    def spend(self, what: Spent, since: float) -> float:
        """Book the time from `since` until now under `what`; returns now."""
        now = self.note_progress()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - since
        return now

    def note_progress(self) -> float:
        """Tell the watchdog that this rank goes on; returns now."""
        self.progress.last_progress = time.perf_counter()
        return self.progress.last_progress


def fragments(training: Training) -> list[Fragment]:
    """All training state that this rank holds."""
    return [
        fragment.named(name) for name, engine in training.engines.items() for fragment in engine.fragments()
    ] + training.ema.fragments


@dataclass(frozen=True)
class Hook:
    """What is called after a step."""

    every: int
    """Steps between calls; 0: only at the end."""
    call: Callable[[Training], None]
    books_as: Spent = "other"
    """What the time of a call counts as: see trainer/records/goodput.py."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def add(total: Sums, sums: Sums) -> None:
    """Add `sums` to `total`, in place."""
    for key, value in sums.items():
        total[key] = total[key] + value if key in total else value


def over_ranks(sums: Sums, world: World) -> Sums:
    """`sums` added up over the ranks, in one all-reduce of float64."""
    if world.size == 1 or not sums:
        return sums
    flat = torch.cat([value.reshape(-1).double() for value in sums.values()])
    parts = world.sum(flat).split([value.numel() for value in sums.values()])
    return {key: part.view(value.shape) for (key, value), part in zip(sums.items(), parts, strict=True)}
