"""Runs the trials of a sweep with Ray Tune, several at a time.

A trial is a run of its own, started by cluster/on_ray/train.py in its own folder. Tune reads the
progress of a trial from the run's metrics. It never kills a run: a file `stop` asks a losing run to
end, as a person would, so that the run saves and can continue later. The outcome of a trial is in
its folder; Tune's own files are not read again.
"""

import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints even when it should be silent
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault(
    "TUNE_DISABLE_RESOURCE_CHECKS", "1"
)  # they mistake Ray Train's controller for a task without room
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from cluster.config.cluster import ClusterConfig
from cluster.on_ray import train as ray_train
from trainer.endings import Ending, Stopped
from trainer.parsing import Json
from trainer.run_files import RunFiles, run_files
from trainer.storage import Folder
from trainer.tracking.tracker import history

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController

_POLL_EVERY_S = 1.0
_NOT_FINITE = 1e12  # stands for a metric that is not finite: ASHA's percentiles do not accept inf


@dataclass(frozen=True, kw_only=True)
class Work:
    """The parts of a trial's job that are needed to run it."""

    values: Json
    """The trial's run, as a plain RunConfig."""
    cluster: ClusterConfig
    """The trial's workers."""
    expert_ranks: dict[int, int]
    """Number of ranks that share a set of experts, for each number of workers."""
    steps: int | None
    """The last step of the run; None if it is not known."""


@dataclass(frozen=True, kw_only=True)
class Rungs:
    """The steps at which ASHA compares trials, and the share of them that continues."""

    grace_steps: int
    """Steps that every trial may run."""
    reduction_factor: float
    """Factor between one rung's step and the next; one in so many trials continues."""
    last_step: int
    """The last step of any trial."""


def max_concurrent(clusters: Iterable[ClusterConfig]) -> int:
    """The number of trials that fit on the connected cluster, for the largest of `clusters`."""
    return max(1, min(ray_train.fits(cluster) // cluster.max_workers for cluster in clusters))


def run_trials(
    work: Mapping[str, Work],
    root: str,
    metric: str,
    mode: str,
    concurrent: int,
    rungs: Rungs | None,
    past: Mapping[str, list[tuple[int, float]]],
) -> None:
    """Run all trials of `work` in order, `concurrent` at a time.

    The keys of `work` name the trials' folders below `root`. A failed trial does not end the
    others. A file `stop` in `root` ends the trials that run, and no others are started. With
    `rungs`, ASHA compares the trials with one another and with the (step, metric) pairs of `past`
    trials.
    """
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    sweep = RunFiles(Folder(root))
    sweep.ray.remove()  # Tune's files of an earlier command

    def trainable(config: Json) -> None:
        _run_trial(work[config["trial"]], root, config["trial"], metric)

    # The workers have a placement group of their own, but Tune requires one, too.
    smallest_group = tune.PlacementGroupFactory([{"memory": 1}])
    tune.Tuner(
        tune.with_resources(trainable, smallest_group),
        param_space={"trial": tune.grid_search(list(work))},
        tune_config=tune.TuneConfig(
            scheduler=_Asha(root, mode, rungs, past) if rungs else None,
            max_concurrent_trials=concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name="tune", storage_path=sweep.ray.url, verbose=0, callbacks=[_NoTuneOutput()]),
    ).fit()
    _record_lost_trials(work, root, sweep)


def _record_lost_trials(names: Iterable[str], root: str, sweep: RunFiles) -> None:
    """Write a failure for each trial that began and left neither a summary nor a failure."""
    for name in names:
        trial = run_files(root, name)
        if trial.has_begun and not trial.has_summary and trial.failure() is None and sweep.stop_request() is None:
            trial.write_failure("killed, or its machine was lost: no reason was recorded")


def _run_trial(work: Work, root: str, name: str, metric: str) -> None:
    """Run a trial in a thread and report its metrics; Tune calls this in an actor."""
    files = run_files(root, name)
    sweep = RunFiles(Folder(root))
    reported = 0
    asked = False
    if sweep.stop_request() is not None:
        return
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(ray_train.train, work.values, work.cluster, time.time(), work.expert_ranks)
        ended = False
        while not ended:
            ended = bool(wait([run], timeout=_POLL_EVERY_S).done)
            points = history(files, metric)
            for step, value in points[reported:]:
                finite = value if math.isfinite(value) else _NOT_FINITE
                tune.report({"step": step, "value": finite, "steps": work.steps})
            reported = len(points)
            if not asked and (stopped := sweep.stop_request()) is not None:
                files.request_stop(stopped)
                asked = True
    if error := run.exception():
        files.write_failure(str(error))


class _NoTuneOutput(TrialProgressCallback):
    """Silences the line that Tune prints at any verbosity for a trial without reports."""

    def _print(self, msg: str) -> None:
        pass


class _Asha(AsyncHyperBandScheduler):
    """Ray's ASHA, except that it asks a losing run to stop and also knows earlier trials.

    The earlier trials are those that an interrupted command has run.
    """

    def __init__(self, root: str, mode: str, rungs: Rungs, past: Mapping[str, list[tuple[int, float]]]):
        super().__init__(
            time_attr="step",
            metric="value",
            mode=mode,
            max_t=rungs.last_step,
            grace_period=rungs.grace_steps,
            reduction_factor=rungs.reduction_factor,
            stop_last_trials=False,
        )
        self.root = root
        self.worst = _NOT_FINITE if mode == "min" else -_NOT_FINITE
        for name, points in past.items():
            trial = cast(Trial, SimpleNamespace(trial_id=name))
            controller = cast("TuneController", None)  # ASHA does not ask it
            self.on_trial_add(controller, trial)
            for step, value in points:
                self._decide(controller, trial, {"step": step, "value": value})

    def on_trial_result(self, tune_controller: "TuneController", trial: Trial, result: Json) -> str:
        if self._decide(tune_controller, trial, result) == TrialScheduler.STOP and result["step"] < result["steps"]:
            pruned = Stopped(Ending.PRUNED, f"behind the others at step {result['step']}")
            run_files(self.root, trial.config["trial"]).request_stop(pruned)
        return str(TrialScheduler.CONTINUE)

    def _decide(self, tune_controller: "TuneController", trial: Trial, result: Json) -> str:
        """Ray's decision, in which a metric that is not finite counts as the worst."""
        if "value" in result and (not math.isfinite(result["value"]) or abs(result["value"]) >= _NOT_FINITE):
            result = result | {"value": self.worst}
        return str(super().on_trial_result(tune_controller, trial, result))
