"""Trackers write every logged step as a row in the run folder; a thread sends the rows to MLflow.

trainer/hooks/report.py computes the metrics of training, and mlflow_run.py speaks to MLflow.

The rows are the spool, and a file next to them records the progress of the sender. So a slow or
dead tracking server never blocks a step. The rows that it missed are sent when it is back, if
necessary by a later attempt. Only rank 0 has a tracker that writes.
"""

import json
import math
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from trainer.parsing import one_line
from trainer.run_files import METRICS, RunFiles
from trainer.run_rows import EventKind, Say
from trainer.tracking.config import RunFacts, TrackingConfig, tracking_uri

_REPORT_AFTER = 3
"""Failures in a row after which the tracker reports that the server is away."""
_PAUSE_S = 1.0
"""Pause between two sends: later rows share one request, and the thread does not slow the steps."""


def history(files: RunFiles, name: str) -> list[tuple[int, float]]:
    """The metric `name` of a run by step; if a step was replayed, its last value counts."""
    by_step = {row.step: row.metrics[name] for row in files.metrics() if name in row.metrics}
    return sorted(by_step.items())


class Tracker(Protocol):
    """Receives the metrics and artifacts of a run from the hooks."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step."""

    def keep(self, file: Path) -> None:
        """Keep `file` as an artifact of the run."""

    def finish(self, status: str) -> None:
        """Send the rest, and close the run with `status`: FINISHED, FAILED or KILLED."""


class NullTracker:
    """The tracker of every rank but the first; it does nothing."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def keep(self, file: Path) -> None:
        pass

    def finish(self, status: str) -> None:
        pass


class JsonlTracker:
    """Writes rows to the run folder; each has its step, time and attempt."""

    def __init__(self, files: RunFiles, attempt: int):
        self.files = files
        self.attempt = attempt
        self.unwritten = b""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        row = {
            "step": step,
            "time": round(time.time(), 3),
            "attempt": self.attempt,
            **{name: value if math.isfinite(value) else str(value) for name, value in metrics.items()},
        }
        self.unwritten += (json.dumps(row) + "\n").encode()
        with suppress(OSError):  # on a full disk, the lines are written with later ones
            self.files.append_metrics(self.unwritten)
            self.unwritten = b""

    def keep(self, file: Path) -> None:
        pass

    def finish(self, status: str) -> None:
        pass


class MlflowTracker(JsonlTracker):
    """Writes the same rows; a thread reads them from the file and sends them to MLflow."""

    def __init__(self, files: RunFiles, attempt: int, config: TrackingConfig, facts: RunFacts, say: Say):
        super().__init__(files, attempt)
        self.config = config
        self.facts = facts
        self.say = say
        self.artifacts: list[Path] = []
        self.status: str | None = None
        self.wake = threading.Event()
        self.ends = threading.Event()
        self.thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self.thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        super().log(step, metrics)
        self.wake.set()

    def keep(self, file: Path) -> None:
        self.artifacts.append(file)
        self.wake.set()

    def finish(self, status: str) -> None:
        self.status = status
        self.wake.set()
        self.ends.set()
        self.thread.join(self.config.drain_s)
        if self.thread.is_alive():
            server = f"MLflow at {tracking_uri(self.config)}"
            problem = f"{server} did not accept all metrics within {self.config.drain_s:.0f} s"
            self.say(EventKind.NOTE, f"{problem}; they are in {self.files}/{METRICS}, and --resume sends them")

    def _run(self) -> None:
        """Send until everything is sent and the run is closed.

        The pause after a failure doubles each time, up to a minute; at the end of the run it is
        a second.
        """
        failures = 0
        sender = None
        self.wake.wait()  # importing MLflow takes a second or two, so not during the first step
        while True:
            try:
                if sender is None:
                    from trainer.tracking.mlflow_run import MlflowRun

                    sender = MlflowRun(self.files, self.config, self.facts)
                self.wake.clear()
                ending = self.status  # read before sending, so that rows logged before finish() are sent too
                sender.send_rows()
                while self.artifacts:
                    sender.send_file(self.artifacts[0])
                    self.artifacts.pop(0)
                if ending is not None:
                    sender.close(ending)
                    return
                failures = 0
                self.ends.wait(_PAUSE_S)
                self.wake.wait()
            except Exception as error:  # no failure of a tracking server may end the run
                failures += 1
                if failures == _REPORT_AFTER:
                    cause = f"{type(error).__name__}: {one_line(error, 200)}"
                    problem = f"MLflow is not accepting metrics ({cause})"
                    consequence = "training continues, and they will be sent later"
                    self.say(EventKind.TRACKING_AWAY, f"{problem}; {consequence}")
                if not self.ends.wait(min(60.0, 0.5 * 2**failures)):
                    continue
                time.sleep(_PAUSE_S)  # the run has ended, and waits for this thread
