"""The results of a sweep: results.json, a table, pictures, and the job of the best setting."""

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
"""Returns the fields of the job file, with the given values for some keys."""


def finish(
    console: Console,
    config: SweepConfig,
    folder: Folder,
    trials: Sequence[Trial],
    job: JobWith,
    parent: "SweepRun | None",
) -> bool:
    """Print the results, and write them to the folder of the sweep and to MLflow.

    Returns whether every trial has ended.
    """
    outcomes = [look(trial, config.metric) for trial in trials]
    _refuse_unknown_metric(config, outcomes)
    settings = ranked(outcomes, config)
    console.print(table(outcomes, config))
    with tempfile.TemporaryDirectory() as scratch:
        files = [draw_sweep(outcomes, config, folder.name, Path(scratch) / "sweep.png")]
        if settings:
            files.append(_write_best(settings[0], config, job, Path(scratch) / "best.yaml"))
            console.print(_best_words(settings[0], config, folder), style="bold")
        results = _results(outcomes, settings, config)
        if config.fit is not None:
            from launch.sweep.scaling_law_report import fit_and_show

            results["fit"] = fit_and_show(console, config.fit, outcomes, Path(scratch) / "scaling_law.png")
            files += Path(scratch).glob("scaling_law.png")
        files.append(Path(scratch) / "results.json")
        files[-1].write_text(json.dumps(results, indent=1))
        for file in files:
            folder.put(file, file.name)
        if parent:
            _close(console, parent, config, outcomes, settings, files)
    console.print(f"{', '.join(file.name for file in files)} in {folder}")
    complete = all(outcome.status in KEPT for outcome in outcomes)
    if not complete:
        console.print("not all trials have ended; the same command continues them")
    return complete


def _best_words(best: Setting, config: SweepConfig, folder: Folder) -> str:
    seeds = f", mean of {len(best.values)} seeds" if len(best.values) > 1 else ""
    return f"best: {best.name}, {config.metric} {best.mean:.4f}{seeds}; its job is {folder}/best.yaml"


def _results(outcomes: Sequence[TrialOutcome], settings: Sequence[Setting], config: SweepConfig) -> dict[str, object]:
    """The contents of results.json, without the fit."""
    return {
        "metric": config.metric,
        "mode": config.mode,
        "trials": [_facts(outcome) for outcome in outcomes],
        "settings": [asdict(setting) for setting in settings],
    }


def _facts(outcome: TrialOutcome) -> dict[str, object]:
    return {
        "trial": outcome.trial.name,
        "setting": outcome.trial.setting,
        "changes": outcome.trial.changes,
        "seed": outcome.trial.job.run.seed,
        "status": outcome.status,
        "reason": outcome.reason,
        "step": outcome.step,
        "value": _for_json(outcome.value),
        "curve": [(step, _for_json(value)) for step, value in outcome.curve],
    }


def _for_json(value: float | None) -> float | str | None:
    """Return inf and nan, which JSON lacks, as text, as in a run's metrics."""
    return value if value is None or math.isfinite(value) else str(value)


def _refuse_unknown_metric(config: SweepConfig, outcomes: Sequence[TrialOutcome]) -> None:
    finished = [outcome for outcome in outcomes if outcome.status == "finished"]
    if not finished or any(outcome.value is not None for outcome in outcomes):
        return
    names: set[str] = set().union(*(row.metrics for row in finished[0].trial.files.metrics()))
    logged = sorted(name for name in names if name.startswith(("eval/", "quality/")))
    raise ValueError(f"metric: no trial has logged {config.metric}; use one of {', '.join(logged)}")


def _write_best(best: Setting, config: SweepConfig, job: JobWith, file: Path) -> Path:
    """Write the job of the best setting to `file`, ready for `switchwork train`."""
    fields = job(best.changes)
    fields["run"].pop("name", None)
    heading = f"# {best.name}: {config.metric} {best.mean:.6g} in the sweep"
    file.write_text(f"{heading}\n{yaml.safe_dump(fields, sort_keys=False)}")
    return file


def _close(
    console: Console,
    parent: "SweepRun",
    config: SweepConfig,
    outcomes: Sequence[TrialOutcome],
    settings: Sequence[Setting],
    files: Sequence[Path],
) -> None:
    """Send the results to MLflow and close its run; without the server only its copy is missing."""
    counts = Counter(outcome.status.replace(" ", "_") for outcome in outcomes)
    metrics: dict[str, float] = {f"trials/{status}": count for status, count in counts.items()}
    tags: dict[str, str] = {}
    if settings:
        metrics[f"best/{config.metric}"] = settings[0].mean
        tags["best"] = settings[0].name
    try:
        parent.close(_mlflow_status(outcomes), metrics, tags, files)
    except Exception as error:  # a tracking server fails in more ways than can be listed
        cause = f"{type(error).__name__}: {one_line(error, 200)}"
        console.print(f"MLflow does not accept the results ({cause}); the same command sends them again", markup=False)


def _mlflow_status(outcomes: Sequence[TrialOutcome]) -> str:
    if any(outcome.status == "failed" for outcome in outcomes):
        return "FAILED"
    return "FINISHED" if all(outcome.status in KEPT for outcome in outcomes) else "KILLED"
