"""The part of a job file about MLflow, and the facts about a run that MLflow receives."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.storage import absolute


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """The place in which MLflow keeps the run."""

    uri: str | None = None
    """URI of the tracking store or server.

    null: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the folder where the command was typed.
    """
    experiment: str = "switchwork"
    """Name of the MLflow experiment that contains the run."""
    enabled: bool = True
    """Whether to send the run to MLflow. false: metrics are only written to metrics.jsonl."""
    drain_s: float = 60.0
    """Seconds that the end of a run waits for a server that does not answer.

    Metrics that are still unsent then stay in the run folder.
    """
    parent: str | None = None
    """Id of the MLflow run that this run belongs to; a sweep sets it in the runs of its trials."""


def tracking_uri(config: TrackingConfig) -> str:
    """The store that `config` means; a relative SQLite path becomes absolute for the workers."""
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        uri = f"sqlite:///{absolute(uri.removeprefix('sqlite:///'))}"
    return uri


@dataclass(frozen=True)
class RunFacts:
    """The facts about a run that MLflow receives once."""

    name: str
    data_name: str
    params: Mapping[str, object]
    tags: Mapping[str, str]
    manifest: Mapping[str, object]
