"""Metrics of a run: every logged step as a row in the run folder, and from there to MLflow, in a thread of its own.

The rows are the spool: how far MLflow has them stands in a file beside them, so a slow or dead tracking server
never blocks a step, and what it missed is sent when it is back, by a later attempt if need be. Only rank 0 has a tracker.
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

_SAY_AFTER = 3
_PAUSE_S = 1.0
"""Between two sends: what is logged in the meantime goes in one request, and the sender's thread does not get into the steps' way."""


def history(files: RunFiles, name: str) -> list[tuple[int, float]]:
    """The metric `name` of a run by step; of a step that was replayed after a stop, the last counts."""
    return sorted({row.step: row.metrics[name] for row in files.metrics() if name in row.metrics}.items())


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
    """Rows in the run folder; each has the step, the time and the attempt."""

    def __init__(self, files: RunFiles, attempt: int):
        self.files, self.attempt, self.unwritten = files, attempt, b""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        row = {
            "step": step,
            "time": round(time.time(), 3),
            "attempt": self.attempt,
            **{k: v if math.isfinite(v) else str(v) for k, v in figures.items()},
        }
        self.unwritten += (json.dumps(row) + "\n").encode()
        with suppress(OSError):  # a full disk: the lines are kept, and written with later ones
            self.files.append_metrics(self.unwritten)
            self.unwritten = b""

    def keep(self, file: Path) -> None:
        pass

    def finish(self, status: str) -> None:
        pass


class MlflowTracker(JsonlTracker):
    """The same lines, sent to MLflow by a thread that reads them from the file."""

    def __init__(self, files: RunFiles, attempt: int, config: TrackingConfig, facts: RunFacts, say: Say):
        super().__init__(files, attempt)
        self.config, self.facts, self.say = config, facts, say
        self.artifacts: list[Path] = []
        self.status: str | None = None
        self.wake, self.ends = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self.thread.start()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        super().log(step, figures)
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
            waited = (
                f"MLflow at {tracking_uri(self.config)} has not taken all figures within {self.config.drain_s:.0f} s"
            )
            self.say(EventKind.NOTE, f"{waited}; they are in {self.files}/{METRICS}, and --resume sends them")

    def _run(self) -> None:
        """Try until all is sent and the run is closed; after a failure wait, twice as long each time up to a minute, at the run's end a second."""
        failures, sender = 0, None
        self.wake.wait()  # importing MLflow takes a second or two: not while the first step is under way
        while True:
            try:
                if sender is None:
                    from trainer.tracking.mlflow_run import MlflowRun

                    sender = MlflowRun(self.files, self.config, self.facts)
                self.wake.clear()
                ending = self.status  # read before sending: what was logged before finish() is then sent as well
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
            except Exception as error:  # a tracking server fails in as many ways as there are; none may end the run
                failures += 1
                if failures == _SAY_AFTER:
                    cause = f"{type(error).__name__}: {one_line(error, 200)}"
                    text = f"MLflow does not take figures ({cause}); training goes on, they are kept and sent later"
                    self.say(EventKind.TRACKING_AWAY, text)
                if not self.ends.wait(min(60.0, 0.5 * 2**failures)):
                    continue
                time.sleep(_PAUSE_S)  # the run has ended, and waits for this thread
