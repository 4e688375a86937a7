"""`switchwork sweep`: a job many times over with other values for some of its keys, as children of one MLflow run. What is done already is kept."""

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from launch.config import expert_ranks
from launch.console.many_runs import progress
from launch.console.tables import table
from launch.start import Background, prepare_data, stopping
from launch.sweep.config import Asha, SweepConfig
from launch.sweep.outcomes import KEPT, claim, look
from launch.sweep.results import finish
from launch.sweep.trials import Trial, as_overrides, job_file, plan, read_sweep
from trainer.config import RunConfig
from trainer.parsing import one_line, plain, read_job
from trainer.run_files import RunFiles
from trainer.settle import prepare
from trainer.storage import Folder, absolute, check_writable
from trainer.tracking.config import tracking_uri
from trainer.world import choose_device

if TYPE_CHECKING:
    from trainer.tracking.mlflow_run import SweepRun


def show_trials(console: Console, path: str, overrides: Sequence[str], folder: str | None) -> None:
    """Print what would be run, once all of it is checked."""
    config, _, trials = _planned(path, overrides, folder)
    rows = [(trial.name, str(trial.steps or "-"), " ".join(as_overrides(trial.changes))) for trial in trials]
    title = f"{len(trials)} trials, by {config.mode} {config.metric}"
    console.print(table(title, ("trial", "steps", "changes"), rows, left=(0, 2), cells="fold"))


def sweep(console: Console, path: str, overrides: Sequence[str], folder: str | None) -> bool:
    """Run what is missing, then show and keep what came out; returns whether every trial has come to its end."""
    config, place, trials = _planned(path, overrides, folder)
    check_writable(place.url, "--folder")
    claim(place, config, trials)
    left = {trial.name for trial in trials if look(trial, config.metric).status not in KEPT}
    if left:
        _prepare([trial for trial in trials if trial.name in left])
    parent = _parent(place, config, trials[0]) if trials[0].job.run.tracking.enabled else None
    trials = [trial.child_of(parent.run_id if parent else None) for trial in trials]
    try:
        if left:
            _run(console, config, place, trials, [trial for trial in trials if trial.name in left])
        return finish(
            console,
            config,
            place,
            trials,
            lambda changes: read_job(job_file(config, path), [*overrides, *as_overrides(changes)]),
            parent,
        )
    except BaseException:
        if parent:
            parent.close("KILLED", {}, {}, [])
        raise


def _planned(path: str, overrides: Sequence[str], folder: str | None) -> tuple[SweepConfig, Folder, list[Trial]]:
    config = read_sweep(path)
    place = Folder(absolute(folder or f"sweeps/{Path(path).stem}"))
    trials = plan(config, path, overrides, place.url)
    if config.fit is not None:
        from launch.sweep.scaling_law_report import check_sizes

        check_sizes(config.fit, trials)
    return config, place, trials


def _prepare(trials: Sequence[Trial]) -> None:
    """What does not need Ray, while Ray is being imported."""
    importing = Background(_import_tune)
    for trial in trials:
        if not (trial.job.cluster.address or os.environ.get("RAY_ADDRESS")):
            choose_device(trial.job.run.device, 0)  # the workers will be on this machine
    for trial in {json.dumps(plain(trial.job)["run"]["objective"]["data"]): trial for trial in trials}.values():
        prepare_data(trial.job)
    importing.join()


def _import_tune() -> None:
    import cluster.on_ray.tune  # noqa: F401


def _parent(place: Folder, config: SweepConfig, trial: Trial) -> "SweepRun":
    """The MLflow run of the sweep. Raises ValueError if the server does not take it: without its id no trial can name it."""
    from trainer.tracking.mlflow_run import SweepRun

    tracking = trial.job.run.tracking
    try:
        return SweepRun(RunFiles(place), tracking, place.name, plain(config))
    except Exception as error:  # a tracking server fails in as many ways as there are
        cause = f"{type(error).__name__}: {one_line(error, 200)}"
        fix = "start it, or set run.tracking.enabled=false"
        raise ValueError(
            f"run.tracking.uri: MLflow at {tracking_uri(tracking)} does not take the sweep's run ({cause}); {fix}"
        ) from None


def _run(
    console: Console, config: SweepConfig, place: Folder, trials: Sequence[Trial], waiting: Sequence[Trial]
) -> None:
    """Have Ray Tune run those that wait, and show how it goes."""
    from cluster.on_ray import train as ray_train
    from cluster.on_ray import tune as tune_sweep

    ray_train.connect(waiting[0].job.cluster)
    try:
        for trial in waiting:
            ray_train.check_room(trial.job.cluster)
        concurrent = _concurrent(config, tune_sweep.max_concurrent(trial.job.cluster for trial in waiting))
        for trial in waiting:
            _make_ready(trial)
        RunFiles(place).delete_stop_request()
        console.print(f"{len(trials)} trials, {min(concurrent, len(waiting))} at a time, in {place}")
        rungs, past = None, {trial.name: look(trial, config.metric).curve for trial in trials if trial not in waiting}
        if isinstance(asha := config.scheduler, Asha):
            most = max(trial.steps or 0 for trial in trials)
            rungs = tune_sweep.Rungs(
                grace_steps=asha.grace_steps, reduction_factor=asha.reduction_factor, last_step=most
            )
        work = {trial.name: _work(trial) for trial in waiting}
        with _watched(console, config, trials), stopping(lambda: [RunFiles(place)], console):
            tune_sweep.run_trials(work, place.url, config.metric, config.mode, concurrent, rungs, past)
    finally:
        ray_train.leave()


def _concurrent(config: SweepConfig, places: int) -> int:
    if config.concurrent is not None and config.concurrent > places and not os.environ.get("SWITCHWORK_AUTOSCALING"):
        many = f"{places} such trial{'s' * (places > 1)} at a time"
        raise ValueError(f"concurrent: {config.concurrent}, but the cluster has room for {many}; use {places}, or null")
    return config.concurrent or places


def _make_ready(trial: Trial) -> None:
    """The run's folder as `switchwork train` makes it; what its last attempt came to is forgotten, its checkpoints are not."""
    trial.files.delete_results()
    prepare(trial.job.run, trial.files.has_begun, plain(trial.job.cluster))


def _work(trial: Trial) -> Any:
    from cluster.on_ray.tune import Work

    run, cluster = trial.job.run, trial.job.cluster
    return Work(values=plain(run), cluster=cluster, expert_ranks=expert_ranks(trial.job), steps=trial.steps)


@contextmanager
def _watched(console: Console, config: SweepConfig, trials: Sequence[Trial]) -> Iterator[None]:
    """A bar over all trials and a line for each that ends, while the block runs."""
    by_name = {trial.name: trial for trial in trials}

    def ended(run: RunConfig) -> str:
        outcome = look(by_name[str(run.name)], config.metric)
        value = "" if outcome.value is None or outcome.status == "failed" else f", {config.metric} {outcome.value:.4f}"
        return f"{outcome.words}{value}" if outcome.status in (*KEPT, "failed") else ""

    over = threading.Event()
    with progress(console, [trial.job.run for trial in trials], "sweep", ended) as show:

        def watch() -> None:
            while not over.wait(1.0):
                show()

        thread = threading.Thread(target=watch, name="sweep", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            show()
