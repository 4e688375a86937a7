"""Requests to stop a run.

They come from a signal, a `stop` file in the run folder, the clock, or the process that started the
worker. Each rank hears signals and its surroundings; rank 0 also watches the file and the clock.
The loop makes all ranks agree: they save, and leave. The `stop` file says why: a person writes any
text, or none, and a program writes an ending.
"""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from trainer.core.training import Training
from trainer.endings import Ending, Stopped
from trainer.run_files import RunFiles

_LOOK_EVERY_S = 2.0

Handler = Callable[[int, FrameType | None], object] | int | None
"""A signal's handler, as signal.signal() accepts and returns it."""

Asked = Callable[[], Stopped | None]
"""Returns why the worker's surroundings want it to leave; None if they do not."""


def nobody_asks() -> None:
    """The answer of surroundings that never ask the worker to leave."""


class Control:
    """Watches for requests during a `with` block, and passes them on as `training.wants_stop`."""

    def __init__(self, training: Training, files: RunFiles, hours: float | None, asked: Asked):
        self.training = training
        self.files = files
        self.hours = hours
        self.asked = asked
        self.ended = threading.Event()
        self.old_handlers: dict[int, Handler] = {}

    def __enter__(self) -> "Control":
        # Ray runs the worker outside the main thread, and handles signals itself.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.old_handlers[number] = signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, name="control", daemon=True).start()
        return self

    def __exit__(self, *problem: object) -> None:
        self.ended.set()
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
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
