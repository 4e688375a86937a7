"""Requests to stop, from wherever they come: a signal, a `stop` file in the run folder, the clock, or the process that started the worker.

Each rank looks for itself, and the loop has all ranks agree: they save, and leave. The `stop` file says why: a person writes any
text, or none, and a program writes an ending.
"""

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from trainer.core.training import Training
from trainer.endings import Ending, Stopped
from trainer.run_files import RunFiles

_LOOK_EVERY_S = 2.0
Asked = Callable[[], Stopped | None]
"""Why the worker's surroundings want it to leave; None: they do not."""


def nobody_asks() -> None:
    """Where nothing around the worker can ask it to leave."""


class Control:
    """Watches for requests while the `with` block runs, and passes them on as `training.wants_stop`."""

    def __init__(self, training: Training, files: RunFiles, hours: float | None, asked: Asked):
        self.training, self.files, self.hours, self.asked = training, files, hours, asked
        self.ended = threading.Event()
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Control":
        if (
            threading.current_thread() is threading.main_thread()
        ):  # Ray runs the worker in another one, and handles signals itself
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, name="control", daemon=True).start()
        return self

    def __exit__(self, *problem: Any) -> None:
        self.ended.set()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.training.wants_stop = Stopped(Ending.SIGNAL, signal.Signals(number).name)

    def _watch(self) -> None:
        begin = time.monotonic()
        while not self.ended.wait(_LOOK_EVERY_S):
            reason = self.asked()
            if self.training.world.is_main and reason is None:
                if self.hours is not None and time.monotonic() - begin >= self.hours * 3600:
                    reason = Stopped(Ending.HOURS_OVER, f"stop.hours: {self.hours} h are over")
                else:
                    reason = self.files.stop_request()
            if reason is not None:
                self.training.wants_stop = reason
