"""The state of each trial of a sweep, read from the run folders alone.

The module also checks whether an existing folder belongs to the sweep.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from launch.commands.diff import differences, flat
from launch.sweep.config import Asha, SweepConfig
from launch.sweep.trials import Trial
from trainer.config import RunConfig
from trainer.endings import Ending, Stopped
from trainer.parsing import parse, plain
from trainer.run_files import RunFiles
from trainer.run_rows import Summary
from trainer.storage import Folder
from trainer.tracking.tracker import history

Status = Literal["finished", "pruned", "failed", "stopped", "not started"]
KEPT: tuple[Status, ...] = ("finished", "pruned")
"""A trial in one of these states is left as it is; others continue from the last checkpoint."""


@dataclass(frozen=True, kw_only=True)
class TrialOutcome:
    """The state of a trial according to its run folder."""

    trial: Trial
    status: Status
    reason: str
    """The reason why the trial is not finished; empty if there is none."""
    step: int
    """The last step that was completed."""
    curve: list[tuple[int, float]]
    """The step and the metric of each evaluation."""

    @property
    def value(self) -> float | None:
        """The metric at the last evaluation, or None if there was no evaluation."""
        return self.curve[-1][1] if self.curve else None

    @property
    def words(self) -> str:
        """The status in words, for tables and messages."""
        match self.status:
            case "pruned" | "stopped":
                return f"{self.status} at step {self.step}"
            case "failed":
                return f"failed: {self.reason}"
            case _:
                return self.status


def look(trial: Trial, metric: str) -> TrialOutcome:
    """Read the state of `trial` from its run folder."""
    files = trial.files
    summary = files.summary()
    step = max((row.step for row in files.metrics()), default=0) if summary is None else summary["step"]
    status, reason = _status(files, summary)
    return TrialOutcome(trial=trial, status=status, reason=reason, step=step, curve=history(files, metric))


def _status(files: RunFiles, summary: Summary | None) -> tuple[Status, str]:
    if (failure := files.failure()) is not None:
        return "failed", (failure.splitlines() or ["it did not say why"])[-1]
    if summary is None:
        return ("stopped", "killed") if files.has_begun else ("not started", "")
    stopped = Stopped.read(summary["stopped"], summary["ending"])
    if summary["failed"]:
        return "failed", str(stopped)
    if stopped.ending is Ending.PRUNED:
        return "pruned", stopped.detail
    return ("finished", "") if stopped.ending.is_done else ("stopped", str(stopped))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting: the finished trials that differ only in their seed."""

    name: str
    changes: dict[str, Any]
    mean: float
    values: list[float]
    """The metric per seed."""


def ranked(outcomes: Sequence[TrialOutcome], config: SweepConfig) -> list[Setting]:
    """The settings with all seeds finished, the best first."""
    groups: dict[str, list[TrialOutcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.trial.setting, []).append(outcome)
    settings = []
    for name, group in groups.items():
        finished = [outcome.value for outcome in group if outcome.status == "finished"]
        values = [value for value in finished if value is not None and math.isfinite(value)]
        if len(values) == len(group):
            changes = group[0].trial.changes
            settings.append(Setting(name=name, changes=changes, mean=statistics.fmean(values), values=values))
    return sorted(settings, key=lambda setting: setting.mean, reverse=config.mode == "max")


def claim(root: Folder, config: SweepConfig, trials: Sequence[Trial]) -> None:
    """Record the sweep in `sweep.yaml` of its folder.

    Raises ValueError if the folder has runs of another sweep.
    """
    if root.exists("sweep.yaml"):
        before = parse(SweepConfig, yaml.safe_load(root.read("sweep.yaml")), "sweep")
        same_rule = (before.scheduler, before.metric, before.mode) == (config.scheduler, config.metric, config.mode)
        if not same_rule and (isinstance(before.scheduler, Asha) or isinstance(config.scheduler, Asha)):
            change = f"{root} has trials judged by {_judge(before)}, now it is {_judge(config)}"
            raise ValueError(f"--folder: {change}; name another folder")
    for trial in trials:
        if trial.files.has_job:
            _refuse_another(trial)
    root.make().write("sweep.yaml", yaml.safe_dump(plain(config), sort_keys=False).encode())


def _judge(config: SweepConfig) -> str:
    words = ", ".join(f"{key} {value}" for key, value in plain(config)["scheduler"].items())
    return f"{config.mode} {config.metric} ({words})"


def _refuse_another(trial: Trial) -> None:
    """Raises ValueError if the run in the trial's folder has another configuration."""
    before = parse(RunConfig, trial.files.job()["run"], "run")
    theirs = dict(flat("run", plain(before)))
    ours = dict(flat("run", plain(trial.job.run)))
    for name, (was, now) in differences(theirs, ours, leave_out=("run.source", "run.tracking.parent")).items():
        change = f"{trial.files} exists with {name} {was}, now it is {now}"
        raise ValueError(f"--folder: {change}; name another folder, or remove that run")
