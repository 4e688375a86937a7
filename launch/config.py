"""A job file: what to train (`run`) and where (`cluster`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from trainer.config import RunConfig, check
from trainer.parsing import parse, read_job
from trainer.run_folder import settle


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """One job."""

    run: RunConfig
    """What every worker gets."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """What no worker sees."""


def load(path: str, overrides: Sequence[str] = (), resume: bool = False) -> JobConfig:
    """The job at `path` with `overrides`, named, checked as far as it can be before anything starts."""
    job = parse(JobConfig, read_job(path, overrides))
    _check(job)
    return replace(job, run=settle(job.run, Path(path).stem, math.lcm(*job.cluster.sizes), resume))


def _check(job: JobConfig) -> None:
    """The job fits every number of workers that it may have."""
    for workers in job.cluster.sizes:
        check(job.run, workers)


def for_cluster(path: str, overrides: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """A name and the fields of a job that is to run elsewhere: checked here, settled there."""
    values = read_job(path, overrides)
    job = parse(JobConfig, values)
    _check(job)
    return job.run.name or Path(path).stem, values
