"""Faults on purpose, at set steps: for tests and for `switchwork chaos`. The one place that breaks anything.

Each happens once in a run, however often its step is replayed: the run folder says which ones have.
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from data.sources.retry import OUTAGE
from trainer.checkpoint.format import step_name, steps_in
from trainer.checkpoint.fragments import Fragment
from trainer.core.protocols import Engine
from trainer.core.training import Hook, Training
from trainer.run_files import RunFiles
from trainer.run_rows import Fault


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


def inject(faults: Sequence[FaultConfig], training: Training, files: RunFiles) -> list[Hook]:
    """Arrange for this rank's faults that have not happened yet; returns the hooks that do those between two steps."""
    done = [fault["fault"] for fault in files.faults()]
    hooks: list[Hook] = []
    for number, fault in enumerate(faults):
        if number in done or fault.rank != training.world.rank:
            continue
        once = _Once(files, number, fault)
        if isinstance(fault, PoisonGradient):
            phase = fault.phase or training.objective.phases[0]
            engines = dict(training.engines)
            engines[phase] = PoisonedEngine(
                engines[phase], lambda fault=fault, once=once: training.step + 1 == fault.step and once()
            )  # type: ignore[misc]
            training.engines = engines
        else:
            hooks.append(Hook(1, _between_steps(fault, once, files)))
    return hooks


class _Once:
    """True the first time; written down before anything breaks."""

    def __init__(self, files: RunFiles, number: int, fault: FaultConfig):
        self.files, self.number, self.fault, self.done = files, number, fault, False

    def __call__(self) -> bool:
        if not self.done:
            self.done = True
            fault = self.fault
            self.files.add_fault(
                Fault(fault=self.number, name=fault.name, step=fault.step, rank=fault.rank, time=time.time())
            )
            return True
        return False


def _between_steps(fault: FaultConfig, once: Callable[[], bool], files: RunFiles) -> Callable[[Training], None]:
    def hook(training: Training) -> None:
        if training.step != fault.step or not once():
            return
        match fault:
            case Kill():
                os.kill(os.getpid(), signal.SIGKILL)
            case Hang():
                os.kill(os.getpid(), signal.SIGSTOP)
            case DamageCheckpoint():
                damage_newest(files)
                os.kill(os.getpid(), signal.SIGKILL)
            case SourceFails():
                OUTAGE.start(fault.seconds)

    return hook


def damage_newest(files: RunFiles) -> None:
    """Flip a bit in the middle of a file of the run's newest checkpoint."""
    newest = files.checkpoints / step_name(max(steps_in(files.checkpoints)))
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
    def forward(ctx: FunctionCtx, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        return torch.full_like(gradients[0], float("nan"))
