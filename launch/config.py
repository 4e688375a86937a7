"""A job file: what to train (`run`) and where (`cluster`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.config.cluster import ClusterConfig
from cluster.submission import Submission
from trainer.config import RunConfig, check
from trainer.parsing import parse, read_job
from trainer.settle import resolve_run


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
    return replace(job, run=resolve_run(job.run, Path(path).stem, math.lcm(*job.cluster.sizes), resume))


def _check(job: JobConfig) -> None:
    """The job fits every number of workers that it may have."""
    for workers in job.cluster.sizes:
        check(job.run, workers)


def expert_ranks(job: JobConfig) -> dict[int, int]:
    """The number of ranks that share a set of experts, by every number of workers that the job may have."""
    return {workers: job.run.ep(workers) for workers in job.cluster.sizes}


def for_cluster(path: str, overrides: Sequence[str], resume: bool = False) -> Submission:
    """The job at `path` with `overrides`, checked here, to be resolved where it will run."""
    values = read_job(path, overrides)
    job = parse(JobConfig, values)
    _check(job)
    return Submission(
        name=job.run.name or Path(path).stem, run=job.run, cluster=job.cluster, values=values, resume=resume
    )
