"""Generates samples for inspection."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from trainer.core.protocols import SampleSet
from trainer.core.training import Training
from trainer.hooks.evaluate import evaluating
from trainer.run_files import RunFiles
from trainer.tracking.tracker import Tracker


@dataclass
class Sample:
    """Generates samples, writes them to the run folder and logs them to MLflow."""

    n: int
    seed: int
    files: RunFiles
    tracker: Tracker
    scratch: Path
    samples: SampleSet = field(default_factory=SampleSet)

    def __call__(self, training: Training) -> None:
        if not self.n:
            return
        generator = torch.Generator(training.world.device).manual_seed(self.seed)
        # Sampling grows its input token by token: torch.compile would compile it for every length.
        with training.ema.in_place(), evaluating(training.nets), torch.compiler.set_stance("force_eager"):
            self.samples = training.objective.sample(training.nets, self.n, generator)
        if training.world.is_main:
            for file in write_samples(self.samples, self.scratch, f"step-{training.step:08d}"):
                self.files.samples.put(file, file.name)
                self.tracker.keep(file)


def write_samples(samples: SampleSet, folder: Path, prefix: str) -> list[Path]:
    """Write all texts into one .txt, and each grid of images into a .png; returns the files."""
    files = []
    folder.mkdir(parents=True, exist_ok=True)
    if samples.text:
        file = folder / f"{prefix}.txt"
        file.write_text("".join(f"--- {name}\n{text}\n" for name, text in samples.text.items()), encoding="utf-8")
        files.append(file)
    for name, image in samples.images.items():
        from matplotlib import image as png

        file = folder / f"{prefix}-{name}.png"
        png.imsave(file, image.clamp(0, 1).permute(1, 2, 0).cpu().numpy())
        files.append(file)
    return files
