"""Ray Tune runs the trials of a sweep, so many at a time: each is a whole run through cluster/on_ray/train.py, in a folder of its own.

Tune learns from the run's metrics how a trial does. It never kills a run: one that is to end is asked through a file `stop`, as by a
person, so that it saves and can go on later. What came of a trial stands in its folder; of Tune's own files nothing is read again.
"""

import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints even where it is to be silent
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_DISABLE_RESOURCE_CHECKS", "1")  # they take Ray Train's controller for a task without room
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")

from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from cluster.config.cluster import ClusterConfig
from cluster.on_ray import train as ray_train
from trainer.endings import Ending, Stopped
from trainer.parsing import Json
from trainer.run_files import RunFiles, run_files
from trainer.storage import Folder
from trainer.tracking.tracker import history

_LOOK_EVERY_S = 1.0
_HOPELESS = 1e12  # stands for a figure that is not finite: ASHA's percentiles cannot take inf


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a trial needs of its job."""

    values: Json
    """A plain RunConfig."""
    cluster: ClusterConfig
    expert_ranks: dict[int, int]
    """Ranks that share a set of experts, by the number of workers."""
    steps: int | None
    """The last step, where it is known."""


@dataclass(frozen=True, kw_only=True)
class Rungs:
    """Where ASHA looks at trials, and how many it lets go on."""

    grace_steps: int
    reduction_factor: float
    most: int
    """The last step of any trial."""


def places(clusters: Iterable[ClusterConfig]) -> int:
    """How many trials have room on the connected cluster at a time, with the largest of `clusters`."""
    return max(1, min(ray_train.fits(each) // each.max_workers for each in clusters))


def run_trials(
    work: Mapping[str, Work],
    root: str,
    metric: str,
    mode: str,
    concurrent: int,
    rungs: Rungs | None,
    past: Mapping[str, list[tuple[int, float]]],
) -> None:
    """Run all of `work` (by name, the folder below `root`) to their ends, in order, `concurrent` at a time; a trial that fails does not end the others.

    A file `stop` in `root` ends those under way, and the rest is not begun. With `rungs` ASHA judges them beside the `past` trials' metrics by step.
    """
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    sweep = RunFiles(Folder(root))
    sweep.ray.remove()  # what Tune wrote the last time

    def trainable(config: Json) -> None:
        _run_trial(work[config["trial"]], root, config["trial"], metric)

    tune.Tuner(
        tune.with_resources(
            trainable, tune.PlacementGroupFactory([{"memory": 1}])
        ),  # the workers have a placement group of their own; Tune wants one, too
        param_space={"trial": tune.grid_search(list(work))},
        tune_config=tune.TuneConfig(
            scheduler=_Asha(root, mode, rungs, past) if rungs else None,
            max_concurrent_trials=concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name="tune", storage_path=sweep.ray.url, verbose=0, callbacks=[_NoTuneOutput()]),
    ).fit()
    for name in work:
        trial = run_files(root, name)
        if trial.has_begun and not trial.has_summary and trial.failure() is None and sweep.stop_request() is None:
            trial.write_failure("killed, or its machine was lost: nobody said why")


def _run_trial(work: Work, root: str, name: str, metric: str) -> None:
    """The function that Tune calls, in an actor: the run in a thread, and what it writes down told to Tune."""
    files, sweep = run_files(root, name), RunFiles(Folder(root))
    told, asked = 0, False
    if sweep.stop_request() is not None:
        return
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(ray_train.train, work.values, work.cluster, time.time(), work.expert_ranks)
        ended = False
        while not ended:
            ended = bool(wait([run], timeout=_LOOK_EVERY_S).done)
            points = history(files, metric)
            for step, value in points[told:]:
                tune.report({"step": step, "value": value if math.isfinite(value) else _HOPELESS, "steps": work.steps})
            told = len(points)
            if not asked and (stopped := sweep.stop_request()) is not None:
                files.request_stop(stopped)
                asked = True
    if error := run.exception():
        files.write_failure(str(error))


class _NoTuneOutput(TrialProgressCallback):
    """Tune says at any verbosity that a trial is through which has reported nothing, as those that a stop has kept from beginning."""

    def _print(self, msg: str) -> None:
        pass


class _Asha(AsyncHyperBandScheduler):
    """Ray's ASHA, which asks a losing run to stop, and does not forget over a restart of the command what earlier trials did."""

    def __init__(self, root: str, mode: str, rungs: Rungs, past: Mapping[str, list[tuple[int, float]]]):
        super().__init__(
            time_attr="step",
            metric="value",
            mode=mode,
            max_t=rungs.most,
            grace_period=rungs.grace_steps,
            reduction_factor=rungs.reduction_factor,
            stop_last_trials=False,
        )
        self.root, self.worst = root, _HOPELESS if mode == "min" else -_HOPELESS
        for name, points in past.items():
            trial: Any = SimpleNamespace(trial_id=name)
            self.on_trial_add(None, trial)  # type: ignore[arg-type]  # the controller is not asked
            for step, value in points:
                self._judge(None, trial, {"step": step, "value": value})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Json) -> str:
        if self._judge(tune_controller, trial, result) == TrialScheduler.STOP and result["step"] < result["steps"]:
            pruned = Stopped(Ending.PRUNED, f"behind the others at step {result['step']}")
            run_files(self.root, trial.config["trial"]).request_stop(pruned)
        return str(TrialScheduler.CONTINUE)

    def _judge(self, tune_controller: Any, trial: Any, result: Json) -> str:
        """Ray's decision; a figure that is not finite is the worst."""
        if "value" in result and (not math.isfinite(result["value"]) or abs(result["value"]) >= _HOPELESS):
            result = result | {"value": self.worst}
        return str(super().on_trial_result(tune_controller, trial, result))
