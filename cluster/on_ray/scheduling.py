"""How Ray Train places the workers: on nodes that answer, by our rank order, in allowed numbers.

Ray keeps counting a lost node: for 20 s when it chooses the number of workers, and until the head's
health check fails when it places them, which takes longer if only the node's link is cut. So every
node is asked whether it answers, before workers start and while they train. Ray's interfaces for
this change between releases; only this file uses them.
"""

import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.config import ScalingConfig

from cluster.config.cluster import ClusterConfig
from cluster.placement import matches, rank_order, room
from trainer.parsing import Json

if TYPE_CHECKING:  # slow to import, and the driver does not need it
    from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroupPollStatus

_CONNECT_TIMEOUT_S = 2.0
_MAX_MISSED = 3  # polls in a row, each a few seconds apart
_RESERVED_TIMEOUT_S = 10.0
_NODE_ID = "ray.io/node-id"


def fitting_nodes(labels: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """The resources of the nodes that Ray believes alive and that match `labels`, by node ID."""
    return {
        node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"] and matches(node["Labels"], labels)
    }


def silent_nodes() -> set[str]:
    """The nodes that Ray believes alive but that do not answer."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    with ThreadPoolExecutor(max_workers=32) as pool:
        answers = pool.map(_answers, nodes)
    return {node["NodeID"] for node, answered in zip(nodes, answers, strict=True) if not answered}


def _answers(node: Json) -> bool:
    try:
        socket.create_connection(
            (node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=_CONNECT_TIMEOUT_S
        ).close()
    except OSError:
        return False
    return True


class NodeSilent(RuntimeError):
    """The node of a worker no longer answers."""


class Placement(ControllerCallback, WorkerGroupCallback):
    """Keeps workers off nodes that do not answer, and gives them their ranks.

    `expert_ranks` maps a number of workers to the number of ranks that share a set of experts.
    """

    def __init__(self, cluster: ClusterConfig, expert_ranks: Mapping[int, int]):
        self.cluster = cluster
        self.expert_ranks = expert_ranks
        self.nodes: list[str] = []  # the node of each rank
        self.missed: dict[str, int] = {}

    def on_controller_start_worker_group(
        self, *, scaling_config: ScalingConfig, num_workers: int
    ) -> dict[str, str] | None:
        """The labels that the workers' nodes must have."""
        silent = ",".join(sorted(silent_nodes()))
        return {**self.cluster.selector, _NODE_ID: f"!in({silent})"} if silent else None

    def before_init_train_context(self, workers: list["Worker"]) -> dict[str, list[object]]:
        """Put Ray's list of workers, which is ordered by rank, into our order in place."""
        nodes = [worker.metadata.node_id for worker in workers]
        order = rank_order(nodes, self.expert_ranks[len(workers)], self.cluster.ranks)
        workers[:] = [workers[index] for index in order]
        for rank, worker in enumerate(workers):
            assert worker.distributed_context is not None, "Ray has set it just before"
            worker.distributed_context = replace(worker.distributed_context, world_rank=rank)
        self.nodes = [worker.metadata.node_id for worker in workers]
        self.missed = {}
        return {}

    def after_worker_group_poll_status(self, worker_group_status: "WorkerGroupPollStatus") -> None:
        """Give up workers whose node has been silent for several polls.

        Otherwise Ray and the other ranks would wait for them.
        """
        self.missed = {node: self.missed.get(node, 0) + 1 for node in silent_nodes()}
        for rank, status in worker_group_status.worker_statuses.items():
            if status.error is None and self.missed.get(self.nodes[rank], 0) >= _MAX_MISSED:
                status.error = NodeSilent(
                    f"its node died, or its link is cut: no answer to {_MAX_MISSED} polls in a row"
                )


class Elastic(ElasticScalingPolicy):
    """Ray's policy of as many workers as there is room for, within the limits of the job.

    Only nodes that answer and match the labels count, and only multiples of workers are used.
    """

    def __init__(self, scaling: ScalingConfig, cluster: ClusterConfig):
        super().__init__(scaling)
        self.cluster = cluster

    def _get_reserved_resources(self) -> dict[str, dict[str, float]] | None:
        """The resources that Ray reserves for this job per node, with its current nodes."""
        asked = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
        try:
            return dict(ray.get(asked, timeout=_RESERVED_TIMEOUT_S))
        except ray.exceptions.RayError:
            return None  # Ray asks again at the next poll

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        fitting = fitting_nodes(self.cluster.node_labels)
        silent = silent_nodes()
        # Ray reserves without regard to labels, so with labels all fitting nodes count.
        offered = fitting if self.cluster.node_labels else reserved_resources
        usable = {node: free for node, free in offered.items() if node in fitting and node not in silent}
        fit = room(usable, self.scaling_config._resources_per_worker_not_none, self.cluster.placement)
        multiple = self.cluster.workers_multiple
        return min(fit, self.cluster.max_workers) // multiple * multiple
