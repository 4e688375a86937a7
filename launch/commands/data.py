"""`switchwork data`: the first decoded training samples of a job."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from data.config import ImageConfig, TextConfig
from launch.config import load
from launch.console.summary import printable
from trainer.core.protocols import SampleSet
from trainer.hooks.sample import write_samples
from trainer.objectives.images.data import grid_of


def show_data(console: Console, path: str, overrides: Sequence[str], n: int) -> None:
    """Print (texts) or draw (images) the first `n` decoded training samples of a job."""
    from data.prepare import prepare

    job = load(path, overrides)
    match job.run.objective.stored_data:
        case TextConfig() as data:
            from data.training_stream import preview

            prepare(data)
            for index, text in enumerate(preview(data, job.run.seed, n)):
                console.rule(f"sample {index}", align="left", style="dim")
                console.print(printable(text), markup=False)
        case ImageConfig() as data:
            from data.training_stream import preview_images

            prepare(data)
            picture = grid_of(preview_images(data, job.run.seed, n).float() / 127.5 - 1, columns=round(n**0.5))
            for file in write_samples(SampleSet(images={"data": picture}), Path("samples"), str(job.run.name)):
                console.print(f"wrote {file}")
        case None:
            made = job.run.objective.dataset
            raise ValueError(
                f"run.objective.data: {made} is made while training and has no rows to show; "
                "train, and look at the samples"
            )
