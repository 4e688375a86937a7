"""The trials of a sweep: a job each, resolved and checked as `switchwork train` does it, before the first one starts."""

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
    """One job of a sweep."""

    name: str
    """Also of its run, and of the run's folder."""
    setting: str
    """The same for all seeds."""
    changes: dict[str, Any]
    """Key -> value, as the sweep file has it."""
    job: JobConfig

    @property
    def files(self) -> RunFiles:
        return run_files(self.job.run.root, self.name)

    @property
    def steps(self) -> int | None:
        """The last step, where it is known."""
        return self.job.run.steps(self.job.run.objective.tokens_per_sample)

    def child_of(self, parent: str | None) -> "Trial":
        """This trial, its run a child of the MLflow run `parent`."""
        run = self.job.run
        return replace(self, job=replace(self.job, run=replace(run, tracking=replace(run.tracking, parent=parent))))


def read_sweep(path: str) -> SweepConfig:
    """The sweep file at `path`."""
    return parse(SweepConfig, read_job(path))


def job_file(config: SweepConfig, path: str) -> str:
    """The job file of the sweep file at `path`."""
    return str(Path(path).parent / config.job)


def plan(config: SweepConfig, path: str, overrides: Sequence[str], root: str) -> list[Trial]:
    """All trials of the sweep file at `path`, whose runs are in `root`. Raises ValueError for the first job that is wrong, or is there twice."""
    file = job_file(config, path)
    first, trials = load(file, overrides).run.seed, []
    for setting, changes in _settings(config):
        for seed in range(first, first + config.seeds):
            name = "_".join(filter(None, [setting, f"seed-{seed}" if config.seeds > 1 else ""]))
            ours = {"run.name": name, "run.root": root} | ({"run.seed": seed} if config.seeds > 1 else {})
            try:
                job = load(file, [*overrides, *as_overrides(changes | ours)])
            except ValueError as error:
                raise ValueError(f"trial {name}: {error}") from None
            trials.append(Trial(name=name, setting=setting or "the job", changes=changes, job=job))
    _refuse_twins(trials)
    if isinstance(config.scheduler, Asha):
        _check_rungs(config.scheduler, trials)
    return trials


def as_overrides(changes: Mapping[str, Any]) -> list[str]:
    """As they would be typed: `a.b=c`."""
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def _settings(config: SweepConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and changes of each setting, in the order of the file."""
    short = short_names(list(config.over))
    variants = [
        (each["name"], {key: value for key, value in each.items() if key != "name"}) for each in config.variants
    ] or [("", {})]
    lists = [
        [(f"{short[key]}-{slug}", key, value) for slug, value in _slugs(values)] for key, values in config.lists.items()
    ]
    draws: list[tuple[str, dict[str, Any]]] = [
        (
            f"sample-{index:02d}",
            {key: values.at(_share(config.sample_seed, key, index)) for key, values in config.ranges.items()},
        )
        for index in range(config.samples)
    ]
    for (variant, fixed), point, (sample, drawn) in itertools.product(
        variants, itertools.product(*lists), draws or [("", {})]
    ):
        listed = {key: value for _, key, value in point}
        yield "_".join(filter(None, [variant, *(label for label, _, _ in point), sample])), fixed | listed | drawn


def _share(seed: int, key: str, index: int) -> float:
    """A number between 0 and 1 that depends on nothing else, so that one more key or sample changes no other."""
    return random.Random(f"{seed}/{key}/{index}").random()


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each key by its last parts, by as many as tell all of them apart."""
    for parts in itertools.count(1):
        names = {key: ".".join(key.split(".")[-parts:]) for key in keys}
        if len(set(names.values())) == len(names):
            return names
    raise AssertionError("keys of a mapping differ")


def _slugs(values: Sequence[Any]) -> list[tuple[str, Any]]:
    """Each value with a word for it that can stand in a name."""
    words = [
        re.sub(r"[^A-Za-z0-9.-]+", "_", str(value.get("name", value) if isinstance(value, dict) else value)).strip("_")[
            :_LONGEST
        ]
        for value in values
    ]
    return [
        (word if words.count(word) == 1 else f"{word}.{index}", value)
        for index, (word, value) in enumerate(zip(words, values))
    ]


def _refuse_twins(trials: Sequence[Trial]) -> None:
    seen: dict[str, str] = {}
    for trial in trials:
        job = plain(trial.job)
        del job["run"]["name"]
        if (other := seen.setdefault(json.dumps(job, sort_keys=True), trial.name)) != trial.name:
            raise ValueError(f"over: the trials {other} and {trial.name} are the same job; leave one of them out")


def _check_rungs(asha: Asha, trials: Sequence[Trial]) -> None:
    for trial in trials:
        steps, every = trial.steps, trial.job.run.evaluate.every
        if steps is None:
            raise ValueError(
                f"scheduler: asha needs to know the last step, but trial {trial.name} has only stop.hours; set run.stop.steps or run.stop.tokens"
            )
        if not 0 < every <= asha.grace_steps < steps:
            fix = "evaluate at least as often as the first rung, and put that before the last step"
            raise ValueError(
                f"scheduler.grace_steps: {asha.grace_steps}, with run.evaluate.every {every} and {steps} steps in trial {trial.name}; {fix}"
            )
