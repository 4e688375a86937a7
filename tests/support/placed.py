"""Workers placed for real on a Ray cluster of three nodes, and their places for several configs.

test_cluster_placement.py runs `python tests/support/placed.py FOLDER` in a process of its own; the
places are written as JSON. Nodes a and b have room for two workers each, node c for two more and
two (pretended) GPUs.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from cluster.config.cluster import ClusterConfig
from cluster.on_ray.train import check_room, start_workers, waits_for
from trainer.run_files import run_files

CASES = {
    "one node, with env and labels, a GPU each": (
        {"workers": 2, "placement": "STRICT_PACK", "node_labels": {"disk": "fast"}, "env": {"NCCL_DEBUG": "WARN"}},
        2,
    ),
    "spread": ({"workers": 3, "placement": "SPREAD", "gpus_per_worker": 0}, 1),
    "by node": ({"workers": 4, "gpus_per_worker": 0, "node_labels": {"disk": "!fast"}}, 2),
    "round robin": ({"workers": 4, "gpus_per_worker": 0, "node_labels": {"disk": "!fast"}, "ranks": "round_robin"}, 2),
    "a range": (
        {"workers": [2, 6], "workers_multiple": 2, "gpus_per_worker": 0, "node_labels": {"name": "in(a, b)"}},
        2,
    ),
}
NO_ROOM = {
    "too many": {"workers": 7, "gpus_per_worker": 0},
    "split": {"workers": 2, "cpus_per_worker": 3, "gpus_per_worker": 0},
    "no such node": {"workers": 1, "node_labels": {"disk": "slow"}},
    "not on one node": {"workers": 3, "placement": "STRICT_PACK", "gpus_per_worker": 0},
    "too few GPUs": {"workers": 3},
}


def main(folder: Path) -> None:
    """Print where the workers of each case were, and why the others found no room."""
    cluster = Cluster()
    try:
        for name in "abc":
            fast = {"disk": "fast"} if name == "c" else {}
            cluster.add_node(
                num_cpus=2, num_gpus=2 if name == "c" else 0, labels={"name": name, **fast}, include_dashboard=False
            )
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        refused = {}
        for case, fields in NO_ROOM.items():
            try:
                check_room(ClusterConfig(**fields))
            except ValueError as error:
                refused[case] = str(error)
        print(
            json.dumps(
                {
                    "placed": {case: placed(folder / case, *CASES[case]) for case in CASES},
                    "refused": refused,
                    "waits": waiting(),
                }
            )
        )
    finally:
        ray.shutdown()
        cluster.shutdown()


def placed(folder: Path, fields: dict[str, Any], group: int) -> list[dict[str, Any]]:
    """Node, environment and GPU of each worker, in the order of the ranks."""
    config = ClusterConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})
    folder.mkdir()

    def note(config: dict[str, Any]) -> None:
        import os

        context = ray.train.get_context()
        node = ray.get_runtime_context().get_node_id()
        labels = next(each["Labels"] for each in ray.nodes() if each["NodeID"] == node)
        found = {"node": labels["name"], "NCCL_DEBUG": os.environ.get("NCCL_DEBUG")}
        found["gpu"] = os.environ.get("CUDA_VISIBLE_DEVICES")
        (Path(config["folder"]) / f"{context.get_world_rank()}.json").write_text(json.dumps(found))

    check_room(config)
    start_workers(
        note, {"folder": str(folder)}, config, run_files(str(folder), "run"), dict.fromkeys(config.sizes, group)
    )
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(list(folder.glob("*.json"))))]


def waiting() -> dict[str, str]:
    """A job's reason for waiting next to one that holds two CPUs, and with no other job."""

    @ray.remote(num_cpus=2)
    class Other:
        def here(self) -> None: ...

    job = ClusterConfig(workers=6, gpus_per_worker=0)

    def settled(wanted: str) -> str:
        """What it says, once Ray has counted what came and went."""
        deadline = time.monotonic() + 30
        while (said := waits_for(job)) != wanted and time.monotonic() < deadline:
            time.sleep(0.2)
        return said

    alone = settled("")
    other = Other.remote()
    ray.get(other.here.remote())
    return {"alone": alone, "beside another": settled("6 CPUs, of which 4 are free now")}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
