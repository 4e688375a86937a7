"""The report of a fire drill: the cost of each fault, derived from the two run folders alone."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

from rich.console import Console

from launch.chaos.picture import draw_drill
from launch.commands.verify import verify_data
from launch.console.summary import time_table
from launch.console.tables import table
from trainer.run_files import RunFiles, run_files
from trainer.run_rows import MetricsRow, Spent, Summary
from trainer.tracking.tracker import history


@dataclass(frozen=True)
class InjectedFault:
    """A fault that happened."""

    name: str
    step: int
    time: float


@dataclass(frozen=True)
class Cost:
    """The cost of one fault."""

    name: str
    step: int
    detected_s: float | None
    """Seconds until the run, or Ray, recorded that something is wrong; None if nothing did."""
    recovered_s: float | None
    """Seconds until the first step that the run had not done before; None if there was none."""
    replayed: int
    """The number of steps that were done again."""


class _Comparison(TypedDict):
    """The drill compared with the undisturbed run, as keys of drill.json."""

    final_loss: float | None
    undisturbed_loss: float
    first_different_step: int | None
    passed_over: int
    step: int
    goodput: dict[Spent, float]
    attempts: int


def costs(injected: list[InjectedFault], metrics: list[MetricsRow], noticed: list[float]) -> list[Cost]:
    """The cost of each fault.

    `metrics` are the rows that have a loss, and `noticed` are the times of all alarms and ends of
    attempts, in ascending order.
    """
    replays: list[float] = []
    done = 0
    for row in metrics:
        if row.step <= done:
            replays.append(row.time)
        done = max(done, row.step)
    ends = [*(fault.time for fault in injected[1:]), float("inf")]
    return [_cost(fault, until, metrics, replays, noticed) for fault, until in zip(injected, ends, strict=False)]


def _cost(
    fault: InjectedFault, until: float, metrics: list[MetricsRow], replays: list[float], noticed: list[float]
) -> Cost:
    """The cost of `fault`; from the time `until` on, replays and alarms belong to the next one."""
    before = [row.step for row in metrics if row.time <= fault.time]
    furthest = max([fault.step, *before])
    new = (row.time - fault.time for row in metrics if row.time > fault.time and row.step > furthest)
    seen = (time - fault.time for time in noticed if fault.time <= time < until)
    replayed = sum(fault.time < time < until for time in replays)
    return Cost(fault.name, fault.step, next(seen, None), next(new, None), replayed)


def report(console: Console, root: Path, injected: list[InjectedFault], planned: int) -> bool:
    """Print the table of the drill in `root`, and write it to drill.json.

    Returns whether all faults happened, the run ended, and its data are exact.
    """
    files = run_files(str(root), "drill")
    other = run_files(str(root), "undisturbed")
    metrics = [row for row in files.metrics() if "loss" in row.metrics]
    ends = [end.time for end in files.attempts_ended()]
    alarms = [event.time for event in files.events() if event.kind.is_alarm]
    per_fault = costs(injected, metrics, sorted([*ends, *alarms]))
    rows = [
        (cost.name, str(cost.step), _seconds(cost.detected_s), _seconds(cost.recovered_s), str(cost.replayed))
        for cost in per_fault
    ]
    console.print(table("the drill", ("fault", "step", "detected, s", "recovered, s", "steps again"), rows))
    missing = planned - len(injected)
    if missing:
        console.print(f"{missing} of {planned} faults did not happen: the run did not reach their steps")
    result: dict[str, object] = {"faults": [asdict(cost) for cost in per_fault], "planned": planned}
    data_exact = False
    if summary := files.summary():
        result |= _compare(console, files, other, summary)
        data_exact = verify_data(console, files.folder, summary["step"])
        result["data_exact"] = data_exact
    (root / "drill.json").write_text(json.dumps(result, indent=1))
    console.print(f"the picture of the drill is {draw_drill(other, files, root / 'drill.png')}", soft_wrap=True)
    return data_exact and not missing


def _compare(console: Console, files: RunFiles, other: RunFiles, summary: Summary) -> _Comparison:
    """Compare the losses of the two runs step by step, and print the result."""
    mine = dict(history(files, "loss"))
    theirs = dict(history(other, "loss"))
    last = max(theirs)
    passed_over = sum(anomaly["last"] - anomaly["first"] + 1 for anomaly in summary["anomalies"])
    different = next((step for step in sorted(theirs) if not _same(mine.get(step), theirs[step])), None)
    until = "every loss is bit-identical"
    if different is not None:
        until = f"the losses are bit-identical until step {different - 1}"
    final = f"final loss {mine.get(last, float('nan')):.6f}, undisturbed {theirs[last]:.6f}"
    console.print(f"{final}; {until}; {passed_over} steps passed over")
    time_table(console, summary["goodput"])
    return {
        "final_loss": mine.get(last),
        "undisturbed_loss": theirs[last],
        "first_different_step": different,
        "passed_over": passed_over,
        "step": summary["step"],
        "goodput": summary["goodput"],
        "attempts": summary["attempt"] + 1,
    }


def _same(mine: float | None, theirs: float) -> bool:
    """Whether two losses are bit-identical; two NaNs are."""
    return mine is not None and mine.hex() == theirs.hex()


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
