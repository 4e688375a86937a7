"""Evaluates on the held-out samples, and measures the quality of generated ones."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from data.share import Batch, Share
from trainer.core.protocols import Sums
from trainer.core.training import Training, add, over_ranks, to_device
from trainer.run_rows import EventKind, Say
from trainer.tracking.tracker import Tracker


def evaluate(training: Training, batches: list[Batch]) -> dict[str, float]:
    """Return the objective's metrics on held-out `batches`, over all ranks."""
    sums: Sums = {}
    with evaluating(training.nets):
        for batch in batches:
            add(sums, training.objective.evaluate(training.nets, to_device(batch, training.world.device)))
            training.note_progress()
    return training.objective.report(over_ranks(sums, training.world))


@contextmanager
def evaluating(networks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put `networks` in evaluation mode, without gradients, for a `with` block."""
    for network in networks.values():
        network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for network in networks.values():
            network.train()


@dataclass
class Evaluate:
    """Evaluates the networks on the held-out samples, whose batches are made once."""

    held_out: Callable[[], list[Batch]]
    tracker: Tracker
    batches: list[Batch] | None = None
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def __call__(self, training: Training) -> None:
        begin = time.perf_counter()
        if self.batches is None:
            self.batches = self.held_out()
        with training.ema.in_place():
            self.figures = evaluate(training, self.batches)
        self.seconds = time.perf_counter() - begin
        self.tracker.log(training.step, {f"eval/{name}": value for name, value in self.figures.items()})


@dataclass
class Quality:
    """Measures the quality of the objective's own samples, and raises its alarms."""

    share: Share
    tracker: Tracker
    say: Say
    figures: dict[str, float] = field(default_factory=dict)

    def __call__(self, training: Training) -> None:
        with training.ema.in_place(), evaluating(training.nets):
            self.figures = training.objective.quality(training.nets, self.share, training.world.gather)
        self.tracker.log(training.step, {f"quality/{name}": value for name, value in self.figures.items()})
        for alarm in training.objective.alarms(self.figures):
            self.say(EventKind.QUALITY, f"step {training.step}: {alarm}", training.step)
