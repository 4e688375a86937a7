"""A rank's share of every global batch: the lanes that it serves, and the numbers of its samples.

Sample n of the run comes from lane (n // group) % lanes, and rank lane % world serves that lane.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import numpy.typing as npt

from data.lanes.mixture import CountedState

if TYPE_CHECKING:
    import torch

Batch = dict[str, "torch.Tensor"]


class RunState(TypedDict):
    """Where the data of a run continue, as JSON; a rank's own state has only its lanes."""

    step: int
    """The next step."""
    samples: int
    """Number of samples before it."""
    lanes: dict[str, CountedState | None]
    """State of each lane by its number; None for a lane at its start."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """One rank's share of every global batch. Raises ValueError if the numbers do not divide."""

    rank: int
    world: int
    global_batch: int
    micro_batch: int
    group: int = 1
    """Number of consecutive samples that must sit on one rank and in one micro-batch."""

    def __post_init__(self) -> None:
        together = self.world * self.micro_batch
        if self.global_batch % together:
            problem = f"{self.global_batch} is not a multiple of {self.world} workers x micro_batch {self.micro_batch}"
            fix = f"use {_next_multiple(self.global_batch, together)}"
            raise ValueError(f"run.batch.global_batch: {problem}; {fix}")
        if self.micro_batch % self.group:
            problem = f"{self.micro_batch} does not hold whole groups of {self.group} samples"
            raise ValueError(f"run.batch.micro_batch: {problem}; use {_next_multiple(self.micro_batch, self.group)}")

    @property
    def size(self) -> int:
        """Number of samples per step on one rank."""
        return self.global_batch // self.world

    def counts(self, step: int, lanes: int) -> dict[int, int]:
        """Samples that each of this rank's lanes gives to `step`, in order of their first."""
        groups = self.global_batch // self.group
        first = (step * groups + self.rank) % lanes
        return _counts(first, groups // self.world, self.world, self.group, lanes)

    def numbers(self, step: int) -> npt.NDArray[np.int64]:
        """The numbers in the run of this rank's samples in `step`, ascending, (size,)."""
        return _first_numbers(self) + step * self.global_batch

    def first_step(self, state: RunState | None) -> int:
        """The step that `state` leads to.

        Raises ValueError if it was made with another global batch.
        """
        if state is None:
            return 0
        step = int(state["step"])
        samples = int(state["samples"])
        if step * self.global_batch != samples:
            problem = f"{self.global_batch}, but the checkpoint's {step} steps held {samples} samples"
            raise ValueError(f"run.batch.global_batch: {problem}; use {samples // max(step, 1)} to resume it")
        return step


@lru_cache(maxsize=1024)
def _counts(first: int, groups: int, world: int, group: int, lanes: int) -> dict[int, int]:
    """Samples per lane in `groups` groups of one rank, the first of lane `first`.

    Cached: do not modify.
    """
    rounds, more = divmod(groups, lanes // world)
    numbers = [(first + index * world) % lanes for index in range(min(groups, lanes // world))]
    return {number: (rounds + (index < more)) * group for index, number in enumerate(numbers)}


@lru_cache(maxsize=16)
def _first_numbers(share: Share) -> npt.NDArray[np.int64]:
    """The sample numbers of step 0. Cached: do not modify."""
    groups = np.arange(share.rank, share.global_batch // share.group, share.world, dtype=np.int64)
    return (groups[:, None] * share.group + np.arange(share.group)).reshape(-1)


def number_of_lanes(configured: int | None, world: int, state: RunState | None) -> int:
    """The number of lanes: as configured, else as in `state`, else one that 8 and `world` divide.

    Raises ValueError if it differs from that of `state`, or is not a multiple of `world`.
    """
    saved = len(state["lanes"]) if state else None
    lanes = configured or saved or math.lcm(8, world)
    if saved and saved != lanes:
        raise ValueError(f"run.objective.data.lanes: {lanes}, but the checkpoint has {saved}; use {saved} to resume it")
    if lanes % world:
        fix = f"use a multiple of every number of workers that the run may have, such as {math.lcm(lanes, world)}"
        raise ValueError(f"run.objective.data.lanes: {lanes} is not a multiple of the {world} workers; {fix}")
    return lanes


def _next_multiple(number: int, of: int) -> int:
    return -(-number // of) * of
