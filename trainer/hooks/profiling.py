"""Profiles a window of steps with torch's profiler.

It leaves a trace for chrome://tracing or Perfetto, and on CUDA a memory snapshot.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.core.training import Training
from trainer.world import World


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """The window of steps that rank 0 profiles."""

    first: int = 10
    """The first step of the window (from 1)."""
    steps: int = 3
    """Number of steps in the window."""

    def __post_init__(self) -> None:
        if self.first < 2 or self.steps < 1:
            raise ValueError(
                f"profile: first is {self.first} and steps {self.steps}; first must be at least 2 and steps at least 1"
            )


class ProfilerHook:
    """Profiles from step `first` to the end of the window, and hands the files to `keep`."""

    def __init__(self, config: ProfileConfig, folder: Path, keep: Callable[[Path], None]):
        self.config, self.folder, self.keep = config, folder, keep
        self.profiler: torch.profiler.profile | None = None

    def __call__(self, training: Training) -> None:
        if training.step == self.config.first - 1:
            if training.world.device.type == "cuda":
                torch.cuda.memory._record_memory_history(max_entries=100_000)
            self.profiler = torch.profiler.profile(profile_memory=True, record_shapes=True)
            self.profiler.start()
        elif self.profiler is not None and training.step >= self.config.first - 1 + self.config.steps:
            self._stop(self.profiler, training.world)

    def _stop(self, profiler: torch.profiler.profile, world: World) -> None:
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        trace, table = self.folder / "trace.json", self.folder / "operators.txt"
        profiler.export_chrome_trace(str(trace))
        table.write_text(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40))
        files = [trace, table]
        if world.device.type == "cuda":
            snapshot = self.folder / "memory.pickle"
            torch.cuda.memory._dump_snapshot(str(snapshot))
            torch.cuda.memory._record_memory_history(enabled=None)
            files.append(snapshot)
        self.profiler = None
        for file in files:
            self.keep(file)
