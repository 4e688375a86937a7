"""A job on its way to a cluster.

Decisions are made from the typed job; the values of its file are sent.
"""

from dataclasses import dataclass, replace
from typing import TypedDict

from cluster.config.cluster import ClusterConfig
from trainer.config import RunConfig
from trainer.parsing import Json


class PodJob(TypedDict):
    """A job as JSON in SWITCHWORK_JOB, from which the head pod of a RayJob reads it."""

    id: str
    """Name of the RayJob, the same for every try."""
    resume: bool
    """Whether the job continues an existing run."""
    job: Json
    """The job file's values with the run's name."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job that is checked on this machine and resolved on the cluster."""

    name: str
    """Name of the run if it has one, else of the job file."""
    run: RunConfig
    """The run, as the workers will get it."""
    cluster: ClusterConfig
    """The workers and where they will run."""
    values: Json
    """The job file with its overrides, from which `run` and `cluster` were parsed."""
    resume: bool = False
    """Whether the job continues an existing run."""

    def named(self, name: str) -> "Submission":
        """The same job, with `name` as the name of its run."""
        values = self.values | {"run": self.values["run"] | {"name": name}}
        return replace(self, run=replace(self.run, name=name), values=values)

    def tracked_at(self, uri: str) -> "Submission":
        """The same job, with its run tracked at `uri`."""
        tracking = (self.values["run"].get("tracking") or {}) | {"uri": uri}
        values = self.values | {"run": self.values["run"] | {"tracking": tracking}}
        return replace(self, run=replace(self.run, tracking=replace(self.run.tracking, uri=uri)), values=values)
