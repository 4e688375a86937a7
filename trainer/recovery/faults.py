"""Injects faults at given steps, for tests and `switchwork chaos`; no other file breaks anything.

A fault happens once in a run, however often its step is replayed: the run folder lists those that
have happened.
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
    """Sends SIGKILL to a worker."""

    name: Literal["kill"] = "kill"
    step: int
    """The step after which the fault happens, as it is logged."""
    rank: int = 0
    """Rank of the worker."""


@dataclass(frozen=True, kw_only=True)
class Hang:
    """Sends SIGSTOP to a worker, which stays alive and does nothing."""

    name: Literal["hang"] = "hang"
    step: int
    """The step after which the fault happens, as it is logged."""
    rank: int = 0
    """Rank of the worker."""


@dataclass(frozen=True, kw_only=True)
class PoisonGradient:
    """Makes a worker's gradients NaN, and leaves its loss as it is."""

    name: Literal["poison_gradient"] = "poison_gradient"
    step: int
    """The step whose gradients are poisoned, as it is logged."""
    rank: int = 0
    """Rank of the worker."""
    phase: str | None = None
    """The network whose gradients are poisoned; null: the first."""


@dataclass(frozen=True, kw_only=True)
class DamageCheckpoint:
    """Flips a bit of the newest checkpoint and kills a worker, so that the checkpoint is needed."""

    name: Literal["damage_checkpoint"] = "damage_checkpoint"
    step: int
    """The step after which the fault happens, as it is logged."""
    rank: int = 0
    """Rank of the worker that does it, and is killed."""


@dataclass(frozen=True, kw_only=True)
class SourceFails:
    """Makes a worker's reads of the training data fail as if the connection were reset."""

    name: Literal["source_fails"] = "source_fails"
    step: int
    """The step after which reads fail, as it is logged; samples in memory by then remain usable."""
    seconds: float = 10.0
    """Seconds for which reads fail."""
    rank: int = 0
    """Rank of the worker."""


FaultConfig = Kill | Hang | PoisonGradient | DamageCheckpoint | SourceFails


def inject(faults: Sequence[FaultConfig], training: Training, files: RunFiles) -> list[Hook]:
    """Arrange this rank's faults that have not happened yet.

    Returns the hooks for the faults between two steps; a poisoned gradient wraps an engine.
    """
    done = [fault["fault"] for fault in files.faults()]
    hooks: list[Hook] = []
    for number, fault in enumerate(faults):
        if number in done or fault.rank != training.world.rank:
            continue
        once = _Once(files, number, fault)
        if isinstance(fault, PoisonGradient):
            poison(training, fault, once)
        else:
            hooks.append(Hook(1, _between_steps(fault, once, files)))
    return hooks


def poison(training: Training, fault: PoisonGradient, once: Callable[[], bool]) -> None:
    """Wrap the engine of the fault's network so that the gradient of the fault's step is NaN."""
    phase = fault.phase or training.objective.phases[0]
    poisoned = PoisonedEngine(training.engines[phase], lambda: training.step + 1 == fault.step and once())
    training.engines = {**training.engines, phase: poisoned}


class _Once:
    """Returns True at its first call, after recording the fault in the run folder."""

    def __init__(self, files: RunFiles, number: int, fault: FaultConfig):
        self.files = files
        self.number = number
        self.fault = fault
        self.done = False

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
    """An engine whose gradients are NaN while `now()` returns True."""

    def __init__(self, engine: Engine, now: Callable[[], bool]):
        self.engine = engine
        self.now = now
        self.module = engine.module

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
