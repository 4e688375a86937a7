"""The trials of a sweep, each with a job of its own.

All jobs are resolved and checked, as `switchwork train` does it, before the first trial starts.
"""

import itertools
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.config import JobConfig, load
from launch.sweep.config import Asha, SweepConfig
from trainer.parsing import parse, plain, read_job
from trainer.run_files import RunFiles, run_files

_LONGEST = 32


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A trial: one job of a sweep."""

    name: str
    """The name of the trial, of its run, and of the run's folder."""
    setting: str
    """The name of the setting, which all seeds of it share."""
    changes: dict[str, Any]
    """The value of each key that the sweep changes, as in the sweep file."""
    job: JobConfig

    @property
    def files(self) -> RunFiles:
        return run_files(self.job.run.root, self.name)

    @property
    def steps(self) -> int | None:
        """The last step, or None if it is not known."""
        return self.job.run.steps(self.job.run.objective.tokens_per_sample)

    def child_of(self, parent: str | None) -> "Trial":
        """Return this trial with its run as a child of the MLflow run `parent`."""
        run = self.job.run
        run = replace(run, tracking=replace(run.tracking, parent=parent))
        return replace(self, job=replace(self.job, run=run))


def read_sweep(path: str) -> SweepConfig:
    """Read the sweep file at `path`."""
    return parse(SweepConfig, read_job(path))


def job_file(config: SweepConfig, path: str) -> str:
    """The path of the job file that the sweep file at `path` names."""
    return str(Path(path).parent / config.job)


def plan(config: SweepConfig, path: str, overrides: Sequence[str], root: str) -> list[Trial]:
    """All trials of the sweep file at `path`, with their runs in the folder `root`.

    Raises ValueError at the first job that is wrong or occurs twice.
    """
    file = job_file(config, path)
    first_seed = load(file, overrides).run.seed
    trials = []
    for setting, changes in _settings(config):
        for seed in range(first_seed, first_seed + config.seeds):
            name = "_".join(filter(None, [setting, f"seed-{seed}" if config.seeds > 1 else ""]))
            own: dict[str, Any] = {"run.name": name, "run.root": root}
            if config.seeds > 1:
                own["run.seed"] = seed
            try:
                job = load(file, [*overrides, *as_overrides(changes | own)])
            except ValueError as error:
                raise ValueError(f"trial {name}: {error}") from None
            trials.append(Trial(name=name, setting=setting or "the job", changes=changes, job=job))
    _refuse_twins(trials)
    if isinstance(config.scheduler, Asha):
        _check_rungs(config.scheduler, trials)
    return trials


def as_overrides(changes: Mapping[str, Any]) -> list[str]:
    """The changes as they would be typed on the command line: `a.b=c`."""
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def _settings(config: SweepConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the changes of each setting, in the order of the sweep file."""
    short = short_names(list(config.over))
    variants = [(variant["name"], _without_name(variant)) for variant in config.variants]
    lists = [
        [(f"{short[key]}-{slug}", key, value) for slug, value in _slugs(values)] for key, values in config.lists.items()
    ]
    samples = [(f"sample-{index:02d}", _draw_values(config, index)) for index in range(config.samples)]
    points = itertools.product(*lists)
    unchanged: list[tuple[str, dict[str, Any]]] = [("", {})]
    for (variant, fixed), point, (sample, drawn) in itertools.product(
        variants or unchanged, points, samples or unchanged
    ):
        listed = {key: value for _, key, value in point}
        labels = [label for label, _, _ in point]
        yield "_".join(filter(None, [variant, *labels, sample])), fixed | listed | drawn


def _without_name(variant: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in variant.items() if key != "name"}


def _draw_values(config: SweepConfig, index: int) -> dict[str, Any]:
    return {key: values.at(_share(config.sample_seed, key, index)) for key, values in config.ranges.items()}


def _share(seed: int, key: str, index: int) -> float:
    """A random number from 0 to 1 per key and sample; another key or sample changes no other."""
    return random.Random(f"{seed}/{key}/{index}").random()


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Shorten each key to its last parts, as many as tell all keys apart."""
    for parts in itertools.count(1):
        names = {key: ".".join(key.split(".")[-parts:]) for key in keys}
        if len(set(names.values())) == len(names):
            return names
    raise AssertionError("two keys are equal")


def _slugs(values: Sequence[Any]) -> list[tuple[str, Any]]:
    """Pair each value with a word for it that is valid in a name."""
    words = [_slug(value) for value in values]
    return [
        (word if words.count(word) == 1 else f"{word}.{index}", value)
        for index, (word, value) in enumerate(zip(words, values))
    ]


def _slug(value: Any) -> str:
    text = str(value.get("name", value) if isinstance(value, dict) else value)
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_")[:_LONGEST]


def _refuse_twins(trials: Sequence[Trial]) -> None:
    seen: dict[str, str] = {}
    for trial in trials:
        job = plain(trial.job)
        del job["run"]["name"]
        other = seen.setdefault(json.dumps(job, sort_keys=True), trial.name)
        if other != trial.name:
            raise ValueError(f"over: the trials {other} and {trial.name} are the same job; leave one of them out")


def _check_rungs(asha: Asha, trials: Sequence[Trial]) -> None:
    for trial in trials:
        steps = trial.steps
        every = trial.job.run.evaluate.every
        if steps is None:
            problem = f"asha needs to know the last step, but trial {trial.name} has only stop.hours"
            raise ValueError(f"scheduler: {problem}; set run.stop.steps or run.stop.tokens")
        if not 0 < every <= asha.grace_steps < steps:
            problem = f"{asha.grace_steps}, with run.evaluate.every {every} and {steps} steps in trial {trial.name}"
            advice = "evaluate at least as often as the first rung, and put that before the last step"
            raise ValueError(f"scheduler.grace_steps: {problem}; {advice}")
