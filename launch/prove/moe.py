"""`switchwork prove moe`: is the mixture of experts ahead of a dense model, and is it the routing that makes it so?

At equal steps, equal data and no fewer FLOPs a token for the dense model, over paired seeds: dense, several numbers of experts, and two
controls, a router frozen at its start and one whose choices are permuted over the tokens of a group. A seed gives every variant the same
data in the same order and the same initial weights outside the experts; differences are taken seed by seed.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain

from rich.console import Console

from data.prepare import prepare as prepare_data
from launch.config import JobConfig
from launch.prove.moe_report import show
from launch.prove.side_by_side import default_processes, named, summaries
from launch.prove.variants import (
    CURVE,
    Lead,
    VariantOutcome,
    checked,
    language_of,
    leads_between,
    outcome_of,
    rows_of,
    seeded,
    slug,
    switch_name,
    variants,
)
from trainer.checkout import CHECKOUT
from trainer.config import RunConfig, StopConfig
from trainer.parsing import Json, parse, plain, read_job
from trainer.run_rows import Summary
from trainer.storage import Folder, absolute, check_writable

RECIPE = str(CHECKOUT / "launch" / "configs" / "prove_moe.yaml")
_SPEED_STEPS = 60


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command's flags say."""

    experts: str
    """Numbers of experts beside the job's own, which the controls have: `4,8,16`."""
    seeds: int
    """How many, from the job's own on."""
    processes: int | None
    """Runs at a time; None: as many as there are cores."""
    minutes: float | None
    """Time for all of it; None: the job's steps."""
    folder: str
    """Runs, results and picture."""

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise ValueError(f"--seeds: {self.seeds} has no spread to judge a difference by; use 2 or more")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"--processes: {self.processes}; use at least 1")
        if not re.fullmatch(r"\d+(,\d+)*", self.experts) or min(self.numbers) < 2:
            raise ValueError(
                f"--experts: {self.experts!r}; give numbers from 2 on, such as 4,8,16 (the dense model is there in any case)"
            )

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(map(int, self.experts.split(",")))


@dataclass(frozen=True, kw_only=True)
class Results:
    """What `results.json` holds."""

    job: Json
    """The run that the variants are made of."""
    seeds: list[int]
    processes: int
    minutes_of_runs: float
    """One after the other."""
    variants: list[VariantOutcome]
    leads: list[Lead]


def prove(console: Console, path: str, overrides: Sequence[str], options: Options) -> None:
    """Run what is missing, then print table, differences and verdict, and write `results.json` and `proof.png`."""
    run = parse(JobConfig, read_job(path, overrides)).run
    moe = checked(run, path)
    check_writable(absolute(options.folder), "--folder")
    prepare_data(language_of(run).data)
    root = f"{absolute(options.folder)}/runs"
    processes = options.processes or default_processes(run)
    runs = variants(run, moe, options.numbers)
    if options.minutes is not None:
        run = replace(
            run, stop=StopConfig(steps=_steps_in(console, options.minutes, runs, options.seeds, processes, root))
        )
        runs = variants(run, moe, options.numbers)
    seeds = range(run.seed, run.seed + options.seeds)
    console.print(
        f"{len(runs)} variants x {len(seeds)} seeds, {run.stop.steps} steps each, {processes} at a time, in {options.folder}",
        highlight=False,
    )
    by_variant = {name: [seeded(variant, name, seed, root) for seed in seeds] for name, variant in runs.items()}
    seed_by_seed = list(chain.from_iterable(zip(*by_variant.values(), strict=True)))
    minutes = sum(summary["train_seconds"] for summary in summaries(console, seed_by_seed, processes, "proof")) / 60
    outcomes = [outcome_of(name, runs[name], by_seed) for name, by_seed in by_variant.items()]
    leads = leads_between(outcomes, _pairs(list(runs), switch_name(moe.experts)))
    results = Results(
        job=plain(run),
        seeds=list(seeds),
        processes=processes,
        minutes_of_runs=minutes,
        variants=outcomes,
        leads=rows_of(leads),
    )
    Folder(absolute(options.folder)).write("results.json", json.dumps(asdict(results), indent=1).encode())
    show(console, outcomes, leads, switch_name(moe.experts), options.folder, minutes / processes)


def _pairs(names: Sequence[str], ours: str) -> list[tuple[str, str]]:
    """Each variant against the dense model, then the job's own against the two controls."""
    return [(name, "dense") for name in names if name != "dense"] + [(ours, "permuted router"), (ours, "frozen router")]


def _steps_in(
    console: Console, minutes: float, runs: dict[str, RunConfig], seeds: int, processes: int, root: str
) -> int:
    """The steps that fit into `minutes`, from a short run of every variant, whose own time is taken off as well."""
    short = [named(short_run(run), f"speed-{slug(name)}", root) for name, run in runs.items()]
    return steps_that_fit(
        minutes, [Speed.of(summary) for summary in summaries(console, short, processes, "speed")], seeds, processes
    )


def short_run(run: RunConfig) -> RunConfig:
    """A run of few steps that measures the speed of `run`: it evaluates and saves once, at its end."""
    return replace(run, stop=StopConfig(steps=_SPEED_STEPS), evaluate=replace(run.evaluate, every=0), log_every=10)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds that a short run of one variant took."""

    total_s: float
    """From the command to the end of training."""
    start_s: float
    """From the command to the first step."""
    step_s: float
    """Per step, the wait for its data included."""
    hooks_s: float
    """Everything between steps: evaluation, checkpoint and reports."""

    @classmethod
    def of(cls, summary: Summary) -> "Speed":
        """The speed of the run that left `summary`, whose seconds are booked by what they were spent on."""
        seconds, start_s = summary["seconds"], summary["seconds_to_first_step"]
        return cls(
            total_s=start_s + summary["train_seconds"],
            start_s=start_s,
            step_s=(seconds["data"] + seconds["step"]) / summary["step"],
            hooks_s=seconds["evaluation"] + seconds["checkpoint"] + seconds["other"],
        )


def steps_that_fit(minutes: float, speeds: Sequence[Speed], seeds: int, processes: int) -> int:
    """Steps for each variant and seed, from the speed of each variant.

    A run takes its start, CURVE evaluations and its steps; 5 % of the time stay in hand. ValueError if not even a short run's steps fit.
    """
    step_s = sum(speed.step_s for speed in speeds)
    around_s = sum(speed.start_s + CURVE * speed.hooks_s for speed in speeds)
    spent_s = sum(speed.total_s for speed in speeds) / processes
    steps = math.floor(((0.95 * 60 * minutes - spent_s) * processes / seeds - around_s) / step_s)
    if steps < _SPEED_STEPS:
        least = math.ceil(((around_s + _SPEED_STEPS * step_s) * seeds / processes + spent_s) / 0.95 / 60)
        raise ValueError(
            f"--minutes: {minutes:g} is too short for {len(speeds)} variants and {seeds} seeds on {processes} processes; use {least} or more"
        )
    return steps
