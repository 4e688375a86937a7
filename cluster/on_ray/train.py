"""Ray Train starts the workers, and starts them again after a failure; the worker itself is trainer/worker/main.py."""

import logging
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
from trainer.world import free_port

WorkerFunction = Callable[[Json], None]
"""What each worker is called with, and does."""


def connect(cluster: ClusterConfig) -> None:
    """Join the Ray cluster that the job or RAY_ADDRESS names, or start one on this machine. Raises ValueError if it is not there."""
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    try:
        _knock(address)
        # "local" and not None: with None Ray would look for a cluster that was once started here, and wait for it if it is gone.
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


def fits(cluster: ClusterConfig) -> int:
    """How many such workers the connected cluster can hold."""
    return room(fitting_nodes(cluster.node_labels), _resources(cluster, gpus_per_worker(cluster)), cluster.placement)


def check_room(cluster: ClusterConfig) -> None:
    """Raises ValueError if the connected cluster can never hold the workers."""
    if os.environ.get("SWITCHWORK_AUTOSCALING"):
        return  # nodes come when workers ask for them; how many at most was checked when the job was submitted
    if (fit := fits(cluster)) < cluster.min_workers:
        resources = _resources(cluster, gpus_per_worker(cluster))
        wanted = " and ".join(f"{name.lower()}s_per_worker {amount:g}" for name, amount in resources.items())
        nodes = _describe_nodes(cluster, list(resources))
        where = " on one node (placement STRICT_PACK)" if cluster.placement == "STRICT_PACK" else ""
        raise ValueError(
            f"cluster.workers: {cluster.min_workers} with {wanted}, and {nodes} have room for {fit}{where}; use fewer workers, or smaller ones"
        )


def _describe_nodes(cluster: ClusterConfig, kinds: Sequence[str]) -> str:
    """The number of nodes that the workers may run on, and how much these have of each kind of resource."""
    nodes = fitting_nodes(cluster.node_labels)
    count = "1 node" if len(nodes) == 1 else f"{len(nodes)} nodes"
    labels = f" with node_labels {cluster.node_labels}" if cluster.node_labels else ""
    totals = {kind: sum(resources.get(kind, 0) for resources in nodes.values()) for kind in kinds}
    return f"{count}{labels}" + "".join(f", {total:g} {kind}s" for kind, total in totals.items())


def waits_for(cluster: ClusterConfig) -> str:
    """What the workers wait for, as other jobs hold it for now; "": nothing."""
    free = ray.available_resources()
    for name, amount in _resources(cluster, gpus_per_worker(cluster)).items():
        if (has := free.get(name, 0)) < (wanted := cluster.min_workers * amount):
            return f"{wanted:g} {name}s, of which {has:g} are free now"
    return ""


class WorkersFailed(RuntimeError):
    """The workers failed, and were not to be started again."""


class _Trainer(DataParallelTrainer):
    """Ray's base trainer, as the ranks join each other by themselves: TorchTrainer would have the controller import torch first.

    A range of workers follows our policy. The actor that removes placement groups if the controller dies needs the dashboard, which a
    local Ray does without.
    """

    def __init__(self, cluster: ClusterConfig, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.cluster = cluster

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        if self.cluster.min_workers < self.cluster.max_workers:
            options["scaling_policy"] = Elastic(self.scaling_config, self.cluster)  # type: ignore[arg-type]  # it is of Ray Train V2
        return super()._initialize_and_run_controller(**options)

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = [
            each for each in super()._create_default_callbacks() if not isinstance(each, PlacementGroupCleanerCallback)
        ]
        return sorted(
            callbacks, key=lambda each: not isinstance(each, Placement)
        )  # first: the others are to hear of the nodes that it gives up


def train(values: Json, cluster: ClusterConfig, started: float, expert_ranks: Mapping[int, int]) -> None:
    """Run `values` (a plain RunConfig) on the connected cluster until it is done. Raises WorkersFailed if they fail for good.

    `expert_ranks` has the number of ranks that share a set of experts, by the number of workers.
    """
    _run(_worker, {"run": values, "started": started}, values, cluster, expert_ranks)


def audit(values: Json, cluster: ClusterConfig, expert_ranks: Mapping[int, int]) -> None:
    """Have the workers of `values` make the steps of an audit, and write their evidence into the run's folder. Raises WorkersFailed."""
    _run(_audit_worker, {"run": values}, values, cluster, expert_ranks)


def _run(
    work: WorkerFunction, config: Json, values: Json, cluster: ClusterConfig, expert_ranks: Mapping[int, int]
) -> None:
    files = run_files(values["root"], values["name"])
    try:
        start_workers(work, config, cluster, files, expert_ranks)
    except ray.train.TrainingFailedError as error:
        raise WorkersFailed(_cause(error, files)) from error


def start_workers(
    work: WorkerFunction, config: Json, cluster: ClusterConfig, files: RunFiles, expert_ranks: Mapping[int, int]
) -> None:
    """Call `work` with `config` on each worker of the connected cluster, and again after failures, until all are through.

    `files` are the run's; `expert_ranks` has the number of ranks that share a set of experts, by the number of workers.
    """
    gpus = gpus_per_worker(cluster)
    trainer = _Trainer(
        cluster,
        work,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=gpus > 0,
            resources_per_worker=_resources(cluster, gpus),
            placement_strategy=cluster.placement,
            label_selector=cluster.selector or None,
        ),
        run_config=RayRunConfig(
            name=files.folder.name,
            storage_path=files.ray.url,  # Ray Train's own few files: inside the run folder, so that no files are left elsewhere
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=[NoteFailures(files.folder.url), Placement(cluster, expert_ranks)],  # type: ignore[list-item]  # Ray's hint is of UserCallback alone
            worker_runtime_env={"env_vars": cluster.env},
        ),
    )
    trainer.fit()


def _resources(cluster: ClusterConfig, gpus: float) -> dict[str, float]:
    return {"CPU": cluster.cpus_per_worker} | ({"GPU": gpus} if gpus else {})


def _worker(config: Json) -> None:
    """What Ray Train calls on each worker of a run."""
    _set_rendezvous_environment()
    from trainer.worker.main import run_worker

    summary = run_worker(config["run"], say=print, started=config["started"], asked=preemption)
    if summary["ending"] is Ending.PREEMPTED:
        raise WorkerPreempted(summary["stopped"])


def _audit_worker(config: Json) -> None:
    """And on each worker of an audit."""
    _set_rendezvous_environment()
    from trainer.audit.collect import audit_worker

    audit_worker(config["run"])


def _set_rendezvous_environment() -> None:
    """Tell the ranks who they are and where rank 0 listens, as torchrun would."""
    context = ray.train.get_context()
    ip = ray.util.get_node_ip_address()
    host, port = broadcast_from_rank_zero((ip, free_port()))
    if interface := _interface(ip):
        os.environ.setdefault(
            "GLOO_SOCKET_IFNAME", interface
        )  # else that of the host's name, which other nodes may not reach
    ranks = {
        "RANK": context.get_world_rank(),
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(),
    }
    os.environ |= {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": host, "MASTER_PORT": str(port)}


def _interface(ip: str) -> str:
    """The network interface that has the address `ip`; "": none, as behind a translated address."""
    return next(
        (name for name, addresses in psutil.net_if_addrs().items() if ip in [each.address for each in addresses]), ""
    )


def _cause(error: BaseException, files: RunFiles) -> str:
    """What the first failed worker raised, with its traceback above it, and why the attempt ended."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    said = [f"{failure}\nworker {rank} failed, see above" for rank, failure in sorted(failures.items())][:1] or [
        str(error)
    ]
    if lacking := re.findall(r"(?:ModuleNotFoundError|ImportError): (.+)", said[0]):
        said.append(
            f"a worker's node has not what workers need ({lacking[-1]}); give every node the environment of this checkout"
        )
    attempt = current_attempt(files)
    if attempt >= 0:
        said.append(f"attempt {attempt} ended: {close_attempt(files, attempt)}")
    return "\n".join(said)
