"""Requests to stop, from wherever they come: a signal, a `stop` file in the run folder, the clock, whoever started the worker.

Each rank looks for itself, and the loop has all ranks agree: they save, and leave. What stands in the `stop` file is the reason.
"""

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from trainer.loop import Training
from trainer.storage import Folder

_LOOK_EVERY_S = 2.0
PRUNED = "pruned: "
"""Begins the reason where a sweep stops a run that falls behind the others."""
Asked = Callable[[], str]
"""Why the worker's surroundings want it to leave; "": they do not."""


def request_stop(folder: Folder, reason: str) -> None:
    """Ask the run in `folder` to save and leave."""
    folder.write("stop", reason.encode())


class Control:
    """Watches for requests while the `with` block runs, and passes them on as `training.wants_stop`."""

    def __init__(self, training: Training, folder: Folder, hours: float | None, asked: Asked):
        self.training, self.folder, self.hours, self.asked = training, folder, hours, asked
        self.ended = threading.Event()
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Control":
        if threading.current_thread() is threading.main_thread():  # Ray runs the worker in another one, and handles signals itself
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, name="control", daemon=True).start()
        return self

    def __exit__(self, *problem: Any) -> None:
        self.ended.set()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.training.wants_stop = signal.Signals(number).name

    def _watch(self) -> None:
        begin = time.monotonic()
        while not self.ended.wait(_LOOK_EVERY_S):
            reason = self.asked()
            if self.training.world.is_main and not reason:
                if self.hours is not None and time.monotonic() - begin >= self.hours * 3600:
                    reason = f"stop.hours: {self.hours} h are over"
                elif self.folder.exists("stop"):
                    reason = self.folder.read("stop").decode().strip() or "stop requested"
            if reason:
                self.training.wants_stop = reason
