"""Metrics of a run: every logged step as a line of `metrics.jsonl`, and from there to MLflow, in a thread of its own.

`metrics.jsonl` is the spool: how far MLflow has it stands in `mlflow.json` beside it, so a slow or dead tracking server
never blocks a step, and what it missed is sent when it is back, by a later attempt if need be. Only rank 0 has a tracker.
"""

import getpass
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.storage import Folder, absolute

_BATCH = 900  # a request of MLflow takes 1,000 metrics
_SAY_AFTER = 3
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # what MLflow's pages show first: training, not chat traces


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
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    manifest: Mapping[str, Any]


class Tracker(Protocol):
    """What the hooks write to."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Write down the figures of one step."""

    def keep(self, file: Path) -> None:
        """Have `file` as an artifact of the run."""

    def finish(self, status: str) -> None:
        """Send what is left, and close the run with `status`: FINISHED, FAILED or KILLED."""


class NullTracker:
    """All ranks but the first."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        pass

    def keep(self, file: Path) -> None:
        pass

    def finish(self, status: str) -> None:
        pass


class JsonlTracker:
    """Lines of `metrics.jsonl` in the run folder; each has the step, the time and the attempt."""

    def __init__(self, folder: Folder, attempt: int):
        self.folder, self.attempt, self.unwritten = folder, attempt, b""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        row = {"step": step, "time": round(time.time(), 3), "attempt": self.attempt, **{k: v if math.isfinite(v) else str(v) for k, v in figures.items()}}
        self.unwritten += (json.dumps(row) + "\n").encode()
        with suppress(OSError):  # a full disk: the lines are kept, and written with later ones
            self.folder.append("metrics.jsonl", self.unwritten)
            self.unwritten = b""

    def keep(self, file: Path) -> None:
        pass

    def finish(self, status: str) -> None:
        pass


class MlflowTracker(JsonlTracker):
    """The same lines, sent to MLflow by a thread that reads them from the file."""

    def __init__(self, folder: Folder, attempt: int, config: TrackingConfig, facts: RunFacts, say: Callable[[str], None]):
        super().__init__(folder, attempt)
        self.config, self.facts, self.say = config, facts, say
        self.files: list[Path] = []
        self.status: str | None = None
        self.wake = threading.Event()
        self.thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self.thread.start()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        super().log(step, figures)
        self.wake.set()

    def keep(self, file: Path) -> None:
        self.files.append(file)
        self.wake.set()

    def finish(self, status: str) -> None:
        self.status = status
        self.wake.set()
        self.thread.join(self.config.drain_s)
        if self.thread.is_alive():
            waited = f"MLflow at {tracking_uri(self.config)} has not taken all figures within {self.config.drain_s:.0f} s"
            self.say(f"{waited}; they are in {self.folder}/metrics.jsonl, and --resume sends them")

    def _run(self) -> None:
        """Try until all is sent and the run is closed; after a failure wait, twice as long each time up to a minute."""
        failures, sender = 0, None
        self.wake.wait()  # importing MLflow takes a second or two: not while the first step is under way
        while True:
            try:
                if sender is None:
                    sender = _Sender(self.folder, self.config, self.facts)
                self.wake.clear()
                ending = self.status  # read before sending: what was logged before finish() is then sent as well
                sender.send_rows()
                while self.files:
                    sender.send_file(self.files[0])
                    self.files.pop(0)
                if ending is not None:
                    sender.close(ending)
                    return
                failures = 0
                self.wake.wait()
            except Exception as error:  # a tracking server fails in as many ways as there are; none may end the run
                failures += 1
                if failures == _SAY_AFTER:
                    cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                    self.say(f"MLflow does not take figures ({cause}); training goes on, they are kept and sent later")
                time.sleep(min(60.0, 0.5 * 2**failures))


class _Sender:
    """One MLflow run: made at the first attempt, found again at later ones."""

    def __init__(self, folder: Folder, config: TrackingConfig, facts: RunFacts):
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        self.folder, self.facts = folder, facts
        self.client = MlflowClient(tracking_uri(config))
        self.place: dict[str, Any] = {"sent_bytes": 0, "attempt": 0, "last_step": -1, "replayed_until": -1}
        if folder.exists("mlflow.json"):
            self.place = json.loads(folder.read("mlflow.json"))
        if folder.exists("mlflow_run_id"):
            self.run_id = folder.read("mlflow_run_id").decode().strip()
            self.client.update_run(self.run_id, status="RUNNING")
            self._tag_ends()
        else:
            self.run_id = self._create(config)

    def _create(self, config: TrackingConfig) -> str:
        from mlflow.entities import Param, RunTag

        experiment = self.client.get_experiment_by_name(config.experiment)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(config.experiment, tags=_KIND)
        run_id = str(
            self.client.create_run(
                experiment_id, run_name=self.facts.name, tags={"mlflow.user": getpass.getuser(), "mlflow.source.name": "switchwork"}
            ).info.run_id
        )
        params = [Param(key, str(value)[:6000]) for key, value in self.facts.params.items()]
        tags = [RunTag(key, value) for key, value in self.facts.tags.items()]
        for start in range(0, max(1, len(params)), 100):
            self.client.log_batch(run_id, params=params[start : start + 100], tags=tags if start == 0 else [])
        self._log_input(run_id)
        self.client.log_text(run_id, self.folder.read("resolved.yaml").decode(), "resolved.yaml")
        self.client.log_dict(run_id, dict(self.facts.manifest), "data_manifest.json")
        self.folder.write("mlflow_run_id", run_id.encode())
        return run_id

    def _log_input(self, run_id: str) -> None:
        from mlflow.data.http_dataset_source import HTTPDatasetSource
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag

        manifest = self.facts.manifest
        source = HTTPDatasetSource(url=f"data_manifest.json#{manifest['digest']}")  # the artifact that lists every file
        dataset = MetaDataset(source, name=self.facts.data_name, digest=str(manifest["digest"])[:36])  # type: ignore[abstract]
        self.client.log_inputs(run_id, [DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", "training")])])

    def send_rows(self) -> None:
        """Send the lines that MLflow does not have. A step that an earlier attempt has sent is not sent again: it is a replay."""
        from mlflow.entities import Metric

        if not self.folder.exists("metrics.jsonl"):
            return
        place, metrics = dict(self.place), []
        for line in self.folder.read("metrics.jsonl")[place["sent_bytes"] :].splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            place["sent_bytes"] += len(line)
            row = json.loads(line)
            step, when, attempt = row.pop("step"), int(row.pop("time") * 1000), row.pop("attempt")
            if attempt != place["attempt"] or step < place.get("step", 0):  # a later attempt, or one that went back to a checkpoint
                place |= {"attempt": attempt, "replayed_until": place["last_step"]}
            place["step"] = step
            if step > place["replayed_until"]:
                metrics += [Metric(key, float(value), when, step) for key, value in row.items()]
                place["last_step"] = max(place["last_step"], step)
        for start in range(0, len(metrics), _BATCH):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + _BATCH])
        if place != self.place:
            self.place = place
            self.folder.write("mlflow.json", json.dumps(place).encode())

    def send_file(self, file: Path) -> None:
        self.client.log_artifact(self.run_id, str(file))

    def _tag_ends(self) -> None:
        """Why each attempt so far ended, as a tag of the run."""
        for line in map(json.loads, self.folder.read("attempts.jsonl").splitlines()):
            if "ended" in line:
                self.client.set_tag(self.run_id, f"attempt_{line['attempt']}_ended", line["ended"])

    def close(self, status: str) -> None:
        self._tag_ends()
        self.client.set_terminated(self.run_id, status)
