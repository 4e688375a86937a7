"""Shows a run while it trains, with a progress bar on a terminal and plain lines elsewhere.

Both follow the metrics and events in the run folder, so the workers may be anywhere.
"""

import threading
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trainer.run_files import RunFiles
from trainer.run_rows import Event, MetricsRow

_POLL_S = 0.5


class Watch:
    """Shows the run of `files` while the `with` block runs; `steps` is its last step, if known."""

    def __init__(self, files: RunFiles, steps: int | None, console: Console):
        self.files, self.steps, self.console = files, steps, console
        self.ended = threading.Event()
        _, self.metrics_end = files.metrics_from(0)
        _, self.events_end = files.events_from(0)
        self.thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self.ended.set()
        self.thread.join()

    def _run(self) -> None:
        show = self._bar if self.console.is_terminal else self._lines
        show()

    def _rows(self) -> Iterator[MetricsRow | Event]:
        """Yield the new rows of both files, until the block ends and all of them are read."""
        while True:
            last = self.ended.wait(_POLL_S)
            metrics, self.metrics_end = self.files.metrics_from(self.metrics_end)
            yield from metrics
            events, self.events_end = self.files.events_from(self.events_end)
            yield from events
            if last:
                return

    def _bar(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("step {task.completed}/{task.total}"),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("starting", total=self.steps, metrics="")
            for row in self._rows():
                if note := _note(row):
                    progress.console.print(note)
                if isinstance(row, MetricsRow) and "loss" in row.metrics:
                    progress.update(task, description="training", completed=row.step, metrics=_status(row.metrics))

    def _lines(self) -> None:
        for row in self._rows():
            if note := _note(row):
                self.console.print(note)
            if isinstance(row, MetricsRow) and "loss" in row.metrics:
                of = f"/{self.steps}" if self.steps else ""
                self.console.print(f"step {row.step}{of}  {_status(row.metrics)}{self._left(row)}")

    def _left(self, row: MetricsRow) -> str:
        metrics = row.metrics
        if not self.steps or not metrics.get("samples_per_s"):
            return ""
        per_step = metrics["samples_seen"] / max(1, row.step)
        return f"  {clock((self.steps - row.step) * per_step / metrics['samples_per_s'])} left"


def _status(metrics: Mapping[str, float]) -> str:
    loss = f"loss {metrics['loss']:.4f}"
    if "tokens_per_s" in metrics:
        return f"{loss}  {metrics['tokens_per_s']:,.0f} tokens/s"
    return f"{loss}  {metrics['samples_per_s']:,.1f} samples/s"


def _note(row: MetricsRow | Event) -> str:
    """The line that an event or an evaluation gets to itself; "" for other rows."""
    if isinstance(row, Event):
        return row.text
    for name, unit in (("eval/bits_per_byte", "bits per byte"), ("eval/loss", "loss")):
        if name in row.metrics:
            return f"step {row.step}  held out: {row.metrics[name]:.4f} {unit}"
    return ""


def clock(seconds: float) -> str:
    """A duration such as 1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
