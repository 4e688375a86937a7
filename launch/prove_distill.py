"""`switchwork prove distill`: how much of what a mixture of experts gains over a dense model does a dense model keep that learns from it?

Switch Transformers, section 4.1, over paired seeds, at equal steps and equal data: the dense model alone, the mixture of experts, and the dense model
with that one as its teacher, from whose weights outside the experts it starts. Teacher and student share a seed; shares are taken seed by seed.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from data.prepare import prepare as prepare_data
from launch.config import JobConfig
from launch.paired import CONFIDENCE, Difference, lead, share
from launch.progress import clock
from launch.prove_moe import EXPERTS, Outcome, checked, outcome_of, slug, switch_name, variants
from launch.prove_moe_report import draw, sentence, table_of
from launch.side_by_side import default_processes, named, summaries
from models.moe import MoEConfig
from trainer.config import RunConfig
from trainer.objectives.language_config import DistillConfig, LanguageConfig
from trainer.parsing import parse, plain, read_job
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
            raise ValueError(f"--alpha: {self.alpha} and --temperature {self.kl_temperature}; use an alpha above 0 and up to 1, and a temperature above 0")


def prove(console: Console, path: str, overrides: Sequence[str], options: Options) -> None:
    """Run what is missing, teachers first, then print table and verdict, and write `results.json` and `proof.png`."""
    run = parse(JobConfig, read_job(path, overrides)).run
    moe = checked(run, path)
    check_writable(absolute(options.folder), "--folder")
    teacher, processes = switch_name(moe.experts), options.processes or default_processes(run)
    runs, minutes = _trained(console, run, moe, processes, options)
    outcomes = [outcome_of(name, each[0], each) for name, each in runs.items()]
    leads, kept = _leads(outcomes), _kept(outcomes, teacher)
    results = {
        "job": plain(run),
        "options": asdict(options),
        "processes": processes,
        "minutes_of_runs": minutes,
        "variants": [asdict(outcome) for outcome in outcomes],
        "leads": [{"of": ours, "over": theirs, **asdict(each), "verdict": each.verdict} for (ours, theirs), each in leads.items()],
        "kept": {name: {key: value if math.isfinite(value) else None for key, value in asdict(each).items()} for name, each in kept.items()},
    }
    Folder(absolute(options.folder)).write("results.json", json.dumps(results, indent=1).encode())
    console.print(table_of(outcomes, leads))
    for (ours, theirs), each in leads.items():
        if DISTILLED in (ours, theirs):
            console.print(sentence(ours, theirs, each), highlight=False)
    for name, each in kept.items():
        console.print(words(name, teacher, each), style="bold", highlight=False)
    draw(outcomes, leads, TITLE, Path(Folder(absolute(options.folder)).path) / "proof.png")
    where = f"figures in {options.folder}/results.json, picture in {options.folder}/proof.png"
    console.print(f"{clock(60 * minutes / processes)} of training; {where}", highlight=False)


def _trained(console: Console, run: RunConfig, moe: MoEConfig, processes: int, options: Options) -> tuple[dict[str, list[RunConfig]], float]:
    """The runs of each variant by seed, all done, and the minutes that they took one after the other."""
    assert isinstance(run.objective, LanguageConfig), "refused before"
    prepare_data(run.objective.data)
    root, there = (f"{absolute(folder)}/runs" for folder in (options.folder, options.teachers or options.folder))
    seeds, teacher = range(run.seed, run.seed + options.seeds), switch_name(moe.experts)
    of_moe = variants(run, moe, [int(number) for number in EXPERTS.split(",")])  # to the letter those of `switchwork prove moe`
    dense, taught = of_moe["dense"], list(students(of_moe["dense"], "", options))
    count = f"{2 + len(taught)} variants x {len(seeds)} seeds, {run.stop.steps} steps each, {processes} at a time"
    console.print(f"{count}, in {options.folder}", highlight=False)
    runs = {name: [_seeded(of_moe[name], name, seed, there) for seed in seeds] for name in ("dense", teacher)}
    found = summaries(console, [each for pair in zip(*runs.values(), strict=True) for each in pair], processes, "teachers")
    lessons = [students(dense, run_files(each.root, each.name).folder.url, options) for each in runs[teacher]]
    later = {name: [_seeded(each[name], name, seed, root) for seed, each in zip(seeds, lessons, strict=True)] for name in taught}
    found += summaries(console, [each for row in zip(*later.values(), strict=True) for each in row], processes, "students")
    return runs | later, sum(summary["train_seconds"] for summary in found) / 60


def students(dense: RunConfig, teacher: str, options: Options) -> Mapping[str, RunConfig]:
    """Name -> the run `dense` with a teacher in the folder `teacher`: with its weights and its loss, or with one of the two alone."""
    objective = dense.objective
    assert isinstance(objective, LanguageConfig)
    same: dict[str, Any] = {field.name: getattr(objective, field.name) for field in fields(objective) if field.name != "name"}

    def student(alpha: float, start: bool) -> RunConfig:
        lesson = DistillConfig(**same, teacher=teacher, alpha=alpha, kl_temperature=options.kl_temperature, init_from_teacher=start)
        return replace(dense, objective=lesson)

    found = {DISTILLED: student(options.alpha, True)}
    if options.ablations:
        found |= {"weights alone": student(0.0, True), "KL alone": student(options.alpha, False)}
    return found


def _seeded(run: RunConfig, name: str, seed: int, root: str) -> RunConfig:
    return named(replace(run, seed=seed), f"{slug(name)}-seed{seed}", root)


def _leads(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], Difference]:
    """(ours, theirs) -> the lead of each variant over the dense model, and of the distilled one over the others and its teacher."""
    losses = {outcome.name: outcome.losses for outcome in outcomes}
    pairs = [(name, "dense") for name in losses if name != "dense"] + [(DISTILLED, name) for name in losses if name not in ("dense", DISTILLED)]
    return {(mine, theirs): lead(losses[theirs], losses[mine]) for mine, theirs in pairs}


def _kept(outcomes: Sequence[Outcome], teacher: str) -> dict[str, Difference]:
    """Of the teacher's gain over the dense model, the share that each student has."""
    losses = {outcome.name: outcome.losses for outcome in outcomes}
    gains = {name: [alone - mine for alone, mine in zip(losses["dense"], each, strict=True)] for name, each in losses.items() if name != "dense"}
    return {name: share(each, gains[teacher]) for name, each in gains.items() if name != teacher}


def words(name: str, teacher: str, kept: Difference) -> str:
    """What may be said of a share."""
    if math.isinf(kept.high):
        return f"{name}: the gain of {teacher} over the dense model is not clear of zero with {kept.n} paired seeds, so no share of it can be told; use more"
    interval = f"{CONFIDENCE:.0%} interval {kept.low:.0%} to {kept.high:.0%}, {kept.n} paired seeds"
    return f"{name}: keeps {kept.mean:.0%} of the gain of {teacher} over the dense model ({interval})"
