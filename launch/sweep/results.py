"""What is left of a sweep when its trials have ended: figures for programs, a table, pictures, and the best job."""

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from launch.sweep.config import SweepConfig
from launch.sweep.outcomes import KEPT, Setting, TrialOutcome, look, ranked
from launch.sweep.report import draw_sweep, table
from launch.sweep.trials import Trial
from trainer.parsing import one_line
from trainer.storage import Folder

if TYPE_CHECKING:
    from trainer.tracking.mlflow_run import SweepRun

JobWith = Callable[[Mapping[str, Any]], dict[str, Any]]
"""The fields of the job file with other values for some keys."""


def finish(
    console: Console,
    config: SweepConfig,
    place: Folder,
    trials: Sequence[Trial],
    job: JobWith,
    parent: "SweepRun | None",
) -> bool:
    """Table, picture, results.json, the best job and what is fitted: printed, in the folder, and in MLflow. Returns whether all trials are through."""
    outcomes = [look(trial, config.metric) for trial in trials]
    _refuse_unknown_metric(config, outcomes)
    settings = ranked(outcomes, config)
    results: dict[str, Any] = {
        "metric": config.metric,
        "mode": config.mode,
        "trials": [_facts(each) for each in outcomes],
    }
    results["settings"] = [asdict(setting) for setting in settings]
    console.print(table(outcomes, config))
    with tempfile.TemporaryDirectory() as scratch:
        files = [draw_sweep(outcomes, config, place.name, Path(scratch) / "sweep.png")]
        if settings:
            files.append(_write_best(settings[0], config, job, Path(scratch) / "best.yaml"))
            over = f", mean of {len(settings[0].values)} seeds" if len(settings[0].values) > 1 else ""
            words = (
                f"best: {settings[0].name}, {config.metric} {settings[0].mean:.4f}{over}; its job is {place}/best.yaml"
            )
            console.print(words, style="bold")
        if config.fit is not None:
            from launch.sweep.scaling_law_report import fit_and_show

            results["fit"] = fit_and_show(console, config.fit, outcomes, Path(scratch) / "scaling_law.png")
            files += Path(scratch).glob("scaling_law.png")
        (Path(scratch) / "results.json").write_text(json.dumps(results, indent=1))
        files.append(Path(scratch) / "results.json")
        for file in files:
            place.put(file, file.name)
        whole = all(outcome.status in KEPT for outcome in outcomes)
        if parent:
            _close(console, parent, config, outcomes, settings, files)
    console.print(f"{', '.join(file.name for file in files)} in {place}")
    if not whole:
        console.print("not all trials came to their end; the same command goes on with them")
    return whole


def _facts(outcome: TrialOutcome) -> dict[str, Any]:
    facts = {
        "trial": outcome.trial.name,
        "setting": outcome.trial.setting,
        "changes": outcome.trial.changes,
        "seed": outcome.trial.job.run.seed,
    }
    curve = [(step, _for_json(value)) for step, value in outcome.curve]
    return facts | {
        "status": outcome.status,
        "reason": outcome.reason,
        "step": outcome.step,
        "value": _for_json(outcome.value),
        "curve": curve,
    }


def _for_json(value: float | None) -> float | str | None:
    """JSON has no inf and no nan: they are written as text, as in a run's metrics."""
    return value if value is None or math.isfinite(value) else str(value)


def _refuse_unknown_metric(config: SweepConfig, outcomes: Sequence[TrialOutcome]) -> None:
    if all(outcome.value is None for outcome in outcomes) and (
        done := [outcome for outcome in outcomes if outcome.status == "finished"]
    ):
        there = sorted(
            {
                name
                for row in done[0].trial.files.metrics()
                for name in row.metrics
                if name.startswith(("eval/", "quality/"))
            }
        )
        raise ValueError(f"metric: no trial has logged {config.metric}; use one of {', '.join(there)}")


def _write_best(best: Setting, config: SweepConfig, job: JobWith, file: Path) -> Path:
    """The job of the best setting, to be trained as it is."""
    whole = job(best.changes)
    whole["run"].pop("name", None)
    file.write_text(
        f"# {best.name}: {config.metric} {best.mean:.6g} in the sweep\n{yaml.safe_dump(whole, sort_keys=False)}"
    )
    return file


def _close(
    console: Console,
    parent: "SweepRun",
    config: SweepConfig,
    outcomes: Sequence[TrialOutcome],
    settings: Sequence[Setting],
    files: Sequence[Path],
) -> None:
    """Tell MLflow; a server that is away now costs nothing but its copy."""
    counts = Counter(outcome.status.replace(" ", "_") for outcome in outcomes)
    figures: dict[str, float] = {f"trials/{status}": count for status, count in counts.items()}
    figures |= {f"best/{config.metric}": settings[0].mean} if settings else {}
    failed = any(outcome.status == "failed" for outcome in outcomes)
    status = "FAILED" if failed else "FINISHED" if all(outcome.status in KEPT for outcome in outcomes) else "KILLED"
    try:
        parent.close(status, figures, {"best": settings[0].name} if settings else {}, files)
    except Exception as error:  # a tracking server fails in as many ways as there are
        cause = f"{type(error).__name__}: {one_line(error, 200)}"
        console.print(f"MLflow does not take the results ({cause}); the same command sends them again", markup=False)
