"""How the trials of a sweep stand, read from their run folders alone; and whether a folder that is there belongs to this sweep."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from launch.diff import differences, flat
from launch.sweep_config import Asha, SweepConfig
from launch.sweep_trials import Trial
from trainer.attempts import lines
from trainer.config import RunConfig
from trainer.control import PRUNED
from trainer.parsing import parse, plain
from trainer.storage import Folder
from trainer.tracking import history

Status = Literal["finished", "pruned", "failed", "stopped", "not started"]
KEPT: tuple[Status, ...] = ("finished", "pruned")
"""These are not run again; the others go on from their last checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One trial, as its folder tells."""

    trial: Trial
    status: Status
    reason: str
    """Why it is not finished."""
    step: int
    """The last one that was done."""
    curve: list[tuple[int, float]]
    """The metric by step."""

    @property
    def value(self) -> float | None:
        """The metric at the last evaluation; None where there was none."""
        return self.curve[-1][1] if self.curve else None

    @property
    def words(self) -> str:
        """The status, for a person."""
        match self.status:
            case "pruned" | "stopped":
                return f"{self.status} at step {self.step}"
            case "failed":
                return f"failed: {self.reason}"
            case _:
                return self.status


def look(trial: Trial, metric: str) -> Outcome:
    """How `trial` stands."""
    folder = trial.folder
    summary = json.loads(folder.read("summary.json")) if folder.exists("summary.json") else {}
    steps = max((row["step"] for row in lines(folder, "metrics.jsonl")), default=0)
    status, reason = _status(folder, summary)
    return Outcome(trial=trial, status=status, reason=reason, step=int(summary.get("step", steps)), curve=history(folder, metric))


def _status(folder: Folder, summary: dict[str, Any]) -> tuple[Status, str]:
    if folder.exists("failure"):
        return "failed", (folder.read("failure").decode().strip().splitlines() or ["it did not say why"])[-1]
    if not summary:
        return ("stopped", "killed") if folder.exists("attempts.jsonl") else ("not started", "")
    stopped = str(summary["stopped"])
    if summary["failed"]:
        return "failed", stopped
    if stopped.startswith(PRUNED):
        return "pruned", stopped.removeprefix(PRUNED)
    return ("finished", "") if stopped.startswith(("all steps done", "stop.hours")) else ("stopped", stopped)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The finished trials that differ in their seed alone."""

    name: str
    changes: dict[str, Any]
    mean: float
    values: list[float]
    """By seed."""


def ranked(outcomes: Sequence[Outcome], config: SweepConfig) -> list[Setting]:
    """The settings all of whose seeds are finished, the best first."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.trial.setting, []).append(outcome)
    found = []
    for name, group in groups.items():
        values = [outcome.value for outcome in group if outcome.status == "finished" and outcome.value is not None and math.isfinite(outcome.value)]
        if len(values) == len(group):
            found.append(Setting(name=name, changes=group[0].trial.changes, mean=statistics.fmean(values), values=values))
    return sorted(found, key=lambda setting: setting.mean, reverse=config.mode == "max")


def claim(root: Folder, config: SweepConfig, trials: Sequence[Trial]) -> None:
    """Raises ValueError if runs in the folder of the sweep are not those of this sweep; else notes in `sweep.yaml` what it is."""
    if root.exists("sweep.yaml"):
        before = parse(SweepConfig, yaml.safe_load(root.read("sweep.yaml")), "sweep")
        judges = [(each.scheduler, each.metric, each.mode) for each in (before, config)]
        if judges[0] != judges[1] and any(isinstance(each.scheduler, Asha) for each in (before, config)):
            raise ValueError(f"--folder: {root} has trials judged by {_judge(before)}, now it is {_judge(config)}; name another folder")
    for trial in trials:
        if trial.folder.exists("resolved.yaml"):
            _refuse_another(trial)
    root.make().write("sweep.yaml", yaml.safe_dump(plain(config), sort_keys=False).encode())


def _judge(config: SweepConfig) -> str:
    words = ", ".join(f"{key} {value}" for key, value in plain(config)["scheduler"].items())
    return f"{config.mode} {config.metric} ({words})"


def _refuse_another(trial: Trial) -> None:
    before = parse(RunConfig, yaml.safe_load(trial.folder.read("resolved.yaml"))["run"], "run")
    theirs, ours = (dict(flat("run", plain(run))) for run in (before, trial.job.run))
    for name, (was, now) in differences(theirs, ours, leave_out=("run.source", "run.tracking.parent")).items():
        raise ValueError(f"--folder: {trial.folder} is there with {name} {was}, now it is {now}; name another folder, or remove that run")
