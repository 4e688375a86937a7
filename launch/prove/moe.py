"""`switchwork prove moe`: is a mixture of experts ahead of a dense model because of its routing?

The variants are a dense model, several numbers of experts, and two controls: a router frozen at
its start, and one whose choices are permuted over the tokens of a group. All take the same steps
on the same data, and the dense model has no fewer FLOPs per token than the others. A seed gives
every variant the same data in the same order and the same initial weights outside the experts;
differences are taken seed by seed.
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
    """The flags of the command."""

    experts: str
    """Numbers of experts in addition to the job's own, such as `4,8,16`.

    The controls have the job's own number.
    """
    seeds: int
    """Number of seeds, counted from the job's own."""
    processes: int | None
    """Runs at the same time. None: as many as the cores allow."""
    minutes: float | None
    """Time for all runs, which sets their steps. None: the job's steps."""
    folder: str
    """Folder of the runs, the results and the picture."""

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise ValueError(f"--seeds: {self.seeds} has no spread to judge a difference by; use 2 or more")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"--processes: {self.processes}; use at least 1")
        if not re.fullmatch(r"\d+(,\d+)*", self.experts) or min(self.numbers) < 2:
            raise ValueError(
                f"--experts: {self.experts!r}; give numbers from 2 on, such as 4,8,16 "
                "(the dense model is always compared)"
            )

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of `experts`."""
        return tuple(map(int, self.experts.split(",")))


@dataclass(frozen=True, kw_only=True)
class Results:
    """The content of `results.json`."""

    job: Json
    """The run from which the variants are derived."""
    seeds: list[int]
    processes: int
    minutes_of_runs: float
    """Training time of all runs together."""
    variants: list[VariantOutcome]
    leads: list[Lead]


def prove(console: Console, path: str, overrides: Sequence[str], options: Options) -> None:
    """Train the missing runs, print the table and the verdicts, and write the results.

    The results are `results.json` and `proof.png` in the folder of `options`.
    """
    run = parse(JobConfig, read_job(path, overrides)).run
    moe = checked(run, path)
    check_writable(absolute(options.folder), "--folder")
    prepare_data(language_of(run).data)
    root = f"{absolute(options.folder)}/runs"
    processes = options.processes or default_processes(run)
    runs = variants(run, moe, options.numbers)
    if options.minutes is not None:
        steps = _steps_in(console, options.minutes, runs, options.seeds, processes, root)
        run = replace(run, stop=StopConfig(steps=steps))
        runs = variants(run, moe, options.numbers)
    seeds = range(run.seed, run.seed + options.seeds)
    count = f"{len(runs)} variants x {len(seeds)} seeds, {run.stop.steps} steps each, {processes} at a time"
    console.print(f"{count}, in {options.folder}", highlight=False)
    by_variant = {name: _over(seeds, variant, name, root) for name, variant in runs.items()}
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


def _over(seeds: Sequence[int], variant: RunConfig, name: str, root: str) -> list[RunConfig]:
    """Return one run of `variant` per seed."""
    return [seeded(variant, name, seed, root) for seed in seeds]


def _pairs(names: Sequence[str], ours: str) -> list[tuple[str, str]]:
    """Pair each variant with the dense model, then the job's own variant with the two controls."""
    with_dense = [(name, "dense") for name in names if name != "dense"]
    return [*with_dense, (ours, "permuted router"), (ours, "frozen router")]


def _steps_in(
    console: Console, minutes: float, runs: dict[str, RunConfig], seeds: int, processes: int, root: str
) -> int:
    """Measure the speed of every variant in a short run, and return the steps that fit.

    The time of the short runs counts as part of `minutes`.
    """
    short = [named(short_run(run), f"speed-{slug(name)}", root) for name, run in runs.items()]
    speeds = [Speed.of(summary) for summary in summaries(console, short, processes, "speed")]
    return steps_that_fit(minutes, speeds, seeds, processes)


def short_run(run: RunConfig) -> RunConfig:
    """Return a run of few steps that measures the speed of `run`.

    It evaluates once and saves once, at its end.
    """
    return replace(run, stop=StopConfig(steps=_SPEED_STEPS), evaluate=replace(run.evaluate, every=0), log_every=10)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The seconds that a short run of one variant took."""

    total_s: float
    """Time from the command to the end of training."""
    start_s: float
    """Time from the command to the first step."""
    step_s: float
    """Time per step, including the wait for data."""
    hooks_s: float
    """Time between steps: evaluation, checkpoint and reports."""

    @classmethod
    def of(cls, summary: Summary) -> "Speed":
        """Return the speed of a run from its summary, which divides its seconds by activity."""
        seconds = summary["seconds"]
        start_s = summary["seconds_to_first_step"]
        return cls(
            total_s=start_s + summary["train_seconds"],
            start_s=start_s,
            step_s=(seconds["data"] + seconds["step"]) / summary["step"],
            hooks_s=seconds["evaluation"] + seconds["checkpoint"] + seconds["other"],
        )


def steps_that_fit(minutes: float, speeds: Sequence[Speed], seeds: int, processes: int) -> int:
    """Return the number of steps for every run, from the speed of each variant.

    The time of a run is its start, CURVE evaluations and its steps; 5 % of `minutes` are held in
    reserve. Raises ValueError if not even the steps of a short run fit.
    """
    step_s = sum(speed.step_s for speed in speeds)
    around_s = sum(speed.start_s + CURVE * speed.hooks_s for speed in speeds)
    spent_s = sum(speed.total_s for speed in speeds) / processes
    steps = math.floor(((0.95 * 60 * minutes - spent_s) * processes / seeds - around_s) / step_s)
    if steps < _SPEED_STEPS:
        least = math.ceil(((around_s + _SPEED_STEPS * step_s) * seeds / processes + spent_s) / 0.95 / 60)
        work = f"{len(speeds)} variants and {seeds} seeds on {processes} processes"
        raise ValueError(f"--minutes: {minutes:g} is too short for {work}; use {least} or more")
    return steps
