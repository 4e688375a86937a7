"""How the trials of a sweep stand, read from their run folders alone; and whether a folder that is there belongs to this sweep."""

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
"""These are not run again; the others go on from their last checkpoint."""


@dataclass(frozen=True, kw_only=True)
class TrialOutcome:
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


def look(trial: Trial, metric: str) -> TrialOutcome:
    """How `trial` stands."""
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
    """The finished trials that differ in their seed alone."""

    name: str
    changes: dict[str, Any]
    mean: float
    values: list[float]
    """By seed."""


def ranked(outcomes: Sequence[TrialOutcome], config: SweepConfig) -> list[Setting]:
    """The settings all of whose seeds are finished, the best first."""
    groups: dict[str, list[TrialOutcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.trial.setting, []).append(outcome)
    found = []
    for name, group in groups.items():
        values = [
            outcome.value
            for outcome in group
            if outcome.status == "finished" and outcome.value is not None and math.isfinite(outcome.value)
        ]
        if len(values) == len(group):
            found.append(
                Setting(name=name, changes=group[0].trial.changes, mean=statistics.fmean(values), values=values)
            )
    return sorted(found, key=lambda setting: setting.mean, reverse=config.mode == "max")


def claim(root: Folder, config: SweepConfig, trials: Sequence[Trial]) -> None:
    """Raises ValueError if runs in the folder of the sweep are not those of this sweep; else notes in `sweep.yaml` what it is."""
    if root.exists("sweep.yaml"):
        before = parse(SweepConfig, yaml.safe_load(root.read("sweep.yaml")), "sweep")
        judges = [(each.scheduler, each.metric, each.mode) for each in (before, config)]
        if judges[0] != judges[1] and any(isinstance(each.scheduler, Asha) for each in (before, config)):
            raise ValueError(
                f"--folder: {root} has trials judged by {_judge(before)}, now it is {_judge(config)}; name another folder"
            )
    for trial in trials:
        if trial.files.has_job:
            _refuse_another(trial)
    root.make().write("sweep.yaml", yaml.safe_dump(plain(config), sort_keys=False).encode())


def _judge(config: SweepConfig) -> str:
    words = ", ".join(f"{key} {value}" for key, value in plain(config)["scheduler"].items())
    return f"{config.mode} {config.metric} ({words})"


def _refuse_another(trial: Trial) -> None:
    before = parse(RunConfig, trial.files.job()["run"], "run")
    theirs, ours = (dict(flat("run", plain(run))) for run in (before, trial.job.run))
    for name, (was, now) in differences(theirs, ours, leave_out=("run.source", "run.tracking.parent")).items():
        raise ValueError(
            f"--folder: {trial.files} is there with {name} {was}, now it is {now}; name another folder, or remove that run"
        )
