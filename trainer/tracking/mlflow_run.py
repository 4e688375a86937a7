"""One run in MLflow, made at the first attempt and found again by later ones. Importing this takes a second or two: do it in a thread."""

import getpass
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.data.http_dataset_source import HTTPDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag

from trainer.run_files import DATA_MANIFEST, RESOLVED, RunFiles
from trainer.tracking.config import RunFacts, TrackingConfig, tracking_uri

_BATCH = 900  # a request of MLflow takes 1,000 metrics
_KIND = {
    "mlflow.experimentKind": "custom_model_development"
}  # what MLflow's pages show first: training, not chat traces


def _make_store(file: Path) -> None:
    """Have MLflow's tables in the SQLite file `file`, which appears whole: MLflow's own way takes two seconds of statements, and a worker
    that is killed in between leaves a store that no MLflow opens again."""
    if file.exists():
        return
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as scratch:
        made = Path(scratch) / file.name
        MlflowClient(f"sqlite:///{made}").search_experiments()
        try:
            os.link(made, file)
        except FileExistsError:
            pass  # another run was first
        except OSError:  # no hard links here
            os.replace(made, file)


def open_store(config: TrackingConfig) -> MlflowClient:
    """A client of the store that `config` means; a SQLite file that is not there is made."""
    uri = tracking_uri(config)
    if uri.startswith("sqlite:///"):
        _make_store(Path(uri.removeprefix("sqlite:///")))
    return MlflowClient(uri)


def begin_run(client: MlflowClient, config: TrackingConfig, name: str) -> str:
    """The id of a new run in the experiment that `config` names."""
    experiment = client.get_experiment_by_name(config.experiment)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(config.experiment, tags=_KIND)
    tags = {"mlflow.user": getpass.getuser(), "mlflow.source.name": "switchwork"}
    return str(client.create_run(experiment_id, run_name=name, tags=tags).info.run_id)


class MlflowRun:
    """One MLflow run: made at the first attempt, found again at later ones."""

    def __init__(self, files: RunFiles, config: TrackingConfig, facts: RunFacts):
        self.files, self.facts = files, facts
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
        params = [Param(key, str(value)[:6000]) for key, value in self.facts.params.items()]
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
        source = HTTPDatasetSource(url=f"{DATA_MANIFEST}#{manifest['digest']}")  # the artifact that lists every file
        dataset = MetaDataset(source, name=self.facts.data_name, digest=str(manifest["digest"])[:36])  # type: ignore[abstract]
        self.client.log_inputs(
            run_id, [DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", "training")])]
        )

    def send_rows(self) -> None:
        """Send the lines that MLflow does not have. A step that an earlier attempt has sent is not sent again: it is a replay."""
        sent, metrics = self.sent.copy(), list[Metric]()
        rows, sent["sent_bytes"] = self.files.metrics_from(sent["sent_bytes"])
        for row in rows:
            if row.attempt != sent["attempt"] or row.step < sent.get(
                "step", 0
            ):  # a later attempt, or one that went back to a checkpoint
                sent |= {"attempt": row.attempt, "replayed_until": sent["last_step"]}
            sent["step"] = row.step
            if row.step > sent["replayed_until"]:
                metrics += [Metric(name, value, int(row.time * 1000), row.step) for name, value in row.metrics.items()]
                sent["last_step"] = max(sent["last_step"], row.step)
        for start in range(0, len(metrics), _BATCH):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + _BATCH])
        if sent != self.sent:
            self.sent = sent
            self.files.write_sent(sent)

    def send_file(self, file: Path) -> None:
        self.client.log_artifact(self.run_id, str(file))

    def _tag_ends(self) -> None:
        """Why each attempt so far ended, as a tag of the run."""
        for end in self.files.attempts_ended():
            self.client.set_tag(self.run_id, f"attempt_{end.attempt}_ended", str(end.stopped))

    def close(self, status: str) -> None:
        self._tag_ends()
        self.client.set_terminated(self.run_id, status)


_LONGEST = 6000  # characters of a parameter that MLflow takes


class SweepRun:
    """Made when the sweep in the folder of `files` begins, found again when it goes on; `params` are told to MLflow once."""

    def __init__(self, files: RunFiles, config: TrackingConfig, name: str, params: Mapping[str, Any]):
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # the command prints what a person is to see
        self.client = open_store(config)
        if run_id := files.mlflow_run_id():
            self.run_id = run_id
            self.client.update_run(self.run_id, status="RUNNING")
            return
        self.run_id = begin_run(self.client, config, name)
        for key, value in params.items():
            self.client.log_param(self.run_id, key, str(value)[:_LONGEST])
        self.client.set_tag(self.run_id, "run_folder", files.folder.url)
        files.write_mlflow_run_id(self.run_id)

    def close(self, status: str, figures: Mapping[str, float], tags: Mapping[str, str], files: Sequence[Path]) -> None:
        """Keep what came out, and close the run with `status`: FINISHED, FAILED or KILLED."""
        for name, figure in figures.items():
            self.client.log_metric(self.run_id, name, figure)
        for name, text in tags.items():
            self.client.set_tag(self.run_id, name, text)
        for file in files:
            self.client.log_artifact(self.run_id, str(file))
        self.client.set_terminated(self.run_id, status)
