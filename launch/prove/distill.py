"""`switchwork prove distill`: how much of the gain of a mixture of experts does a dense student keep?

Switch Transformers, section 4.1, over paired seeds, at equal steps and equal data: the dense model alone, the mixture of experts, and the dense model
with that one as its teacher, from whose weights outside the experts it starts. Teacher and student share a seed; shares are taken seed by seed.
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
    """What the command's flags say."""

    seeds: int
    """How many, from the job's own on."""
    alpha: float
    """The teacher's share of the loss."""
    kl_temperature: float
    """Of the teacher's loss."""
    ablations: bool
    """The student with the teacher's weights alone, and with its loss alone, as well."""
    processes: int | None
    """Runs at a time; None: as many as there are cores."""
    folder: str
    """Runs, results and picture."""
    teachers: str | None = None
    """Folder of `switchwork prove moe`, whose runs serve as dense models and teachers; None: `folder` has them, too."""

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise ValueError(f"--seeds: {self.seeds} has no spread to judge a difference by; use 2 or more")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"--processes: {self.processes}; use at least 1")
        if not 0 < self.alpha <= 1 or not self.kl_temperature > 0:
            raise ValueError(
                f"--alpha: {self.alpha} and --temperature {self.kl_temperature}; use an alpha above 0 and up to 1, and a temperature above 0"
            )


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of the teacher's gain that a student keeps; None where no bound can be told."""

    mean: float | None
    low: float | None
    high: float | None
    n: int
    """Paired seeds."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """What `results.json` holds."""

    job: Json
    """The teacher's run."""
    options: Options
    processes: int
    minutes_of_runs: float
    """One after the other."""
    variants: list[VariantOutcome]
    leads: list[Lead]
    kept: dict[str, Share]
    """By student."""


def prove(console: Console, path: str, overrides: Sequence[str], options: Options) -> None:
    """Run what is missing, teachers first, then print table and verdict, and write `results.json` and `proof.png`."""
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
        kept={name: _told(part) for name, part in kept.items()},
    )
    Folder(absolute(options.folder)).write("results.json", json.dumps(asdict(results), indent=1).encode())
    _show(console, outcomes, leads, kept, teacher)
    draw_proof(outcomes, leads, TITLE, Path(Folder(absolute(options.folder)).path) / "proof.png")
    where = f"figures in {options.folder}/results.json, picture in {options.folder}/proof.png"
    console.print(f"{clock(60 * minutes / processes)} of training; {where}", highlight=False)


def _show(
    console: Console, outcomes: Sequence[VariantOutcome], leads: Leads, kept: Mapping[str, Difference], teacher: str
) -> None:
    """Print the table, the leads of and over the distilled model, and the shares."""
    console.print(table_of(outcomes, leads))
    for (ours, theirs), difference in leads.items():
        if DISTILLED in (ours, theirs):
            console.print(sentence(ours, theirs, difference), highlight=False)
    for name, part in kept.items():
        console.print(words(name, teacher, part), style="bold", highlight=False)


def _told(part: Difference) -> Share:
    """JSON has no infinity."""
    mean, low, high = (bound if math.isfinite(bound) else None for bound in (part.mean, part.low, part.high))
    return Share(mean=mean, low=low, high=high, n=part.n)


def _trained(
    console: Console, run: RunConfig, moe: MoEConfig, processes: int, options: Options
) -> tuple[dict[str, list[RunConfig]], float]:
    """The runs of each variant by seed, all done, and the minutes that they took one after the other."""
    prepare_data(language_of(run).data)
    root, teachers_root = (
        f"{absolute(folder)}/runs" for folder in (options.folder, options.teachers or options.folder)
    )
    seeds = range(run.seed, run.seed + options.seeds)
    teacher = switch_name(moe.experts)
    of_moe = variants(
        run, moe, [int(number) for number in EXPERTS.split(",")]
    )  # to the letter those of `switchwork prove moe`
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
    """Run what is missing, seed by seed; returns the seconds of training of all runs together."""
    seed_by_seed = list(chain.from_iterable(zip(*runs.values(), strict=True)))
    return sum(summary["train_seconds"] for summary in summaries(console, seed_by_seed, processes, what))


def students(dense: RunConfig, teacher: str, options: Options) -> Mapping[str, RunConfig]:
    """Name -> the run `dense` with a teacher in the folder `teacher`: with its weights and its loss, or with one of the two alone."""
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
    """Each variant against the dense model, then the distilled one against the others and its teacher."""
    return [(name, "dense") for name in names if name != "dense"] + [
        (DISTILLED, name) for name in names if name not in ("dense", DISTILLED)
    ]


def _kept(outcomes: Sequence[VariantOutcome], teacher: str) -> dict[str, Difference]:
    """Of the teacher's gain over the dense model, the share that each student has."""
    losses = {outcome.name: outcome.losses for outcome in outcomes}
    dense = losses.pop("dense")
    gains = {name: [alone - mine for alone, mine in zip(dense, own, strict=True)] for name, own in losses.items()}
    return {name: share(gain, gains[teacher]) for name, gain in gains.items() if name != teacher}


def words(name: str, teacher: str, kept: Difference) -> str:
    """What may be said of a share."""
    if math.isinf(kept.high):
        return f"{name}: the gain of {teacher} over the dense model is not clear of zero with {kept.n} paired seeds, so no share of it can be told; use more"
    interval = f"{CONFIDENCE:.0%} interval {kept.low:.0%} to {kept.high:.0%}, {kept.n} paired seeds"
    return f"{name}: keeps {kept.mean:.0%} of the gain of {teacher} over the dense model ({interval})"
