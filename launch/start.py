"""The start of work on workers: data to prepare, imports in the background, and requests to stop.

Workers are other processes, perhaps on other machines, so a request to stop goes through the run
folder.
"""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

from launch.config import JobConfig
from trainer.endings import Ending, Stopped
from trainer.run_files import RunFiles


@contextmanager
def stopping(runs: Callable[[], Iterable[RunFiles]], console: Console) -> Iterator[None]:
    """Handle Ctrl-C and SIGTERM, which `ray job stop` sends, while the block runs.

    The first signal asks the runs in `runs()` to save and leave; the second one leaves at once.
    Only the main thread may call it.
    """
    received: list[str] = []

    def on_signal(number: int, _: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        received.append(name)
        for files in runs():
            files.request_stop(Stopped(Ending.SIGNAL, f"{name} to the command"))
        console.print(f"{name}: what trains saves and stops after this step; once more leaves at once")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare_data(job: JobConfig) -> None:
    """Check the job's data, and make them if they are built in: once, before any worker starts."""
    from data.prepare import prepare

    if (data := job.run.objective.stored_data) is not None:
        prepare(data)


def import_ray() -> None:
    """Import the part of Ray that the driver needs."""
    import cluster.on_ray.train  # noqa: F401


class Background(threading.Thread):
    """Calls `work` in a thread of its own, started at once; `join` raises the error of `work`."""

    def __init__(self, work: Callable[[], None]):
        super().__init__(daemon=True)
        self.work = work
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.work()
        except Exception as error:  # raised again by join()
            self.error = error

    def join(self, timeout: float | None = None) -> None:
        super().join(timeout)
        if self.error is not None:
            raise self.error
