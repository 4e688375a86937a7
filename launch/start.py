"""Ctrl-C and SIGTERM while workers train: the first asks them to save and leave, the second leaves at once.

The workers are other processes, on other machines perhaps, so the request goes through the run folder. `ray job stop` sends SIGTERM, too.
"""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from launch.config import JobConfig
from trainer.endings import Ending, Stopped
from trainer.run_files import RunFiles


@contextmanager
def stopping(runs: Callable[[], Iterable[RunFiles]], console: Console) -> Iterator[None]:
    """Handles both signals while the block runs, for the runs in `runs()`; in the main thread."""
    asked: list[str] = []

    def on_signal(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)
        for files in runs():
            files.request_stop(Stopped(Ending.SIGNAL, f"{asked[0]} to the command"))
        console.print(f"{asked[0]}: what trains saves and stops after this step; once more leaves at once")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare_data(job: JobConfig) -> None:
    """Make the data that the job reads, where they are made: once, before any worker starts."""
    from data.prepare import prepare as prepare_data

    if (data := job.run.objective.stored_data) is not None:
        prepare_data(data)


def import_ray() -> None:
    """What the driver needs of Ray."""
    import cluster.on_ray.train  # noqa: F401


class Background(threading.Thread):
    """`work` in a thread of its own; `join` raises what went wrong in it."""

    def __init__(self, work: object):
        super().__init__(daemon=True)
        self.work, self.error = work, None
        self.start()

    def run(self) -> None:
        try:
            self.work()  # type: ignore[operator]
        except Exception as error:  # raised again by join()
            self.error = error  # type: ignore[assignment]

    def join(self, timeout: float | None = None) -> None:
        super().join(timeout)
        if self.error is not None:
            raise self.error
