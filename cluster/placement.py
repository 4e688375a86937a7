"""Which nodes workers may run on, how many fit there, and in which order they get their ranks. Plain functions, no Ray."""

from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from typing import Literal

Strategy = Literal["PACK", "STRICT_PACK", "SPREAD"]
RankOrder = Literal["by_node", "round_robin"]


def rank_order(nodes: Sequence[str], group: int, order: RankOrder = "by_node") -> list[int]:
    """The workers, as places in `nodes` (where each of them runs), in the order of their ranks; `group` neighbours share a set of experts.

    `by_node` puts as many whole groups as possible on one node each, `round_robin` deals the ranks over the nodes in turn.
    """
    there: dict[str, list[int]] = {}
    for place, node in enumerate(nodes):
        there.setdefault(node, []).append(place)
    if order == "round_robin":
        return [place for place in chain.from_iterable(zip_longest(*there.values())) if place is not None]
    whole = {node: len(places) // group * group for node, places in there.items()}
    first = [place for node, places in there.items() for place in places[: whole[node]]]
    return first + [place for node, places in there.items() for place in places[whole[node] :]]


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels fit what Ray calls a label selector: `value`, `!value`, `in(a, b)` or `!in(a, b)` for each label."""
    return all(_fits(labels.get(name), wanted) for name, wanted in selector.items())


def _fits(value: str | None, wanted: str) -> bool:
    positive = wanted.removeprefix("!")
    choices = positive.removeprefix("in(").removesuffix(")").split(",") if positive.startswith("in(") else [positive]
    return (value in [choice.strip() for choice in choices]) != wanted.startswith("!")


def room(nodes: Mapping[str, Mapping[str, float]], each: Mapping[str, float], strategy: Strategy) -> int:
    """How many workers, which take `each` of the resources, fit on `nodes`, whose resources are given."""
    workers = [
        min(int(resources.get(name, 0.0) // amount) for name, amount in each.items()) for resources in nodes.values()
    ]
    return max(workers, default=0) if strategy == "STRICT_PACK" else sum(workers)
