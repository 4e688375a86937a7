"""Placement of workers, in plain functions without Ray.

They say which nodes workers may run on, how many workers fit there, and in which order the workers
get their ranks.
"""

from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from typing import Literal

Strategy = Literal["PACK", "STRICT_PACK", "SPREAD"]
RankOrder = Literal["by_node", "round_robin"]


def rank_order(nodes: Sequence[str], group: int, order: RankOrder = "by_node") -> list[int]:
    """The workers in the order of their ranks, as indices into `nodes`, the node of each worker.

    `group` neighbours in rank share a set of experts. `by_node` puts as many complete groups as
    possible on one node each; `round_robin` deals the ranks out to the nodes in turn.
    """
    workers_on: dict[str, list[int]] = {}
    for worker, node in enumerate(nodes):
        workers_on.setdefault(node, []).append(worker)
    if order == "round_robin":
        dealt = chain.from_iterable(zip_longest(*workers_on.values()))
        return [worker for worker in dealt if worker is not None]
    grouped: list[int] = []
    left_over: list[int] = []
    for workers in workers_on.values():
        count = len(workers) // group * group
        grouped += workers[:count]
        left_over += workers[count:]
    return grouped + left_over


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels match a label selector as Ray defines it.

    For each label this is `value`, `!value`, `in(a, b)` or `!in(a, b)`.
    """
    return all(_matches_value(labels.get(name), wanted) for name, wanted in selector.items())


def _matches_value(value: str | None, wanted: str) -> bool:
    positive = wanted.removeprefix("!")
    choices = [positive]
    if positive.startswith("in("):
        choices = positive.removeprefix("in(").removesuffix(")").split(",")
    return (value in [choice.strip() for choice in choices]) != wanted.startswith("!")


def room(nodes: Mapping[str, Mapping[str, float]], worker: Mapping[str, float], strategy: Strategy) -> int:
    """How many workers fit on `nodes`, given the resources of each node and those of a `worker`."""
    fit = [min(int(node.get(name, 0.0) // amount) for name, amount in worker.items()) for node in nodes.values()]
    return max(fit, default=0) if strategy == "STRICT_PACK" else sum(fit)
