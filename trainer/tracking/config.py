"""What MLflow is told: where it keeps a run, and what the run is."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.storage import absolute


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where MLflow keeps the run."""

    uri: str | None = None
    """Tracking store or server; null: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db where the command was typed."""
    experiment: str = "switchwork"
    """MLflow experiment."""
    enabled: bool = True
    """false: metrics.jsonl only."""
    drain_s: float = 60.0
    """How long the end of a run waits for a server that does not answer; what is unsent then stays in the run folder."""
    parent: str | None = None
    """Id of the MLflow run that this one belongs to; a sweep sets it in the runs of its trials."""


def tracking_uri(config: TrackingConfig) -> str:
    """The store that `config` means, with a relative sqlite path made absolute: workers run elsewhere."""
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        uri = f"sqlite:///{absolute(uri.removeprefix('sqlite:///'))}"
    return uri


@dataclass(frozen=True)
class RunFacts:
    """What MLflow is told of a run, once."""

    name: str
    data_name: str
    params: Mapping[str, object]
    tags: Mapping[str, str]
    manifest: Mapping[str, object]
