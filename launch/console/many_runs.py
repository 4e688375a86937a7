"""What a person sees of many runs that train at the same time: a bar over the steps of all of them, and a line for each that ends."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from launch.console.progress import clock
from trainer.config import RunConfig
from trainer.run_files import run_files

Ended = Callable[[RunConfig], str]
"""What there is to say of a run that has ended; "": it has not."""


@contextmanager
def progress(console: Console, runs: Sequence[RunConfig], what: str, ended: Ended) -> Iterator[Callable[[], None]]:
    """A function to call now and then: it moves the bar where there is a terminal, and prints a line for each run that ends."""
    over = {run.name for run in runs if ended(run)}
    if over:
        console.print(f"{len(over)} of {len(runs)} runs are there already")

    def done(run: RunConfig) -> int:
        return _steps(run) if run.name in over else _steps_done(run)

    total, begin, first = sum(map(_steps, runs)), time.monotonic(), sum(map(done, runs))
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
            left = (
                f"{clock((time.monotonic() - begin) * (total - so_far) / (so_far - first))} left"
                if so_far > first
                else ""
            )
            bar.update(task, completed=so_far, left=left)
            for run in runs:
                if run.name not in over and (words := ended(run)):
                    over.add(run.name)
                    console.print(f"{run.name}: {words}  ({len(over)} of {len(runs)} runs)  {left}")

        yield show


def _steps(run: RunConfig) -> int:
    return run.steps(run.objective.tokens_per_sample) or 0


def _steps_done(run: RunConfig) -> int:
    """The last step that a run has written down."""
    rows = run_files(run.root, run.name).metrics()
    return rows[-1].step if rows else 0
