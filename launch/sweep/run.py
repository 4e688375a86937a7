"""`switchwork sweep`: runs of one job with different values for some of its keys.

The runs are children of one MLflow run. Trials that have ended are not run again.
"""

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from launch.config import expert_ranks
from launch.console.many_runs import progress
from launch.console.tables import table
from launch.start import Background, prepare_data, stopping
from launch.sweep.config import Asha, Grid, SweepConfig
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
    from cluster.on_ray.tune import Rungs, Work
    from trainer.tracking.mlflow_run import SweepRun


def show_trials(console: Console, path: str, overrides: Sequence[str], folder: str | None) -> None:
    """Check all trials of the sweep and print them, without running any."""
    config, _, trials = _planned(path, overrides, folder)
    rows = [(trial.name, str(trial.steps or "-"), " ".join(as_overrides(trial.changes))) for trial in trials]
    title = f"{len(trials)} trials, by {config.mode} {config.metric}"
    console.print(table(title, ("trial", "steps", "changes"), rows, left=(0, 2), cells="fold"))


def sweep(console: Console, path: str, overrides: Sequence[str], folder: str | None) -> bool:
    """Run the trials that have not ended, then show and write the results.

    Returns whether every trial has ended.
    """
    config, root, trials = _planned(path, overrides, folder)
    check_writable(root.url, "--folder")
    claim(root, config, trials)
    waiting = {trial.name for trial in trials if look(trial, config.metric).status not in KEPT}
    if waiting:
        _prepare([trial for trial in trials if trial.name in waiting])
    parent = _parent(root, config, trials[0]) if trials[0].job.run.tracking.enabled else None
    trials = [trial.child_of(parent.run_id if parent else None) for trial in trials]

    def job(changes: Mapping[str, Any]) -> dict[str, Any]:
        return read_job(job_file(config, path), [*overrides, *as_overrides(changes)])

    try:
        if waiting:
            _run(console, config, root, trials, [trial for trial in trials if trial.name in waiting])
        return finish(console, config, root, trials, job, parent)
    except BaseException:
        if parent:
            parent.close("KILLED", {}, {}, [])
        raise


def _planned(path: str, overrides: Sequence[str], folder: str | None) -> tuple[SweepConfig, Folder, list[Trial]]:
    config = read_sweep(path)
    root = Folder(absolute(folder or f"sweeps/{Path(path).stem}"))
    trials = plan(config, path, overrides, root.url)
    if config.fit is not None:
        from launch.sweep.scaling_law_report import check_sizes

        check_sizes(config.fit, trials)
    return config, root, trials


def _prepare(trials: Sequence[Trial]) -> None:
    """Check the devices and prepare the data while Ray is being imported."""
    importing = Background(_import_tune)
    for trial in trials:
        if not (trial.job.cluster.address or os.environ.get("RAY_ADDRESS")):
            choose_device(trial.job.run.device, 0)  # the workers will be on this machine
    by_data = {json.dumps(plain(trial.job)["run"]["objective"]["data"]): trial for trial in trials}
    for trial in by_data.values():
        prepare_data(trial.job)
    importing.join()


def _import_tune() -> None:
    import cluster.on_ray.tune  # noqa: F401


def _parent(root: Folder, config: SweepConfig, trial: Trial) -> "SweepRun":
    """Open the MLflow run of the sweep.

    Raises ValueError if the server does not accept it: the trials need its id to name their parent.
    """
    from trainer.tracking.mlflow_run import SweepRun

    tracking = trial.job.run.tracking
    try:
        return SweepRun(RunFiles(root), tracking, root.name, plain(config))
    except Exception as error:  # a tracking server fails in more ways than can be listed
        cause = f"{type(error).__name__}: {one_line(error, 200)}"
        problem = f"MLflow at {tracking_uri(tracking)} does not accept the sweep's run ({cause})"
        advice = "start it, or set run.tracking.enabled=false"
        raise ValueError(f"run.tracking.uri: {problem}; {advice}") from None


def _run(
    console: Console, config: SweepConfig, root: Folder, trials: Sequence[Trial], waiting: Sequence[Trial]
) -> None:
    """Have Ray Tune run the waiting trials, and show their progress."""
    from cluster.on_ray import train as ray_train
    from cluster.on_ray import tune as tune_sweep

    ray_train.connect(waiting[0].job.cluster)
    try:
        for trial in waiting:
            ray_train.check_room(trial.job.cluster)
        concurrent = _concurrent(config, tune_sweep.max_concurrent(trial.job.cluster for trial in waiting))
        for trial in waiting:
            _make_ready(trial)
        RunFiles(root).delete_stop_request()
        console.print(f"{len(trials)} trials, {min(concurrent, len(waiting))} at a time, in {root}")
        rungs = _rungs(config.scheduler, trials)
        past = {trial.name: look(trial, config.metric).curve for trial in trials if trial not in waiting}
        work = {trial.name: _work(trial) for trial in waiting}
        with _watched(console, config, trials), stopping(lambda: [RunFiles(root)], console):
            tune_sweep.run_trials(work, root.url, config.metric, config.mode, concurrent, rungs, past)
    finally:
        ray_train.leave()


def _rungs(scheduler: Grid | Asha, trials: Sequence[Trial]) -> "Rungs | None":
    from cluster.on_ray.tune import Rungs

    if isinstance(scheduler, Grid):
        return None
    last_step = max(trial.steps or 0 for trial in trials)
    return Rungs(grace_steps=scheduler.grace_steps, reduction_factor=scheduler.reduction_factor, last_step=last_step)


def _concurrent(config: SweepConfig, places: int) -> int:
    """The number of trials at a time, given the number that the cluster has room for."""
    if config.concurrent is not None and config.concurrent > places and not os.environ.get("SWITCHWORK_AUTOSCALING"):
        room = f"{places} such trial{'s' * (places > 1)} at a time"
        raise ValueError(f"concurrent: {config.concurrent}, but the cluster has room for {room}; use {places}, or null")
    return config.concurrent or places


def _make_ready(trial: Trial) -> None:
    """Prepare the run's folder as `switchwork train` does.

    The results of the last attempt are deleted, its checkpoints are kept.
    """
    trial.files.delete_results()
    prepare(trial.job.run, trial.files.has_begun, plain(trial.job.cluster))


def _work(trial: Trial) -> "Work":
    from cluster.on_ray.tune import Work

    ranks = expert_ranks(trial.job)
    return Work(values=plain(trial.job.run), cluster=trial.job.cluster, expert_ranks=ranks, steps=trial.steps)


@contextmanager
def _watched(console: Console, config: SweepConfig, trials: Sequence[Trial]) -> Iterator[None]:
    """Show a bar over all trials, and a line per trial that ends, while the block runs."""
    by_name = {trial.name: trial for trial in trials}

    def ended(run: RunConfig) -> str:
        outcome = look(by_name[str(run.name)], config.metric)
        if outcome.status not in (*KEPT, "failed"):
            return ""
        if outcome.value is None or outcome.status == "failed":
            return outcome.words
        return f"{outcome.words}, {config.metric} {outcome.value:.4f}"

    done = threading.Event()
    with progress(console, [trial.job.run for trial in trials], "sweep", ended) as show:

        def watch() -> None:
            while not done.wait(1.0):
                show()

        thread = threading.Thread(target=watch, name="sweep", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            show()
