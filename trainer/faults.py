"""Faults on purpose, at set steps: for tests and for `switchwork chaos`. The one place that breaks anything.

Each happens once in a run, however often its step is replayed: `faults.jsonl` in the run folder says which ones have.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from data.retry import OUTAGE
from trainer.checkpoint import step_name, steps_in
from trainer.engines import Engine
from trainer.loop import Hook, Training
from trainer.shards import Fragment
from trainer.storage import Folder


@dataclass(frozen=True, kw_only=True)
class Kill:
    """SIGKILL to a worker."""

    name: Literal["kill"] = "kill"
    step: int
    """After this step, as it is logged."""
    rank: int = 0
    """Which worker."""


@dataclass(frozen=True, kw_only=True)
class Hang:
    """SIGSTOP to a worker: it is there, and does nothing."""

    name: Literal["hang"] = "hang"
    step: int
    """After this step, as it is logged."""
    rank: int = 0
    """Which worker."""


@dataclass(frozen=True, kw_only=True)
class PoisonGradient:
    """A worker's gradients become NaN, its loss stays."""

    name: Literal["poison_gradient"] = "poison_gradient"
    step: int
    """In this step, as it is logged."""
    rank: int = 0
    """Which worker."""
    phase: str | None = None
    """The network; null: the first."""


@dataclass(frozen=True, kw_only=True)
class DamageCheckpoint:
    """A bit of the newest checkpoint is flipped, and all workers are killed, so that the checkpoint is asked for."""

    name: Literal["damage_checkpoint"] = "damage_checkpoint"
    step: int
    """After this step, as it is logged."""
    rank: int = 0
    """Which worker does it."""


@dataclass(frozen=True, kw_only=True)
class SourceFails:
    """A worker's reads of the training data fail as if the connection were reset."""

    name: Literal["source_fails"] = "source_fails"
    step: int
    """After this step, as it is logged; what is in memory by then is still there."""
    seconds: float = 10.0
    """For so long."""
    rank: int = 0
    """Which worker."""


FaultConfig = Kill | Hang | PoisonGradient | DamageCheckpoint | SourceFails


def inject(faults: Sequence[FaultConfig], training: Training, folder: Folder) -> list[tuple[int, Hook]]:
    """Arrange for this rank's faults that have not happened yet; returns the hooks that do those between two steps."""
    done = [json.loads(line)["fault"] for line in folder.read("faults.jsonl").splitlines()] if folder.exists("faults.jsonl") else []
    hooks: list[tuple[int, Hook]] = []
    for number, fault in enumerate(faults):
        if number in done or fault.rank != training.world.rank:
            continue
        once = _Once(folder, number, fault)
        if isinstance(fault, PoisonGradient):
            phase = fault.phase or training.objective.phases[0]
            engines = dict(training.engines)
            engines[phase] = PoisonedEngine(engines[phase], lambda fault=fault, once=once: training.step + 1 == fault.step and once())  # type: ignore[misc]
            training.engines = engines
        else:
            hooks.append((1, _between_steps(fault, once, folder)))
    return hooks


class _Once:
    """True the first time; written down before anything breaks."""

    def __init__(self, folder: Folder, number: int, fault: FaultConfig):
        self.folder, self.number, self.fault, self.done = folder, number, fault, False

    def __call__(self) -> bool:
        if not self.done:
            self.done = True
            line = {"fault": self.number, "name": self.fault.name, "step": self.fault.step, "rank": self.fault.rank, "time": time.time()}
            self.folder.append("faults.jsonl", json.dumps(line).encode() + b"\n")
            return True
        return False


def _between_steps(fault: FaultConfig, once: Callable[[], bool], folder: Folder) -> Hook:
    def hook(training: Training) -> None:
        if training.step != fault.step or not once():
            return
        match fault:
            case Kill():
                os.kill(os.getpid(), signal.SIGKILL)
            case Hang():
                os.kill(os.getpid(), signal.SIGSTOP)
            case DamageCheckpoint():
                damage_newest(folder)
                os.kill(os.getpid(), signal.SIGKILL)
            case SourceFails():
                OUTAGE.start(fault.seconds)

    return hook


def damage_newest(folder: Folder) -> None:
    """Flip a bit in the middle of a file of the run's newest checkpoint."""
    newest = folder / "checkpoints" / step_name(max(steps_in(folder / "checkpoints")))
    name = next(name for name in newest.names() if name.endswith(".safetensors"))
    content = bytearray(newest.read(name))
    content[len(content) // 2] ^= 1
    newest.write(name, bytes(content))


class PoisonedEngine:
    """An engine whose gradients are NaN when `now()` says so."""

    def __init__(self, engine: Engine, now: Callable[[], bool]):
        self.engine, self.now, self.module = engine, now, engine.module

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(_Poison.apply(loss) if self.now() else loss)

    def step(self, lr: float, update: bool = True) -> Tensor | float:
        return self.engine.step(lr, update)

    def fragments(self) -> list[Fragment]:
        return self.engine.fragments()

    def refresh(self) -> None:
        self.engine.refresh()


class _Poison(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.full_like(gradients[0], float("nan"))
