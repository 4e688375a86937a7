"""Metrics of a run: every logged step as a line of `metrics.jsonl`, and from there to MLflow, in a thread of its own.

`metrics.jsonl` is the spool: how far MLflow has it stands in `mlflow.json` beside it, so a slow or dead tracking server
never blocks a step, and what it missed is sent when it is back, by a later attempt if need be. Only rank 0 has a tracker.
"""

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

from trainer.attempts import lines
from trainer.parsing import one_line
from trainer.storage import Folder, absolute

_SAY_AFTER = 3
_PAUSE_S = 1.0
"""Between two sends: what is logged in the meantime goes in one request, and the sender's thread does not get into the steps' way."""


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


def history(folder: Folder, name: str) -> list[tuple[int, float]]:
    """The figure `name` of the run in `folder` by step; of a step that was replayed after a stop, the last counts."""
    return sorted({int(row["step"]): float(row[name]) for row in lines(folder, "metrics.jsonl") if name in row}.items())


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
        self.wake, self.ends = threading.Event(), threading.Event()
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
        self.ends.set()
        self.thread.join(self.config.drain_s)
        if self.thread.is_alive():
            waited = f"MLflow at {tracking_uri(self.config)} has not taken all figures within {self.config.drain_s:.0f} s"
            self.say(f"{waited}; they are in {self.folder}/metrics.jsonl, and --resume sends them")

    def _run(self) -> None:
        """Try until all is sent and the run is closed; after a failure wait, twice as long each time up to a minute, at the run's end a second."""
        failures, sender = 0, None
        self.wake.wait()  # importing MLflow takes a second or two: not while the first step is under way
        while True:
            try:
                if sender is None:
                    from trainer.mlflow_run import MlflowRun

                    sender = MlflowRun(self.folder, self.config, self.facts)
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
                self.ends.wait(_PAUSE_S)
                self.wake.wait()
            except Exception as error:  # a tracking server fails in as many ways as there are; none may end the run
                failures += 1
                if failures == _SAY_AFTER:
                    cause = f"{type(error).__name__}: {one_line(error, 200)}"
                    self.say(f"MLflow does not take figures ({cause}); training goes on, they are kept and sent later")
                if not self.ends.wait(min(60.0, 0.5 * 2**failures)):
                    continue
                time.sleep(_PAUSE_S)  # the run has ended, and waits for this thread
