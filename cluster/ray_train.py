"""Ray Train starts the workers, and starts them again after a failure; the worker itself is trainer/worker.py."""

import logging
import os
import re
import socket
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

import ray
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from cluster.config import ClusterConfig
from cluster.failures import PREEMPTED, NoteFailures, WorkerPreempted, preemption
from trainer.attempts import close_attempt, current_attempt
from trainer.storage import Folder
from trainer.world import free_port


def connect(cluster: ClusterConfig) -> None:
    """Join the Ray cluster that the job or RAY_ADDRESS names, or start one on this machine. Raises ValueError if it is not there."""
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    try:
        _knock(address)
        # "local" and not None: with None Ray would look for a cluster that was once started here, and wait for it if it is gone.
        ray.init(address=address or "local", include_dashboard=None if address else False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError) as error:
        cause = " ".join(str(error).split())[:200]
        raise ValueError(f"cluster.address: cannot reach Ray at {address} ({cause}); is it up, and is RAY_AUTH_TOKEN right?") from None


def _knock(address: str | None) -> None:
    """Raises OSError if nobody listens at `address`, where that is host:port: Ray itself would try for minutes."""
    if address and (found := re.fullmatch(r"(?:ray://)?([\w.-]+):(\d+)", address)):
        socket.create_connection((found[1], int(found[2])), timeout=5).close()


def leave() -> None:
    """Leave the Ray cluster; one that was started here ends."""
    ray.shutdown()


def gpus_per_worker(cluster: ClusterConfig) -> float:
    """As configured, else one if the cluster has any."""
    if cluster.gpus_per_worker is not None:
        return cluster.gpus_per_worker
    return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0


def check_room(cluster: ClusterConfig) -> None:
    """Raises ValueError if the connected cluster can never hold the workers."""
    if os.environ.get("SWITCHWORK_AUTOSCALING"):
        return  # nodes come when workers ask for them; how many at most was checked when the job was submitted
    there = ray.cluster_resources()
    gpus = gpus_per_worker(cluster)
    for name, field, each in (("CPU", "cpus_per_worker", cluster.cpus_per_worker), ("GPU", "gpus_per_worker", gpus)):
        wanted, has = cluster.fewest * each, there.get(name, 0)
        if wanted > has:
            total = f"{cluster.fewest} x {field} {each:g} = {wanted:g} {name}s"
            raise ValueError(f"cluster.workers: {total}, and the cluster has {has:g}; use fewer workers or a smaller {field}")


class WorkersFailed(RuntimeError):
    """The workers failed, and were not to be started again."""


class _Trainer(DataParallelTrainer):
    """Ray's base trainer, as the ranks join each other by themselves: TorchTrainer would have the controller import torch first.

    Without the actor that removes placement groups if the controller dies: it needs the dashboard, which a local Ray does without.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]


def train(values: Mapping[str, Any], cluster: ClusterConfig, started: float) -> None:
    """Run `values` (a plain RunConfig) on the connected cluster until it is done. Raises WorkersFailed if they fail for good."""
    _run(_worker, {"run": dict(values), "started": started}, values, cluster)


def audit(values: Mapping[str, Any], cluster: ClusterConfig) -> None:
    """Have the workers of `values` make the steps of an audit, and write their evidence into the run's folder. Raises WorkersFailed."""
    _run(_audit_worker, {"run": dict(values)}, values, cluster)


def _run(work: Callable[[dict[str, Any]], None], config: dict[str, Any], values: Mapping[str, Any], cluster: ClusterConfig) -> None:
    gpus = gpus_per_worker(cluster)
    trainer = _Trainer(
        work,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,  # type: ignore[arg-type]  # Ray's hint is of the older interface
            use_gpu=gpus > 0,
            resources_per_worker=_resources(cluster, gpus),
        ),
        run_config=RayRunConfig(
            name=values["name"],
            storage_path=_storage(values),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=[NoteFailures(f"{values['root']}/{values['name']}")],  # type: ignore[list-item]  # Ray's hint is of the older interface
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise WorkersFailed(_cause(error, Folder(f"{values['root']}/{values['name']}"))) from error


def _resources(cluster: ClusterConfig, gpus: float) -> dict[str, float]:
    return {"CPU": cluster.cpus_per_worker} | ({"GPU": gpus} if gpus else {})


def _storage(values: Mapping[str, Any]) -> str:
    """Where Ray Train keeps its own few files: inside the run folder, so that nothing lies about elsewhere."""
    return f"{values['root']}/{values['name']}/ray"


def _worker(config: dict[str, Any]) -> None:
    """What Ray Train calls on each worker of a run."""
    _say_where_ranks_meet()
    from trainer.worker import run_worker

    summary = run_worker(config["run"], say=print, started=config["started"], asked=preemption)
    if summary["stopped"].startswith(PREEMPTED):
        raise WorkerPreempted(summary["stopped"])


def _audit_worker(config: dict[str, Any]) -> None:
    """And on each worker of an audit."""
    _say_where_ranks_meet()
    from trainer.audit.collect import audit_worker

    audit_worker(config["run"])


def _say_where_ranks_meet() -> None:
    """As torchrun would."""
    context = ray.train.get_context()
    here = (ray.util.get_node_ip_address(), free_port())
    host, port = broadcast_from_rank_zero(here)
    ranks = {"RANK": context.get_world_rank(), "WORLD_SIZE": context.get_world_size(), "LOCAL_RANK": context.get_local_rank()}
    os.environ |= {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": host, "MASTER_PORT": str(port)}


def _cause(error: BaseException, folder: Folder) -> str:
    """What the first failed worker raised, with its traceback above it, and why the attempt ended."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    said = [f"{failure}\nworker {rank} failed, see above" for rank, failure in sorted(failures.items())][:1] or [str(error)]
    attempt = current_attempt(folder)
    if attempt >= 0:
        said.append(f"attempt {attempt} ended: {close_attempt(folder, attempt)}")
    return "\n".join(said)
