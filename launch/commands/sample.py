"""Looking at data and at finished runs: samples, measures, receipts. One process, no Ray, no cluster."""

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from data.config import ImageConfig, TextConfig
from launch.config import load
from launch.console.summary import printable
from launch.console.tables import table
from trainer.config import RunConfig
from trainer.core.protocols import SampleSet
from trainer.hooks.evaluate import evaluating, write_samples
from trainer.inference.load import ALONE, load_objective, measure
from trainer.objectives.images.data import grid_of
from trainer.parsing import parse
from trainer.rules import RulesConfig
from trainer.run_files import RunFiles
from trainer.settle import find_run
from trainer.storage import Folder


def show_data(console: Console, path: str, overrides: Sequence[str], n: int) -> None:
    """Print (texts) or draw (images) the first `n` decoded training samples of a job."""
    from data.prepare import prepare

    job = load(path, overrides)
    match job.run.objective.stored_data:
        case TextConfig() as data:
            from data.text.collate import preview

            prepare(data)
            for index, text in enumerate(preview(data, job.run.seed, n)):
                console.rule(f"sample {index}", align="left", style="dim")
                console.print(printable(text), markup=False)
        case ImageConfig() as data:
            from data.images.collate import preview_images

            prepare(data)
            picture = grid_of(preview_images(data, job.run.seed, n).float() / 127.5 - 1, columns=round(n**0.5))
            for file in write_samples(SampleSet(images={"data": picture}), Path("samples"), str(job.run.name)):
                console.print(f"wrote {file}")
        case None:
            made = job.run.objective.dataset
            raise ValueError(f"run.objective.data: {made} is made while training and has no rows to show; train, and look at the samples")


def read_run(folder: Folder) -> RunConfig:
    """The resolved job of a run."""
    return parse(RunConfig, RunFiles(folder).job()["run"], "run")


def show_samples(console: Console, run: str, n: int, seed: int, changes: dict[str, Any], rules: RulesConfig | None = None) -> None:
    """Print (texts) or write (images) `n` samples from the last checkpoint of `run`, of texts those that `rules` accept; `changes` are its objective's."""
    folder = find_run(run)
    config = read_run(folder)
    unknown = set(changes) - {field.name for field in fields(config.objective)}
    if unknown:
        raise ValueError(f"--{min(unknown).replace('sample_', '')}: a {config.objective.name} run has no such choice; leave it out")
    objective, step = load_objective(replace(config, objective=replace(config.objective, **changes)), folder, console.print)
    with evaluating(objective.networks):
        samples = objective.sample(objective.networks, n, torch.Generator().manual_seed(seed))
    texts = samples.text
    if rules is not None:
        from launch.commands.promote import passing

        if not texts:
            raise ValueError(f"--rules: {config.objective.name} makes no texts, which rules read; leave it out")
        texts = passing(console, rules, folder, texts)
    for name, text in texts.items():
        console.rule(f"{name}, step {step}", align="left", style="dim")
        console.print(printable(text), markup=False)
    if samples.images:
        for file in write_samples(samples, Path("samples"), f"{config.name}-step-{step:08d}"):
            console.print(f"wrote {file}")


def evaluate_run(console: Console, run: str) -> dict[str, float]:
    """Print and return the measures of the last checkpoint of `run` on its held-out data."""
    folder = find_run(run)
    config = read_run(folder)
    objective, step = load_objective(config, folder, console.print)
    figures = measure(objective, list(objective.held_out(config.evaluation_share(ALONE))))
    rows = []
    for name, value in (figures | objective.baselines()).items():
        if "/expert" not in name:
            rows.append((name, f"{value:.4f}" if math.isfinite(value) else str(value)))
    console.print(table(f"{config.name}, step {step}, held out", ("", ""), rows, left=(0, 1)))
    return figures
