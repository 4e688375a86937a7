"""The MLflow run of a training run, and that of a sweep.

Importing this module takes a second or two, so import it in a thread.
"""

import getpass
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.data.http_dataset_source import HTTPDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag

from trainer.run_files import DATA_MANIFEST, RESOLVED, RunFiles
from trainer.tracking.config import RunFacts, TrackingConfig, tracking_uri

_MAX_METRICS = 900
"""Metrics per request; MLflow accepts at most 1,000."""
_MAX_CHARACTERS = 6000
"""Characters of a parameter that MLflow accepts."""
_KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Makes MLflow's pages show training first, rather than chat traces."""


def _make_store(file: Path) -> None:
    """Create MLflow's tables in the SQLite file `file` atomically.

    MLflow itself needs two seconds of statements; a worker killed in between would leave a file
    that MLflow cannot open.
    """
    if file.exists():
        return
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as scratch:
        complete = Path(scratch) / file.name
        MlflowClient(f"sqlite:///{complete}").search_experiments()
        try:
            os.link(complete, file)
        except FileExistsError:
            pass  # another run has created it
        except OSError:  # the file system has no hard links
            os.replace(complete, file)


def open_store(config: TrackingConfig) -> MlflowClient:
    """Open the store that `config` means; a missing SQLite file is created."""
    uri = tracking_uri(config)
    if uri.startswith("sqlite:///"):
        _make_store(Path(uri.removeprefix("sqlite:///")))
    return MlflowClient(uri)


def begin_run(client: MlflowClient, config: TrackingConfig, name: str) -> str:
    """Create a run in the experiment that `config` names, and return its id."""
    experiment = client.get_experiment_by_name(config.experiment)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(config.experiment, tags=_KIND)
    tags = {"mlflow.user": getpass.getuser(), "mlflow.source.name": "switchwork"}
    return str(client.create_run(experiment_id, run_name=name, tags=tags).info.run_id)


class MlflowRun:
    """The MLflow run of a run: created by the first attempt, reopened by later ones."""

    def __init__(self, files: RunFiles, config: TrackingConfig, facts: RunFacts):
        self.files = files
        self.facts = facts
        self.client = open_store(config)
        self.sent = files.sent()
        if run_id := files.mlflow_run_id():
            self.run_id = run_id
            self.client.update_run(self.run_id, status="RUNNING")
            self._tag_ends()
        else:
            self.run_id = self._create(config)

    def _create(self, config: TrackingConfig) -> str:
        run_id = begin_run(self.client, config, self.facts.name)
        params = [Param(key, str(value)[:_MAX_CHARACTERS]) for key, value in self.facts.params.items()]
        tags = [RunTag(key, value) for key, value in self.facts.tags.items()]
        for start in range(0, max(1, len(params)), 100):
            self.client.log_batch(run_id, params=params[start : start + 100], tags=tags if start == 0 else [])
        self._log_input(run_id)
        self.client.log_text(run_id, self.files.job_text(), RESOLVED)
        self.client.log_dict(run_id, dict(self.facts.manifest), DATA_MANIFEST)
        self.files.write_mlflow_run_id(run_id)
        return run_id

    def _log_input(self, run_id: str) -> None:
        manifest = self.facts.manifest
        source = HTTPDatasetSource(url=f"{DATA_MANIFEST}#{manifest['digest']}")  # the artifact lists every file
        digest = str(manifest["digest"])[:36]
        dataset = MetaDataset(source, name=self.facts.data_name, digest=digest)  # type: ignore[abstract]
        context = InputTag("mlflow.data.context", "training")
        self.client.log_inputs(run_id, [DatasetInput(dataset._to_mlflow_entity(), [context])])

    def send_rows(self) -> None:
        """Send the rows that MLflow lacks, except replays of steps that were sent before."""
        sent = self.sent.copy()
        metrics: list[Metric] = []
        rows, sent["sent_bytes"] = self.files.metrics_from(sent["sent_bytes"])
        for row in rows:
            rolled_back = row.step < sent.get("step", 0)
            if row.attempt != sent["attempt"] or rolled_back:
                sent |= {"attempt": row.attempt, "replayed_until": sent["last_step"]}
            sent["step"] = row.step
            if row.step > sent["replayed_until"]:
                metrics += [Metric(name, value, int(row.time * 1000), row.step) for name, value in row.metrics.items()]
                sent["last_step"] = max(sent["last_step"], row.step)
        for start in range(0, len(metrics), _MAX_METRICS):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + _MAX_METRICS])
        if sent != self.sent:
            self.sent = sent
            self.files.write_sent(sent)

    def send_file(self, file: Path) -> None:
        self.client.log_artifact(self.run_id, str(file))

    def _tag_ends(self) -> None:
        """Record the reason why each attempt ended as a tag of the run."""
        for end in self.files.attempts_ended():
            self.client.set_tag(self.run_id, f"attempt_{end.attempt}_ended", str(end.stopped))

    def close(self, status: str) -> None:
        self._tag_ends()
        self.client.set_terminated(self.run_id, status)


class SweepRun:
    """The MLflow run of a sweep: created when the sweep begins, reopened when it continues.

    `files` are those of the sweep's folder. MLflow receives `params` once.
    """

    def __init__(self, files: RunFiles, config: TrackingConfig, name: str, params: Mapping[str, object]):
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # the command prints its own messages
        self.client = open_store(config)
        if run_id := files.mlflow_run_id():
            self.run_id = run_id
            self.client.update_run(self.run_id, status="RUNNING")
            return
        self.run_id = begin_run(self.client, config, name)
        for key, value in params.items():
            self.client.log_param(self.run_id, key, str(value)[:_MAX_CHARACTERS])
        self.client.set_tag(self.run_id, "run_folder", files.folder.url)
        files.write_mlflow_run_id(self.run_id)

    def close(self, status: str, metrics: Mapping[str, float], tags: Mapping[str, str], files: Sequence[Path]) -> None:
        """Log the results, and close the run with `status`: FINISHED, FAILED or KILLED."""
        for name, value in metrics.items():
            self.client.log_metric(self.run_id, name, value)
        for name, text in tags.items():
            self.client.set_tag(self.run_id, name, text)
        for file in files:
            self.client.log_artifact(self.run_id, str(file))
        self.client.set_terminated(self.run_id, status)
