"""Starts workers with Ray Train and restarts them after a failure.

A lost node ends the attempt. Ray Train then starts all workers again, as many as fit, and they
resume from the newest intact checkpoint. failures.py records the cause, and scheduling.py leaves
out nodes that no longer answer. The worker itself is trainer/worker/main.py.
"""

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

import psutil
import ray
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.config import RunConfig as RayRunConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from cluster.config.cluster import ClusterConfig
from cluster.on_ray.failures import NoteFailures, WorkerPreempted, preemption
from cluster.on_ray.scheduling import Elastic, Placement, fitting_nodes
from cluster.placement import room
from trainer.endings import Ending
from trainer.parsing import Json, one_line
from trainer.records.attempts import close_attempt, current_attempt
from trainer.run_files import RunFiles, run_files
from trainer.world import open_rendezvous

if TYPE_CHECKING:
    from ray.train import Result
    from ray.train.v2._internal.execution.callback import RayTrainCallback

WorkerFunction = Callable[[Json], None]
"""A function that Ray Train calls on each worker, with its configuration."""


def connect(cluster: ClusterConfig) -> None:
    """Join the Ray cluster that the job or RAY_ADDRESS names, or start one on this machine.

    Raises ValueError if the cluster does not answer.
    """
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    try:
        _check_port(address)
        # With None in place of "local", Ray would wait for a cluster that once ran on this machine.
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (OSError, RuntimeError) as error:
        cause = one_line(error, 200)
        raise ValueError(
            f"cluster.address: cannot reach Ray at {address} ({cause}); is it up, and is RAY_AUTH_TOKEN right?"
        ) from None


def _check_port(address: str | None) -> None:
    """Raises OSError if `address` is host:port and nothing listens there.

    Ray itself would try for minutes.
    """
    if address and (match := re.fullmatch(r"(?:ray://)?([\w.-]+):(\d+)", address)):
        socket.create_connection((match[1], int(match[2])), timeout=5).close()


def leave() -> None:
    """Leave the Ray cluster; a cluster that `connect` started ends."""
    ray.shutdown()


def gpus_per_worker(cluster: ClusterConfig) -> float:
    """GPUs per worker as configured, else one if the cluster has any."""
    if cluster.gpus_per_worker is not None:
        return cluster.gpus_per_worker
    return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0


def fits(cluster: ClusterConfig) -> int:
    """The number of such workers that fit on the connected cluster."""
    return room(fitting_nodes(cluster.node_labels), _resources(cluster, gpus_per_worker(cluster)), cluster.placement)


def check_room(cluster: ClusterConfig) -> None:
    """Raises ValueError if the connected cluster can never hold the workers."""
    if os.environ.get("SWITCHWORK_AUTOSCALING"):
        return  # nodes are added when workers ask for them; `submit` has checked the maximum
    if (fit := fits(cluster)) < cluster.min_workers:
        resources = _resources(cluster, gpus_per_worker(cluster))
        wanted = " and ".join(f"{name.lower()}s_per_worker {amount:g}" for name, amount in resources.items())
        nodes = _describe_nodes(cluster, list(resources))
        where = " on one node (placement STRICT_PACK)" if cluster.placement == "STRICT_PACK" else ""
        raise ValueError(
            f"cluster.workers: {cluster.min_workers} with {wanted}, and {nodes} have room for {fit}{where}; "
            "use fewer workers, or smaller ones"
        )


def _describe_nodes(cluster: ClusterConfig, kinds: Sequence[str]) -> str:
    """The number of nodes that the workers may run on, and their total of each resource."""
    nodes = fitting_nodes(cluster.node_labels)
    count = "1 node" if len(nodes) == 1 else f"{len(nodes)} nodes"
    labels = f" with node_labels {cluster.node_labels}" if cluster.node_labels else ""
    totals = {kind: sum(resources.get(kind, 0) for resources in nodes.values()) for kind in kinds}
    return f"{count}{labels}" + "".join(f", {total:g} {kind}s" for kind, total in totals.items())


def waits_for(cluster: ClusterConfig) -> str:
    """The resource that the workers wait for because other jobs hold it; "" if there is none."""
    free = ray.available_resources()
    for name, amount in _resources(cluster, gpus_per_worker(cluster)).items():
        if (has := free.get(name, 0)) < (wanted := cluster.min_workers * amount):
            return f"{wanted:g} {name}s, of which {has:g} are free now"
    return ""


class WorkersFailed(RuntimeError):
    """The workers failed, and no restarts are left."""


class _Trainer(DataParallelTrainer):
    """Ray's base trainer, with our policy for a range of workers.

    The ranks join each other without Ray; TorchTrainer would make the controller import torch
    first. The actor that removes placement groups if the controller dies is left out: it needs the
    dashboard, which a local Ray does without.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        work: WorkerFunction,
        config: Json,
        scaling_config: ScalingConfig,
        run_config: RayRunConfig,
    ):
        super().__init__(
            work,
            train_loop_config=config,
            scaling_config=scaling_config,
            run_config=run_config,  # type: ignore[arg-type]  # Ray's hint names the class of Ray Train V1
        )
        self.cluster = cluster

    def _initialize_and_run_controller(self, **options: object) -> "Result":
        if self.cluster.min_workers < self.cluster.max_workers:
            # The class is one of Ray Train V2.
            options["scaling_policy"] = Elastic(self.scaling_config, self.cluster)  # type: ignore[arg-type]
        return super()._initialize_and_run_controller(**options)

    def _create_default_callbacks(self) -> list["RayTrainCallback"]:
        callbacks = super()._create_default_callbacks()
        kept = [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]
        # Placement comes first, so that the others learn of the nodes that it gives up.
        return sorted(kept, key=lambda callback: not isinstance(callback, Placement))


def train(values: Json, cluster: ClusterConfig, started: float, expert_ranks: Mapping[int, int]) -> None:
    """Run `values` (a plain RunConfig) on the connected cluster until it is done.

    `expert_ranks` maps a number of workers to the number of ranks that share a set of experts.
    Raises WorkersFailed if the workers fail and no restarts are left.
    """
    _run(_worker, {"run": values, "started": started}, values, cluster, expert_ranks)


def audit(values: Json, cluster: ClusterConfig, expert_ranks: Mapping[int, int]) -> None:
    """Have the workers of `values` run the steps of an audit.

    They write their evidence to the run folder. Raises WorkersFailed as `train` does.
    """
    _run(_audit_worker, {"run": values}, values, cluster, expert_ranks)


def _run(
    work: WorkerFunction,
    config: Json,
    values: Json,
    cluster: ClusterConfig,
    expert_ranks: Mapping[int, int],
) -> None:
    files = run_files(values["root"], values["name"])
    try:
        start_workers(work, config, cluster, files, expert_ranks)
    except ray.train.TrainingFailedError as error:
        raise WorkersFailed(_cause(error, files)) from error


def start_workers(
    work: WorkerFunction,
    config: Json,
    cluster: ClusterConfig,
    files: RunFiles,
    expert_ranks: Mapping[int, int],
) -> None:
    """Call `work` with `config` on each worker of the connected cluster until all have finished.

    After a failure all workers are called again. `files` are the run's; `expert_ranks` maps a
    number of workers to the number of ranks that share a set of experts.
    """
    gpus = gpus_per_worker(cluster)
    scaling = ScalingConfig(
        num_workers=cluster.workers,
        use_gpu=gpus > 0,
        resources_per_worker=_resources(cluster, gpus),
        placement_strategy=cluster.placement,
        label_selector=cluster.selector or None,
    )
    settings = RayRunConfig(
        name=files.folder.name,
        storage_path=files.ray.url,  # Ray Train's own few files, kept inside the run folder
        failure_config=FailureConfig(max_failures=cluster.max_failures),
        # Ray's hint names UserCallback alone.
        callbacks=[NoteFailures(files.folder.url), Placement(cluster, expert_ranks)],  # type: ignore[list-item]
        worker_runtime_env={"env_vars": cluster.env},
    )
    _Trainer(cluster, work, config, scaling, settings).fit()


def _resources(cluster: ClusterConfig, gpus: float) -> dict[str, float]:
    return {"CPU": cluster.cpus_per_worker} | ({"GPU": gpus} if gpus else {})


def _worker(config: Json) -> None:
    """The function that Ray Train calls on each worker of a run."""
    with _rendezvous():
        from trainer.worker.main import run_worker

        summary = run_worker(config["run"], say=print, started=config["started"], asked=preemption)
    if summary["ending"] is Ending.PREEMPTED:
        raise WorkerPreempted(summary["stopped"])


def _audit_worker(config: Json) -> None:
    """The function that Ray Train calls on each worker of an audit."""
    with _rendezvous():
        from trainer.audit.collect import audit_worker

        audit_worker(config["run"])


@contextmanager
def _rendezvous() -> Iterator[None]:
    """Name this worker's rank and rank 0's address in the environment, as torchrun does.

    On rank 0 the store at which the ranks meet is open for as long as the block runs.
    """
    context = ray.train.get_context()
    ip = ray.util.get_node_ip_address()
    store, address = open_rendezvous(ip) if context.get_world_rank() == 0 else (None, {})
    address = broadcast_from_rank_zero(address)
    if interface := _interface(ip):
        # By default gloo uses the host name's interface, which other nodes may not reach.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    ranks = {
        "RANK": context.get_world_rank(),
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(),
    }
    os.environ |= {name: str(value) for name, value in ranks.items()} | address
    yield
    del store


def _interface(ip: str) -> str:
    """The network interface with the address `ip`; "" if there is none, as behind NAT."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == ip for address in addresses):
            return str(name)
    return ""


def _cause(error: BaseException, files: RunFiles) -> str:
    """The error of the first failed worker below its traceback, and why the attempt ended."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    lines = [str(error)]
    if failures:
        rank = min(failures)
        lines = [f"{failures[rank]}\nworker {rank} failed, see above"]
    if missing := re.findall(r"(?:ModuleNotFoundError|ImportError): (.+)", lines[0]):
        lines.append(
            f"a worker's node is missing a package ({missing[-1]}); install this checkout's environment on every node"
        )
    attempt = current_attempt(files)
    if attempt >= 0:
        lines.append(f"attempt {attempt} ended: {close_attempt(files, attempt)}")
    return "\n".join(lines)
