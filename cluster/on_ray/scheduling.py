"""How Ray Train places the workers: on nodes that answer, in our order of ranks, in the numbers that the job allows.

Ray goes on counting a lost node for a while: for 20 s where it decides how many workers there are to be, and until the head's own health
checks fail where it places them, which takes longer if only its link is cut. Here every node is asked before workers are started, and while they
work. Ray's interfaces for this move: cluster/on_ray/scheduling.py and cluster/on_ray/failures.py are their places.
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

if TYPE_CHECKING:  # importing it takes its time, and the driver needs none of it
    from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroupPollStatus

_KNOCK_S = 2.0
_MISSED = 3  # looks in a row, each a few seconds apart
_ASK_S = 10.0
_NODE_ID = "ray.io/node-id"


def fitting_nodes(labels: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """The resources of the nodes that Ray takes to be alive and that have the `labels`, by node id."""
    return {
        node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"] and matches(node["Labels"], labels)
    }


def silent_nodes() -> set[str]:
    """The nodes that Ray takes to be alive, and that do not answer."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    with ThreadPoolExecutor(max_workers=32) as pool:
        answers = pool.map(_answers, nodes)
    return {node["NodeID"] for node, answered in zip(nodes, answers, strict=True) if not answered}


def _answers(node: Json) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=_KNOCK_S).close()
    except OSError:
        return False
    return True


class NodeSilent(RuntimeError):
    """The node of a worker does not answer any more."""


class Placement(ControllerCallback, WorkerGroupCallback):
    """Keeps workers off nodes that do not answer, and gives them their ranks.

    `expert_ranks` has the number of ranks that share a set of experts, by the number of workers.
    """

    def __init__(self, cluster: ClusterConfig, expert_ranks: Mapping[int, int]):
        self.cluster = cluster
        self.expert_ranks = expert_ranks
        self.nodes: list[str] = []  # of each rank
        self.missed: dict[str, int] = {}

    def on_controller_start_worker_group(
        self, *, scaling_config: ScalingConfig, num_workers: int
    ) -> dict[str, str] | None:
        """What labels the workers' nodes must have."""
        silent = ",".join(sorted(silent_nodes()))
        return {**self.cluster.selector, _NODE_ID: f"!in({silent})"} if silent else None

    def before_init_train_context(self, workers: list["Worker"]) -> dict[str, list[object]]:
        """Ray's list of workers is in the order of their ranks, and grouped by node; here it gets ours, in place."""
        order = rank_order(
            [worker.metadata.node_id for worker in workers], self.expert_ranks[len(workers)], self.cluster.ranks
        )
        workers[:] = [workers[place] for place in order]
        for rank, worker in enumerate(workers):
            assert worker.distributed_context is not None, "Ray has just set it"
            worker.distributed_context = replace(worker.distributed_context, world_rank=rank)
        self.nodes, self.missed = [worker.metadata.node_id for worker in workers], {}
        return {}

    def after_worker_group_poll_status(self, worker_group_status: "WorkerGroupPollStatus") -> None:
        """Gives up workers whose node has been silent for several looks: Ray would wait for them, and the other ranks as well."""
        self.missed = {node: self.missed.get(node, 0) + 1 for node in silent_nodes()}
        for rank, status in worker_group_status.worker_statuses.items():
            if status.error is None and self.missed.get(self.nodes[rank], 0) >= _MISSED:
                status.error = NodeSilent(f"its node died, or its link is cut: no answer at {_MISSED} looks in a row")


class Elastic(ElasticScalingPolicy):
    """As many workers as there is room for, as Ray's own policy, on nodes that answer and have the labels, and in multiples."""

    def __init__(self, scaling: ScalingConfig, cluster: ClusterConfig):
        super().__init__(scaling)
        self.cluster = cluster

    def _get_reserved_resources(self) -> dict[str, dict[str, float]] | None:
        """What Ray keeps for this job on each node, by a fresh look at which nodes are there."""
        asked = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
        try:
            return dict(ray.get(asked, timeout=_ASK_S))
        except ray.exceptions.RayError:
            return None  # asked again at the next look

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        fitting, silent = fitting_nodes(self.cluster.node_labels), silent_nodes()
        # Ray reserves without a look at labels, on nodes that may not have them: with labels all of the fitting nodes count.
        offered = (
            fitting
            if self.cluster.node_labels
            else {node: resources for node, resources in reserved_resources.items() if node in fitting}
        )
        each = self.scaling_config._resources_per_worker_not_none
        fit = room(
            {node: resources for node, resources in offered.items() if node not in silent}, each, self.cluster.placement
        )
        return min(fit, self.cluster.max_workers) // self.cluster.workers_multiple * self.cluster.workers_multiple
