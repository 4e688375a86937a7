"""`switchwork prove distill`: how much of a mixture's gain does a dense student keep?

This is the experiment of Switch Transformers, section 4.1, over paired seeds, at equal steps and
equal data. It compares the dense model alone, the mixture of experts, and a dense student. The
mixture is the student's teacher, and the student starts from its weights outside the experts.
Teacher and student share a seed; shares are taken seed by seed.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from data.prepare import prepare as prepare_data
from launch.config import JobConfig
from launch.console.progress import clock
from launch.prove.moe_report import draw_proof, sentence, table_of
from launch.prove.paired import CONFIDENCE, Difference, share
from launch.prove.side_by_side import default_processes, summaries
from launch.prove.variants import (
    EXPERTS,
    Lead,
    Leads,
    VariantOutcome,
    checked,
    language_of,
    leads_between,
    outcome_of,
    rows_of,
    seeded,
    switch_name,
    variants,
)
from models.moe.layer import MoEConfig
from trainer.config import RunConfig
from trainer.objectives.language.config import DistillConfig
from trainer.parsing import Json, parse, plain, read_job
from trainer.run_files import run_files
from trainer.storage import Folder, absolute, check_writable

DISTILLED = "distilled"
TITLE = "A dense model that learns from a mixture of experts"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of the command."""

    seeds: int
    """Number of seeds, counted from the job's own."""
    alpha: float
    """The teacher's share of the loss."""
    kl_temperature: float
    """Temperature of the teacher's loss."""
    ablations: bool
    """Whether to train students with the teacher's weights alone and with its loss alone, too."""
    processes: int | None
    """Runs at the same time. None: as many as the cores allow."""
    folder: str
    """Folder of the runs, the results and the picture."""
    teachers: str | None = None
    """A folder of `switchwork prove moe`, whose runs serve as dense models and teachers.

    None: these runs are in `folder`, too.
    """

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise ValueError(f"--seeds: {self.seeds} has no spread to judge a difference by; use 2 or more")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"--processes: {self.processes}; use at least 1")
        if not 0 < self.alpha <= 1 or not self.kl_temperature > 0:
            raise ValueError(
                f"--alpha: {self.alpha} and --temperature {self.kl_temperature}; "
                "use an alpha above 0 and up to 1, and a temperature above 0"
            )


@dataclass(frozen=True, kw_only=True)
class Share:
    """The share of the teacher's gain that a student keeps, as JSON; an infinite bound is None."""

    mean: float | None
    low: float | None
    high: float | None
    n: int
    """Number of paired seeds."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """The content of `results.json`."""

    job: Json
    """The teacher's run."""
    options: Options
    processes: int
    minutes_of_runs: float
    """Training time of all runs together."""
    variants: list[VariantOutcome]
    leads: list[Lead]
    kept: dict[str, Share]
    """The share of the teacher's gain that each student keeps, by the student's name."""


def prove(console: Console, path: str, overrides: Sequence[str], options: Options) -> None:
    """Train the missing runs, teachers first, print the table and the verdicts, write the results.

    The results are `results.json` and `proof.png` in the folder of `options`.
    """
    run = parse(JobConfig, read_job(path, overrides)).run
    moe = checked(run, path)
    check_writable(absolute(options.folder), "--folder")
    teacher = switch_name(moe.experts)
    processes = options.processes or default_processes(run)
    runs, minutes = _trained(console, run, moe, processes, options)
    outcomes = [outcome_of(name, by_seed[0], by_seed) for name, by_seed in runs.items()]
    leads = leads_between(outcomes, _pairs(list(runs)))
    kept = _kept(outcomes, teacher)
    results = Results(
        job=plain(run),
        options=options,
        processes=processes,
        minutes_of_runs=minutes,
        variants=outcomes,
        leads=rows_of(leads),
        kept={name: _finite(part) for name, part in kept.items()},
    )
    Folder(absolute(options.folder)).write("results.json", json.dumps(asdict(results), indent=1).encode())
    _show(console, outcomes, leads, kept, teacher)
    draw_proof(outcomes, leads, TITLE, Path(Folder(absolute(options.folder)).path) / "proof.png")
    files = f"metrics in {options.folder}/results.json, picture in {options.folder}/proof.png"
    console.print(f"{clock(60 * minutes / processes)} of training; {files}", highlight=False)


def _show(
    console: Console, outcomes: Sequence[VariantOutcome], leads: Leads, kept: Mapping[str, Difference], teacher: str
) -> None:
    """Print the table, the leads that involve the distilled model, and the shares."""
    console.print(table_of(outcomes, leads))
    for (ours, theirs), difference in leads.items():
        if DISTILLED in (ours, theirs):
            console.print(sentence(ours, theirs, difference), highlight=False)
    for name, part in kept.items():
        console.print(words(name, teacher, part), style="bold", highlight=False)


def _finite(part: Difference) -> Share:
    """Return a share without infinite bounds, since JSON has no infinity."""
    mean, low, high = (bound if math.isfinite(bound) else None for bound in (part.mean, part.low, part.high))
    return Share(mean=mean, low=low, high=high, n=part.n)


def _trained(
    console: Console, run: RunConfig, moe: MoEConfig, processes: int, options: Options
) -> tuple[dict[str, list[RunConfig]], float]:
    """Train all runs that are missing.

    Returns the runs of each variant, one per seed, and the training time of all runs in minutes.
    """
    prepare_data(language_of(run).data)
    root = f"{absolute(options.folder)}/runs"
    teachers_root = f"{absolute(options.teachers or options.folder)}/runs"
    seeds = range(run.seed, run.seed + options.seeds)
    teacher = switch_name(moe.experts)
    # These are exactly the variants of `switchwork prove moe`, so that its runs can be reused.
    of_moe = variants(run, moe, [int(number) for number in EXPERTS.split(",")])
    dense = of_moe["dense"]
    taught = list(students(dense, "", options))
    count = f"{2 + len(taught)} variants x {len(seeds)} seeds, {run.stop.steps} steps each, {processes} at a time"
    console.print(f"{count}, in {options.folder}", highlight=False)
    runs = {name: [seeded(of_moe[name], name, seed, teachers_root) for seed in seeds] for name in ("dense", teacher)}
    seconds = _seconds_of(console, runs, processes, "teachers")
    lessons = [students(dense, run_files(trained.root, trained.name).folder.url, options) for trained in runs[teacher]]
    later = {
        name: [seeded(lesson[name], name, seed, root) for seed, lesson in zip(seeds, lessons, strict=True)]
        for name in taught
    }
    seconds += _seconds_of(console, later, processes, "students")
    return runs | later, seconds / 60


def _seconds_of(console: Console, runs: Mapping[str, Sequence[RunConfig]], processes: int, what: str) -> float:
    """Train the missing runs, seed by seed, and return the seconds of training of all runs."""
    seed_by_seed = list(chain.from_iterable(zip(*runs.values(), strict=True)))
    return sum(summary["train_seconds"] for summary in summaries(console, seed_by_seed, processes, what))


def students(dense: RunConfig, teacher: str, options: Options) -> Mapping[str, RunConfig]:
    """Return the students of the run in the folder `teacher`, by name: `dense` with a teacher.

    A student has the teacher's weights and loss, or one of the two alone.
    """
    objective = language_of(dense)
    same: dict[str, Any] = {
        field.name: getattr(objective, field.name) for field in fields(objective) if field.name != "name"
    }

    def student(alpha: float, start: bool) -> RunConfig:
        lesson = DistillConfig(
            **same, teacher=teacher, alpha=alpha, kl_temperature=options.kl_temperature, init_from_teacher=start
        )
        return replace(dense, objective=lesson)

    runs = {DISTILLED: student(options.alpha, True)}
    if options.ablations:
        runs |= {"weights alone": student(0.0, True), "KL alone": student(options.alpha, False)}
    return runs


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pair each variant with the dense model, then the distilled one with all others."""
    with_dense = [(name, "dense") for name in names if name != "dense"]
    with_distilled = [(DISTILLED, name) for name in names if name not in ("dense", DISTILLED)]
    return with_dense + with_distilled


def _kept(outcomes: Sequence[VariantOutcome], teacher: str) -> dict[str, Difference]:
    """Return the share of the teacher's gain over the dense model that each student keeps."""
    losses = {outcome.name: outcome.losses for outcome in outcomes}
    dense = losses.pop("dense")
    gains = {name: _gain(dense, own) for name, own in losses.items()}
    return {name: share(gain, gains[teacher]) for name, gain in gains.items() if name != teacher}


def _gain(dense: Sequence[float], own: Sequence[float]) -> list[float]:
    """Return how far the losses `own` lie below those of the dense model, seed by seed."""
    return [alone - mine for alone, mine in zip(dense, own, strict=True)]


def words(name: str, teacher: str, kept: Difference) -> str:
    """Return the share `kept` of the gain of `teacher`, in words."""
    gain = f"the gain of {teacher} over the dense model"
    if math.isinf(kept.high):
        reason = f"not clear of zero with {kept.n} paired seeds, so its share is unknown"
        return f"{name}: {gain} is {reason}; use more seeds"
    interval = f"{CONFIDENCE:.0%} interval {kept.low:.0%} to {kept.high:.0%}, {kept.n} paired seeds"
    return f"{name}: keeps {kept.mean:.0%} of {gain} ({interval})"
