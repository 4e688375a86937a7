"""The places and ranks of workers, by hand and on a real Ray cluster of three nodes."""

import json
import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from cluster.config.cluster import ClusterConfig
from cluster.placement import matches, rank_order, room


def whole_groups(nodes: str, order: list[int], group: int) -> int:
    """Groups of neighbours in rank that are all on one node."""
    return sum(
        len({nodes[place] for place in order[first : first + group]}) == 1 for first in range(0, len(order), group)
    )


def test_a_set_of_experts_stays_on_a_node_where_it_fits() -> None:
    for nodes in ("AABBCC", "ABCABC", "ABBA", "ABBBCC", "AAABBB", "ABBCDDDD"):
        order = rank_order(nodes, 2)
        assert sorted(order) == list(range(len(nodes)))
        fits = sum(nodes.count(node) // 2 for node in set(nodes))
        assert whole_groups(nodes, order, 2) == fits, nodes
        if len(nodes) <= 6:
            assert fits == max(whole_groups(nodes, list(other), 2) for other in permutations(range(len(nodes))))


def test_ranks_are_dealt_over_the_nodes_in_turn() -> None:
    assert ["AABBCC"[place] for place in rank_order("AABBCC", 2, "round_robin")] == list("ABCABC")
    assert ["AAABC"[place] for place in rank_order("AAABC", 2, "round_robin")] == list("ABCAA")
    assert whole_groups("AABB", rank_order("AABB", 2, "round_robin"), 2) == 0


@pytest.mark.parametrize(
    ("selector", "fitting"),
    [
        ({}, "abc"),
        ({"x": "1"}, "a"),
        ({"x": "!1"}, "bc"),
        ({"x": "in(1, 2)"}, "ab"),
        ({"x": "!in(1,2)"}, "c"),
        ({"x": "1", "y": "2"}, ""),
    ],
)
def test_labels_are_read_as_ray_reads_them(selector: dict[str, str], fitting: str) -> None:
    nodes = {"a": {"x": "1"}, "b": {"x": "2"}, "c": {}}
    assert "".join(name for name, labels in nodes.items() if matches(labels, selector)) == fitting


def test_room_is_counted_node_by_node() -> None:
    nodes = {"a": {"CPU": 8.0, "GPU": 2.0}, "b": {"CPU": 3.0, "GPU": 4.0}, "c": {"CPU": 5.0}}
    assert room(nodes, {"CPU": 2}, "PACK") == room(nodes, {"CPU": 2}, "SPREAD") == 4 + 1 + 2
    assert room(nodes, {"CPU": 2, "GPU": 1}, "PACK") == 2 + 1
    assert (room(nodes, {"CPU": 2}, "STRICT_PACK"), room({}, {"CPU": 2}, "STRICT_PACK")) == (4, 0)


def test_wrong_configs_are_refused() -> None:
    assert list(ClusterConfig(workers=(4, 8), workers_multiple=2).sizes) == [4, 6, 8]
    with pytest.raises(ValueError, match=r"workers is \(4, 7\), and workers_multiple 2"):
        ClusterConfig(workers=(4, 7), workers_multiple=2)
    with pytest.raises(ValueError, match="env: RANK is set for each worker"):
        ClusterConfig(env={"RANK": "1"})


@pytest.mark.slow
def test_workers_are_placed_as_the_job_says(tmp_path: Path) -> None:
    script = [sys.executable, str(Path(__file__).parent / "support" / "placed.py"), str(tmp_path)]
    done = subprocess.run(
        script,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"RAY_ADDRESS": "", "RAY_AUTH_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    def nodes(case: str) -> str:
        return "".join(worker["node"] for worker in found["placed"][case])

    one_node: list[dict[str, Any]] = found["placed"]["one node, with env and labels, a GPU each"]
    assert [(worker["node"], worker["NCCL_DEBUG"]) for worker in one_node] == [("c", "WARN")] * 2
    assert sorted(worker["gpu"] for worker in one_node) == ["0", "1"]
    assert sorted(nodes("spread")) == ["a", "b", "c"]
    assert nodes("by node") in ("aabb", "bbaa")
    assert nodes("round robin") in ("abab", "baba")
    assert sorted(nodes("a range")) == ["a", "a", "b", "b"], (
        "as many as fit on the nodes with the labels, in multiples of two"
    )
    words = {
        "too many": ["7 with cpus_per_worker 1", "3 nodes, 6 CPUs have room for 6"],
        "split": ["2 with cpus_per_worker 3", "6 CPUs have room for 0"],
        "no such node": ["0 nodes with node_labels {'disk': 'slow'}", "room for 0"],
        "not on one node": ["room for 2 on one node (placement STRICT_PACK)"],
        "too few GPUs": ["3 with cpus_per_worker 1 and gpus_per_worker 1", "2 GPUs have room for 2"],
    }
    for case, said in words.items():
        assert all(word in found["refused"][case] for word in said), found["refused"][case]
    assert found["waits"] == {"alone": "", "beside another": "6 CPUs, of which 4 are free now"}
