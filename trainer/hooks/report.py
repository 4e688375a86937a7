"""Logs the metrics of training steps: losses, norms, rates and the machine's load."""

import time
from dataclasses import dataclass, field

import psutil
import torch

from trainer.core.training import Training, over_ranks
from trainer.run_rows import Spent
from trainer.tracking.tracker import Tracker

_PAUSES: tuple[Spent, ...] = ("evaluation", "checkpoint")
"""Purposes of hooks whose time is no part of the training rate."""


@dataclass
class Report:
    """Logs the metrics of the steps since the last report."""

    tracker: Tracker
    peak_flops: float
    """Peak FLOPs per second of one rank; 0 if unknown."""
    last_samples: int = 0
    last_time: float = field(default_factory=time.perf_counter)
    paused_s: float = 0.0
    """Seconds of this attempt, up to the last report, that are no part of the training rate."""
    figures: dict[str, float] = field(default_factory=dict)

    def __call__(self, training: Training) -> None:
        if not training.sums:
            return
        sums = over_ranks(training.sums, training.world)
        training.sums = {}
        now = time.perf_counter()
        paused_s = sum(training.seconds.get(pause, 0.0) for pause in _PAUSES)
        seconds = max(1e-9, now - self.last_time - (paused_s - self.paused_s))
        samples = training.samples - self.last_samples
        self.last_time, self.last_samples, self.paused_s = now, training.samples, paused_s
        self.figures = training.objective.report(sums) | self._rates(training, samples / seconds) | _machine(training)
        self.tracker.log(training.step, self.figures)

    def _rates(self, training: Training, samples_per_s: float) -> dict[str, float]:
        objective, phases = training.objective, training.objective.phases
        figures = {"samples_seen": training.samples, "samples_per_s": samples_per_s}
        if objective.tokens_per_sample:
            figures |= {"tokens_seen": training.tokens, "tokens_per_s": samples_per_s * objective.tokens_per_sample}
        if objective.flops_per_sample and self.peak_flops:
            figures["mfu"] = samples_per_s * objective.flops_per_sample / (self.peak_flops * training.world.size)
        for phase, norm in training.norms.items():
            suffix = f"/{phase}" if len(phases) > 1 else ""
            figures[f"grad_norm{suffix}"] = float(norm)
            figures[f"learning_rate{suffix}"] = training.learning_rate(phase, training.step - 1)
        return figures


def _machine(training: Training) -> dict[str, float]:
    """Return metrics of this machine and process."""
    figures = {
        "system/cpu_percent": psutil.cpu_percent(),
        "system/memory_gb": psutil.virtual_memory().used / 1e9,
        "system/worker_rss_gb": psutil.Process().memory_info().rss / 1e9,
    }
    if training.world.device.type == "cuda":
        figures["system/gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return figures
