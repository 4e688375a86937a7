"""A job on its way to a cluster: decisions read the typed job, and the values of its file travel."""

from dataclasses import dataclass, replace

from cluster.config.cluster import ClusterConfig
from trainer.config import RunConfig
from trainer.parsing import Json


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job that was checked here, and is resolved where it will run."""

    name: str
    """The run's name, or the job file's."""
    run: RunConfig
    """What the workers will get."""
    cluster: ClusterConfig
    """Where they will run."""
    values: Json
    """The job file with its overrides, of which `run` and `cluster` were made."""
    resume: bool = False
    """Whether the job continues the run of that name."""

    def named(self, name: str) -> "Submission":
        """The same job, whose run is called `name`."""
        values = self.values | {"run": self.values["run"] | {"name": name}}
        return replace(self, run=replace(self.run, name=name), values=values)

    def tracked_at(self, uri: str) -> "Submission":
        """The same job, whose run is tracked at `uri`."""
        tracking = (self.values["run"].get("tracking") or {}) | {"uri": uri}
        values = self.values | {"run": self.values["run"] | {"tracking": tracking}}
        return replace(self, run=replace(self.run, tracking=replace(self.run.tracking, uri=uri)), values=values)
