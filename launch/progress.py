"""Watching a run while it trains: a progress bar where there is a terminal, plain lines elsewhere.

Both follow `metrics.jsonl` and `events.jsonl` in the run folder, so it does not matter where the workers are.
"""

import json
import threading
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trainer.storage import Folder

_POLL_S = 0.5


class Watch:
    """Shows the run in `folder` for as long as the `with` block runs; `steps` is its last step, where it is known."""

    def __init__(self, folder: Folder, steps: int | None, console: Console):
        self.folder, self.steps, self.console = folder, steps, console
        self.ended = threading.Event()
        self.positions = {name: len(folder.read(name)) if folder.exists(name) else 0 for name in ("metrics.jsonl", "events.jsonl")}
        self.thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, *problem: Any) -> None:
        self.ended.set()
        self.thread.join()

    def _run(self) -> None:
        show = self._bar if self.console.is_terminal else self._lines
        show()

    def _rows(self) -> Iterator[dict[str, Any]]:
        """New lines of both files as they come, until the block ends and no more are there."""
        while True:
            last = self.ended.wait(_POLL_S)
            for name in self.positions:
                yield from self._new(name)
            if last:
                return

    def _new(self, name: str) -> Iterator[dict[str, Any]]:
        if self.folder.exists(name):
            content = self.folder.read(name)
            whole = content.rfind(b"\n") + 1
            for line in content[self.positions[name] : whole].splitlines():
                yield json.loads(line)
            self.positions[name] = max(self.positions[name], whole)

    def _bar(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("step {task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("starting", total=self.steps, figures="")
            for row in self._rows():
                if note := _note(row):
                    progress.console.print(note)
                if "loss" in row:
                    progress.update(task, description="training", completed=row["step"], figures=_figures(row))

    def _lines(self) -> None:
        for row in self._rows():
            if note := _note(row):
                self.console.print(note)
            if "loss" in row:
                self.console.print(f"step {row['step']}{f'/{self.steps}' if self.steps else ''}  {_figures(row)}{self._left(row)}")

    def _left(self, row: dict[str, Any]) -> str:
        if not self.steps or not row.get("samples_per_s"):
            return ""
        each = row["samples_seen"] / max(1, row["step"])
        return f"  {clock((self.steps - row['step']) * each / row['samples_per_s'])} left"


def _figures(row: dict[str, Any]) -> str:
    rate = f"{row['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in row else f"{row['samples_per_s']:,.1f} samples/s"
    return f"loss {float(row['loss']):.4f}  {rate}"


def _note(row: dict[str, Any]) -> str:
    """A line of its own for what happens now and then: an event, an evaluation."""
    if "event" in row:
        return str(row["event"])
    for name, unit in (("eval/bits_per_byte", "bits per byte"), ("eval/loss", "loss")):
        if name in row:
            return f"step {row['step']}  held out: {row[name]:.4f} {unit}"
    return ""


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    hours, rest = divmod(round(max(0.0, seconds)), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
