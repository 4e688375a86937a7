"""`switchwork sample`: samples from the last checkpoint of a run, in one process without Ray."""

from dataclasses import fields, replace
from pathlib import Path

import torch
from rich.console import Console

from launch.console.summary import printable
from trainer.hooks.evaluate import evaluating
from trainer.hooks.sample import write_samples
from trainer.inference.load import load_objective
from trainer.parsing import Json
from trainer.rules import RulesConfig
from trainer.settle import find_run, read_run


def show_samples(
    console: Console, run: str, n: int, seed: int, changes: Json, rules: RulesConfig | None = None
) -> None:
    """Print (texts) or write (images) `n` samples from the last checkpoint of `run`.

    `changes` are fields of its objective to set, and `rules` leave out the texts that break them.
    Raises ValueError for a field or for rules that the objective does not have.
    """
    folder = find_run(run)
    config = read_run(folder)
    unknown = set(changes) - {field.name for field in fields(config.objective)}
    if unknown:
        raise ValueError(
            f"--{min(unknown).replace('sample_', '')}: a {config.objective.name} run has no such choice; leave it out"
        )
    objective, step = load_objective(
        replace(config, objective=replace(config.objective, **changes)), folder, console.print
    )
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
