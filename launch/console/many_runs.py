"""Shows runs that train at the same time: a bar for the steps of all, and a line per ended run."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from launch.console.progress import clock
from trainer.config import RunConfig
from trainer.run_files import run_files

Ended = Callable[[RunConfig], str]
"""Returns the result of a run in words; "" if the run has not ended."""


@contextmanager
def progress(console: Console, runs: Sequence[RunConfig], what: str, ended: Ended) -> Iterator[Callable[[], None]]:
    """A function that the caller calls now and then to show the progress.

    It moves the bar, if there is a terminal, and prints a line per run that has ended.
    """
    complete = {run.name for run in runs if ended(run)}
    if complete:
        console.print(f"{len(complete)} of {len(runs)} runs are there already")

    def done(run: RunConfig) -> int:
        return _steps(run) if run.name in complete else _steps_done(run)

    total = sum(map(_steps, runs))
    begin = time.monotonic()
    first = sum(map(done, runs))
    columns = (
        TextColumn(what),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, completed=first, left="")

        def show() -> None:
            so_far = sum(map(done, runs))
            left = _time_left(time.monotonic() - begin, so_far - first, total - so_far)
            bar.update(task, completed=so_far, left=left)
            for run in runs:
                if run.name not in complete and (result := ended(run)):
                    complete.add(run.name)
                    console.print(f"{run.name}: {result}  ({len(complete)} of {len(runs)} runs)  {left}")

        yield show


def _time_left(seconds: float, steps_done: int, steps_left: int) -> str:
    """The time for `steps_left` at the speed of `steps_done` in `seconds`; "" if none is done."""
    return f"{clock(seconds * steps_left / steps_done)} left" if steps_done > 0 else ""


def _steps(run: RunConfig) -> int:
    return run.steps(run.objective.tokens_per_sample) or 0


def _steps_done(run: RunConfig) -> int:
    """The last step in the run's metrics."""
    rows = run_files(run.root, run.name).metrics()
    return rows[-1].step if rows else 0
