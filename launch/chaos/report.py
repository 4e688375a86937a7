"""What a fire drill cost: derived from the folders of the two runs alone."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.chaos.picture import draw_drill
from launch.commands.verify import verify_data
from launch.console.summary import time_table
from launch.console.tables import table
from trainer.run_files import RunFiles, run_files
from trainer.run_rows import MetricsRow
from trainer.tracking.tracker import history


@dataclass(frozen=True)
class InjectedFault:
    """A fault that happened."""

    name: str
    step: int
    time: float


@dataclass(frozen=True)
class Cost:
    """What one fault cost."""

    name: str
    step: int
    detected_s: float | None
    """Until the run, or Ray, wrote down that something is wrong; None where nobody needed to notice."""
    recovered_s: float | None
    """Until the first step that the run had not done before; None if there was none."""
    replayed: int
    """Steps that were done again."""


def costs(injected: list[InjectedFault], metrics: list[MetricsRow], noticed: list[float]) -> list[Cost]:
    """The cost of each fault from the rows of metrics that have a loss, and the times at which something was noticed."""
    found, again, done = [], [], 0
    for row in metrics:
        again += [row.time] if row.step <= done else []
        done = max(done, row.step)
    for index, fault in enumerate(injected):
        until = injected[index + 1].time if index + 1 < len(injected) else float("inf")
        before = [row.step for row in metrics if row.time <= fault.time]
        furthest = max([fault.step, *before])
        later = [row for row in metrics if row.time > fault.time]
        new = next((row.time for row in later if row.step > furthest), None)
        seen = next((time for time in noticed if fault.time <= time < until), None)
        replayed = sum(fault.time < time < until for time in again)
        found.append(Cost(fault.name, fault.step, seen and seen - fault.time, new and new - fault.time, replayed))
    return found


def report(console: Console, root: Path, injected: list[InjectedFault], planned: int) -> bool:
    """Print the table of the drill in `root`, and write it to drill.json; returns whether all faults happened and the run was done."""
    files, other = run_files(str(root), "drill"), run_files(str(root), "undisturbed")
    metrics = [row for row in files.metrics() if "loss" in row.metrics]
    ends = [end.time for end in files.attempts_ended()]
    alarms = [event.time for event in files.events() if event.kind.is_alarm]
    found = costs(injected, metrics, sorted([*ends, *alarms]))
    rows = [
        (cost.name, str(cost.step), _seconds(cost.detected_s), _seconds(cost.recovered_s), str(cost.replayed))
        for cost in found
    ]
    console.print(table("the drill", ("fault", "step", "detected, s", "recovered, s", "steps again"), rows))
    missing = planned - len(injected)
    if missing:
        console.print(f"{missing} of {planned} faults did not happen: their steps were not reached")
    result: dict[str, Any] = {"faults": [asdict(cost) for cost in found], "planned": planned}
    done = files.has_summary
    if done:
        result |= _compared(console, files, other)
        result["data_exact"] = verify_data(console, files.folder, result["step"])
    (root / "drill.json").write_text(json.dumps(result, indent=1))
    console.print(f"the picture of the drill is {draw_drill(other, files, root / 'drill.png')}", soft_wrap=True)
    return done and not missing and result["data_exact"]


def _compared(console: Console, files: RunFiles, other: RunFiles) -> dict[str, Any]:
    """The two runs beside each other, step by step."""
    mine, theirs = dict(history(files, "loss")), dict(history(other, "loss"))
    summary = files.summary()
    assert summary is not None, "the caller has looked"
    last, passed = max(theirs), sum(each["last"] - each["first"] + 1 for each in summary["anomalies"])
    first_other = next((step for step in sorted(theirs) if not _same(mine.get(step), theirs[step])), None)
    same = (
        "every loss is bit-identical"
        if first_other is None
        else f"the losses are bit-identical until step {first_other - 1}"
    )
    console.print(
        f"final loss {mine.get(last, float('nan')):.6f}, undisturbed {theirs[last]:.6f}; {same}; {passed} steps passed over"
    )
    time_table(console, summary["goodput"])
    figures = {
        "final_loss": mine.get(last),
        "undisturbed_loss": theirs[last],
        "first_different_step": first_other,
        "passed_over": passed,
    }
    return figures | {"step": summary["step"], "goodput": summary["goodput"], "attempts": summary["attempt"] + 1}


def _same(mine: float | None, theirs: float) -> bool:
    """Bit-identical; so are two losses that are no numbers."""
    return mine is not None and mine.hex() == theirs.hex()


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
