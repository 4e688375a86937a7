"""A job file: a training run (`run`) and the cluster that it uses (`cluster`)."""

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
    """A job: a training run and its cluster."""

    run: RunConfig
    """The training run; every worker gets this part of the job."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The number of workers and their machines; no worker sees this part of the job."""


def load(path: str, overrides: Sequence[str] = (), resume: bool = False) -> JobConfig:
    """Read the job at `path` with `overrides`; check it, and resolve its run on this machine.

    Raises ValueError for every mistake that shows before anything starts.
    """
    job = parse(JobConfig, read_job(path, overrides))
    _check(job)
    return replace(job, run=resolve_run(job.run, Path(path).stem, math.lcm(*job.cluster.sizes), resume))


def _check(job: JobConfig) -> None:
    """Raises ValueError unless the job fits every number of workers that it may have."""
    for workers in job.cluster.sizes:
        check(job.run, workers)


def expert_ranks(job: JobConfig) -> dict[int, int]:
    """The number of ranks that share one set of experts, by the number of workers of the job."""
    return {workers: job.run.ep(workers) for workers in job.cluster.sizes}


def for_cluster(path: str, overrides: Sequence[str], resume: bool = False) -> Submission:
    """Read and check the job at `path` with `overrides`; the cluster resolves its run."""
    values = read_job(path, overrides)
    job = parse(JobConfig, values)
    _check(job)
    return Submission(
        name=job.run.name or Path(path).stem, run=job.run, cluster=job.cluster, values=values, resume=resume
    )
