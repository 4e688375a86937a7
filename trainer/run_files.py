"""The folder of a run: its files, the type of their content, and their writers.

    resolved.yaml        Job: the job, enough to repeat the run             the command
    attempts.jsonl       AttemptBegan and AttemptEnded                      rank 0, or Ray for it
    ends/                AttemptEnded: a file per rank that knows a cause   every rank, and Ray
    events.jsonl         Event: what happened, for people and programs      rank 0
    metrics.jsonl        MetricsRow: every logged step                      rank 0
    anomalies.jsonl      Anomaly: steps whose batch was skipped             rank 0
    faults.jsonl         Fault: faults that were injected                   the rank that fails
    ledger.jsonl         Line: the samples that the weights have seen       rank 0
    data_manifest.json   Manifest: the data, frozen when the run began      rank 0
    goodput.json         GoodputRow per attempt                             rank 0
    first_step.json      seconds from the command to the first step         rank 0
    checkpoints/         a folder per checkpoint                            every rank
    samples/             texts and images, by step                          rank 0
    profile/             traces of the profiler                             rank 0
    stacks/              stack traces of ranks that hung                    the rank's watchdog
    stop                 Stopped: a request to save and leave               anyone, also by hand
    summary.json         Summary: the final metrics, for programs           rank 0, at the end
    curves.png, expert_load.png   pictures of the metrics                   rank 0, at the end
    mlflow_run_id        id of the run in MLflow                            rank 0
    mlflow.json          Sent: how far MLflow has the metrics               rank 0
    rules_audit.jsonl, rules_audit.head   decisions of rules, chained       rules/log.py
    evals/               answers to tasks, and metrics of lm-eval           `switchwork eval`
    audit.json, evidence.safetensors   findings of an audit, its evidence   `switchwork audit`
    failure              why the workers of a sweep's trial failed          `switchwork sweep`
    job_id               id of the Kubernetes job that trains here          the job's head pod
    ray/                 Ray's own files                                    Ray

No other module names these files. The folder of a sweep also has `stop`, `mlflow_run_id` and
`ray/`. A file that ends in .jsonl has a row per line; a last line that was cut off is ignored. Line
is in data/ledger.py, Manifest in data/manifest.py, Stopped in trainer/endings.py, and every other
type in trainer/run_rows.py.

This module needs no torch, because the command and Ray's controller import it as well.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from trainer.endings import Stopped
from trainer.run_rows import (
    Anomaly,
    AttemptBegan,
    AttemptEnded,
    Event,
    Fault,
    GoodputRow,
    Job,
    MetricsRow,
    Sent,
    Summary,
)
from trainer.storage import Folder

if TYPE_CHECKING:  # the command and Ray's controller must not import the modules that read data
    from data.ledger import Line
    from data.manifest import Manifest

RESOLVED = "resolved.yaml"
SUMMARY = "summary.json"
DATA_MANIFEST = "data_manifest.json"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
ATTEMPTS = "attempts.jsonl"
LEDGER = "ledger.jsonl"
CURVES = "curves.png"
EXPERT_LOAD = "expert_load.png"
RULES_LOG = "rules_audit.jsonl"
RULES_HEAD = "rules_audit.head"
AUDIT = "audit.json"
_ANOMALIES = "anomalies.jsonl"
_FAULTS = "faults.jsonl"
_GOODPUT = "goodput.json"
_FIRST_STEP = "first_step.json"
_MLFLOW = "mlflow.json"
_MLFLOW_RUN_ID = "mlflow_run_id"
_STOP = "stop"
_FAILURE = "failure"
_JOB_ID = "job_id"
_EVIDENCE = "evidence.safetensors"
_CHECKPOINTS = "checkpoints"
_SAMPLES = "samples"
_PROFILE = "profile"
_STACKS = "stacks"
_ENDS = "ends"
_EVALS = "evals"
_RAY = "ray"
_LM_EVAL = "harness.json"


@dataclass(frozen=True)
class RunFiles:
    """Reads and writes the files of a run folder; a missing file reads as nothing, or None."""

    folder: Folder

    def __str__(self) -> str:
        return str(self.folder)

    # The job

    @property
    def has_job(self) -> bool:
        """Whether the folder belongs to a run."""
        return self.folder.exists(RESOLVED)

    def job(self) -> Job:
        """Return the resolved job."""
        return cast(Job, yaml.safe_load(self.folder.read(RESOLVED)))

    def job_text(self) -> str:
        """Return the resolved job, as YAML."""
        return self.folder.read(RESOLVED).decode()

    def write_job(self, job: Job) -> None:
        """Write the resolved job."""
        self.folder.write(RESOLVED, yaml.safe_dump(dict(job), sort_keys=False).encode())

    def job_id(self) -> str | None:
        """Return the id of the Kubernetes job that trains in this folder."""
        return self._text(_JOB_ID)

    def write_job_id(self, job_id: str) -> None:
        self.folder.write(_JOB_ID, job_id.encode())

    # Attempts

    @property
    def has_begun(self) -> bool:
        """Whether any attempt has begun."""
        return self.folder.exists(ATTEMPTS)

    def attempts_begun(self) -> list[AttemptBegan]:
        """Return the beginning of each attempt, in order."""
        return [AttemptBegan.from_row(row) for row in self.folder.lines(ATTEMPTS) if "ended" not in row]

    def attempts_ended(self) -> list[AttemptEnded]:
        """Return the end of each attempt that is known to be over."""
        return [AttemptEnded.from_row(row) for row in self.folder.lines(ATTEMPTS) if "ended" in row]

    def add_attempt(self, row: AttemptBegan | AttemptEnded) -> None:
        self.folder.append_line(ATTEMPTS, row.to_row())

    def causes(self, attempt: int) -> list[AttemptEnded]:
        """Return the ends of an attempt as the ranks and Ray have reported them."""
        ends = self.folder / _ENDS
        names = [name for name in ends.names() if name.startswith(f"attempt-{attempt}-")]
        return [AttemptEnded.from_row(json.loads(ends.read(name))) for name in names]

    def add_cause(self, end: AttemptEnded) -> None:
        """Report the end of an attempt, in a file of its own.

        All ranks may write at the same time, and object stores cannot append.
        """
        name = f"attempt-{end.attempt}-{end.by.replace(' ', '-')}.json"
        (self.folder / _ENDS).make().write(name, json.dumps(end.to_row()).encode())

    def write_stacks(self, rank: int, attempt: int, stacks: bytes) -> str:
        """Write the stack traces of a rank that hangs; returns the file, relative to the folder."""
        name = f"rank-{rank}-attempt-{attempt}.txt"
        (self.folder / _STACKS).make().write(name, stacks)
        return f"{_STACKS}/{name}"

    # What happens during training

    def events(self) -> list[Event]:
        return self.events_from(0)[0]

    def events_from(self, start: int) -> tuple[list[Event], int]:
        """Return the events from byte `start` on, and the byte where the next one will begin."""
        rows, end = self.folder.lines_from(EVENTS, start)
        return [Event.from_row(row) for row in rows], end

    def add_event(self, event: Event) -> None:
        self.folder.append_line(EVENTS, event.to_row())

    def metrics(self) -> list[MetricsRow]:
        return self.metrics_from(0)[0]

    def metrics_from(self, start: int) -> tuple[list[MetricsRow], int]:
        """Return the metrics from byte `start` on, and the byte where the next row will begin."""
        rows, end = self.folder.lines_from(METRICS, start)
        return [MetricsRow.from_row(row) for row in rows], end

    def append_metrics(self, rows: bytes) -> None:
        """Append rows, as whole lines."""
        self.folder.append(METRICS, rows)

    def anomalies(self) -> list[Anomaly]:
        return cast(list[Anomaly], self.folder.lines(_ANOMALIES))

    def add_anomaly(self, anomaly: Anomaly) -> None:
        self.folder.append_line(_ANOMALIES, anomaly)

    def faults(self) -> list[Fault]:
        return cast(list[Fault], self.folder.lines(_FAULTS))

    def add_fault(self, fault: Fault) -> None:
        self.folder.append_line(_FAULTS, fault)

    def goodput(self) -> list[GoodputRow]:
        """Return a row per attempt."""
        return cast(list[GoodputRow], self._json(_GOODPUT).get("attempts", []))

    def write_goodput(self, rows: Sequence[GoodputRow]) -> None:
        self.folder.write(_GOODPUT, json.dumps({"attempts": list(rows)}, indent=1).encode())

    # Data

    def data_manifest(self) -> "Manifest | None":
        """Return the manifest of the data, as frozen at the run's start."""
        return cast("Manifest | None", self._json(DATA_MANIFEST) or None)

    def write_data_manifest(self, manifest: Mapping[str, object]) -> None:
        self.folder.write(DATA_MANIFEST, json.dumps(dict(manifest), indent=1).encode())

    def ledger(self) -> "list[Line]":
        return cast("list[Line]", self.folder.lines(LEDGER))

    def add_to_ledger(self, row: Mapping[str, object]) -> None:
        self.folder.append_line(LEDGER, row)

    # The end

    def stop_request(self) -> Stopped | None:
        """Return why the run is asked to stop; None if it is not."""
        return Stopped.from_request(self.folder.read(_STOP)) if self.folder.exists(_STOP) else None

    def request_stop(self, stopped: Stopped) -> None:
        """Ask the run to save and leave."""
        self.folder.write(_STOP, stopped.to_request())

    def delete_stop_request(self) -> None:
        self.folder.delete(_STOP)

    @property
    def has_summary(self) -> bool:
        return self.folder.exists(SUMMARY)

    def summary(self) -> Summary | None:
        """Return the summary of the run; None if it has not ended."""
        facts = self._json(SUMMARY)
        if not facts:
            return None
        stopped = Stopped.read(facts["stopped"], facts.get("ending"), facts["failed"])
        return cast(Summary, facts | {"ending": stopped.ending})

    def write_summary(self, summary: Summary) -> None:
        self.folder.write(SUMMARY, json.dumps(summary, indent=1).encode())

    def first_step_seconds(self) -> float | None:
        """Return the seconds from the command to the first optimiser step."""
        seconds = self._json(_FIRST_STEP).get("seconds_to_first_step")
        return None if seconds is None else float(seconds)

    def write_first_step_seconds(self, seconds: float) -> None:
        self.folder.write(_FIRST_STEP, json.dumps({"seconds_to_first_step": seconds}).encode())

    def failure(self) -> str | None:
        """Return why the workers of a sweep's trial failed; None if they did not."""
        return self._text(_FAILURE)

    def write_failure(self, failure: str) -> None:
        self.folder.write(_FAILURE, failure.encode())

    def delete_results(self) -> None:
        """Delete the results of the last attempt, so that another one can follow."""
        self.folder.delete(_FAILURE)
        self.folder.delete(SUMMARY)

    # Tracking

    def mlflow_run_id(self) -> str | None:
        return self._text(_MLFLOW_RUN_ID)

    def write_mlflow_run_id(self, run_id: str) -> None:
        self.folder.write(_MLFLOW_RUN_ID, run_id.encode())

    def sent(self) -> Sent:
        """Return how far MLflow has the metrics."""
        nothing = Sent(sent_bytes=0, attempt=0, last_step=-1, replayed_until=-1)
        return cast(Sent, self._json(_MLFLOW) or nothing)

    def write_sent(self, sent: Sent) -> None:
        self.folder.write(_MLFLOW, json.dumps(sent).encode())

    # Folders and files that other modules fill

    @property
    def checkpoints(self) -> Folder:
        return self.folder / _CHECKPOINTS

    @property
    def samples(self) -> Folder:
        return self.folder / _SAMPLES

    @property
    def profile(self) -> Folder:
        return self.folder / _PROFILE

    @property
    def evals(self) -> Folder:
        return self.folder / _EVALS

    @property
    def ray(self) -> Folder:
        return self.folder / _RAY

    def put_picture(self, file: Path) -> None:
        """Copy the local file `file` into the folder, under its own name."""
        self.folder.put(file, file.name)

    def write_lm_eval(self, metrics: Mapping[str, object]) -> None:
        self.evals.make().write(_LM_EVAL, json.dumps(dict(metrics), indent=1).encode())

    def write_audit(self, report: Mapping[str, object]) -> None:
        self.folder.write(AUDIT, json.dumps(dict(report), indent=1).encode())

    def evidence(self) -> bytes:
        return self.folder.read(_EVIDENCE)

    def write_evidence(self, evidence: bytes) -> None:
        self.folder.write(_EVIDENCE, evidence)

    def delete_evidence(self) -> None:
        self.folder.delete(_EVIDENCE)

    def _json(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self.folder.read(name))) if self.folder.exists(name) else {}

    def _text(self, name: str) -> str | None:
        return self.folder.read(name).decode().strip() if self.folder.exists(name) else None


def run_files(root: str, name: str | None) -> RunFiles:
    """Return the files of the run `name` in the folder `root`."""
    return RunFiles(Folder(run_url(root, name)))


def run_url(root: str, name: str | None) -> str:
    """Return the URL of the run `name` in the folder `root`; this machine need not reach it."""
    assert name is not None, "the driver names the run"
    return f"{root}/{name}"
