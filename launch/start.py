"""Ctrl-C and SIGTERM while workers train: the first asks them to save and leave, the second leaves at once.

The workers are other processes, on other machines perhaps, so the request goes through the run folder. `ray job stop` sends SIGTERM, too.
"""

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

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
