"""The batches of one rank, from its lanes: the same global batches for every number of ranks, with the state after each.

Sample n of the run comes from lane (n // group) % lanes, and rank lane % world serves it. A background thread keeps a few
steps ready; the state that travels with a step is that of what the step holds, so what was prefetched never matters.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from queue import Empty, Queue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from data.lanes import Samples, State
from data.mixture import Stream
from data.retry import Closed

if TYPE_CHECKING:
    import torch

Batch = dict[str, "torch.Tensor"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one rank needs for one optimiser step."""

    micro_batches: list[Batch]
    """In ascending order of `sample`."""
    state: State
    """{"step": the next one, "samples": how many before it, "lanes": {lane: where it stands, None at its start}} for the lanes of this rank; JSON-able."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """How the samples of a global batch are dealt out. Raises ValueError where the numbers do not divide."""

    rank: int
    world: int
    global_batch: int
    micro_batch: int
    group: int = 1
    """Consecutive samples that must sit on one rank and in one micro-batch."""

    def __post_init__(self) -> None:
        together = self.world * self.micro_batch
        if self.global_batch % together:
            fix = f"set it to {_next_multiple(self.global_batch, together)}"
            raise ValueError(f"global_batch = {self.global_batch} is not a multiple of workers x micro_batch = {self.world} x {self.micro_batch}; {fix}")
        if self.micro_batch % self.group:
            fix = f"set it to {_next_multiple(self.micro_batch, self.group)}"
            raise ValueError(f"micro_batch = {self.micro_batch} does not hold whole groups of {self.group} samples; {fix}")

    @property
    def size(self) -> int:
        """Samples of one rank and step."""
        return self.global_batch // self.world

    def counts(self, step: int, lanes: int) -> dict[int, int]:
        """How many samples each of this rank's lanes gives to `step`, in the order of the first of them."""
        groups = self.global_batch // self.group
        return _counts((step * groups + self.rank) % lanes, groups // self.world, self.world, self.group, lanes)

    def numbers(self, step: int) -> npt.NDArray[np.int64]:
        """The running numbers of this rank's samples in `step`, ascending, (size,)."""
        return _first_numbers(self) + step * self.global_batch

    def first_step(self, state: "State | None") -> int:
        """The step that `state` leads to. Raises ValueError where it was made with another global batch."""
        if state is None:
            return 0
        step, samples = int(state["step"]), int(state["samples"])
        if step * self.global_batch != samples:
            fix = f"set global_batch = {samples // max(step, 1)} to resume it"
            raise ValueError(f"global_batch = {self.global_batch}, but the checkpoint's {step} steps held {samples} samples; {fix}")
        return step


@lru_cache(maxsize=1024)
def _counts(first: int, groups: int, world: int, group: int, lanes: int) -> dict[int, int]:
    """Samples of each lane in `groups` groups of one rank, of which the first is of lane `first`. Shared: not to be changed."""
    each, more = divmod(groups, lanes // world)
    numbers = [(first + place * world) % lanes for place in range(min(groups, lanes // world))]
    return {number: (each + (place < more)) * group for place, number in enumerate(numbers)}


@lru_cache(maxsize=16)
def _first_numbers(share: Share) -> npt.NDArray[np.int64]:
    """The numbers of step 0. Shared: not to be changed."""
    groups = np.arange(share.rank, share.global_batch // share.group, share.world, dtype=np.int64)
    return (groups[:, None] * share.group + np.arange(share.group)).reshape(-1)


class Collate(Protocol):
    """How samples become a batch."""

    def room(self, count: int, like: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Room for `count` samples that are like those of a lane."""

    def batch(self, samples: npt.NDArray[Any], numbers: npt.NDArray[np.int64]) -> Batch:
        """The tensors of one micro-batch."""


def number_of_lanes(configured: int | None, world: int, state: State | None) -> int:
    """How many lanes the run has: as configured, else as the state has, else enough for worlds of 1, 2, 4, 8 and this one.

    Raises ValueError where that is not what the state has, or no multiple of the world.
    """
    lanes = configured or (len(state["lanes"]) if state else math.lcm(8, world))
    if state and len(state["lanes"]) != lanes:
        raise ValueError(f"data.lanes = {lanes}, but the checkpoint has {len(state['lanes'])}; set data.lanes = {len(state['lanes'])} to resume it")
    if lanes % world:
        fix = f"set it to a multiple of every number of workers that the run may have, such as {math.lcm(lanes, world)}"
        raise ValueError(f"data.lanes = {lanes} is not a multiple of the {world} workers; {fix}")
    return lanes


def merge_states(states: Sequence[State]) -> State:
    """The state of the whole run from those of all its ranks, to be given to every rank of any world size."""
    steps = {state["step"] for state in states}
    assert len(steps) == 1, f"states of different steps: {sorted(steps)}"
    lanes = {lane: state for rank in states for lane, state in rank["lanes"].items()}
    assert len(lanes) == sum(len(state["lanes"]) for state in states), "a lane is in the states of two ranks"
    return {**states[0], "lanes": dict(sorted(lanes.items(), key=lambda item: int(item[0])))}


class LaneSource(Protocol):
    """What the lanes of a rank give to each step."""

    def next(self) -> dict[int, tuple[Samples, State]]:
        """For each lane that takes part in the next step its samples, and its state after them."""

    def close(self) -> None:
        """Let go of what the lanes hold."""


class OwnLanes:
    """Lanes in this process."""

    def __init__(self, lanes: Mapping[int, Stream], share: Share, *, total: int, step: int) -> None:
        self._lanes = lanes
        self._share = share
        self._total = total
        self._step = step

    def next(self) -> dict[int, tuple[Samples, State]]:
        counts = self._share.counts(self._step, self._total)
        self._step += 1
        return {number: (lane.take(counts[number]), lane.state()) for number, lane in self._lanes.items() if number in counts}

    def close(self) -> None:
        pass


class LaneStream:
    """Iterates over the steps of one rank, without end. Close it, or use it as a context manager."""

    def __init__(
        self, source: LaneSource, collate: Collate, share: Share, *, states: Mapping[str, State | None], total: int, prefetch: int, step: int, closing: Event
    ) -> None:
        self._source = source
        self._collate = collate
        self._share = share
        self._total = total
        self._closing = closing
        self._error: Exception | None = None
        self._steps = self._make_steps(step, dict(states))
        self._queue: Queue[Step | Exception] = Queue(maxsize=max(prefetch, 1))
        self._thread = Thread(target=self._fill, name="data", daemon=True) if prefetch else None
        if self._thread:
            self._thread.start()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        """The next step. Raises what the source raised, again and again; StopIteration once closed."""
        if self._error:
            raise self._error
        if self._closing.is_set():
            raise StopIteration
        item = self._queue.get() if self._thread else self._made()
        if isinstance(item, Exception):
            self._error = item
            raise item
        return item

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what runs in the background; waits for a read that is under way in this process."""
        self._closing.set()
        self._source.close()
        while self._thread and self._thread.is_alive():
            with suppress(Empty):
                self._queue.get(timeout=0.02)  # whoever waits for room must see that it is no longer needed

    def _fill(self) -> None:
        item: Step | Exception | None = None
        while not self._closing.is_set() and not isinstance(item, Exception):
            item = self._made()
            self._queue.put(item)

    def _made(self) -> Step | Exception:
        try:
            return next(self._steps)
        except Closed:
            return StopIteration()
        except Exception as error:
            return error

    def _make_steps(self, step: int, states: dict[str, State | None]) -> Iterator[Step]:
        share = self._share
        while True:
            parts = self._source.next()
            counts = share.counts(step, self._total)
            assert parts.keys() == counts.keys(), "the lanes took part in another step"
            first, _ = parts[next(iter(counts))]
            samples = self._collate.room(share.size, first)
            groups = samples.reshape(-1, share.group, *samples.shape[1:])
            for place, number in enumerate(counts):
                part, states[str(number)] = parts[number]
                if part.dtype != first.dtype:
                    raise ValueError("data.source: its shards have images of different sizes; set data.size")
                into = groups[place :: self._total // share.world]
                into[...] = part.reshape(into.shape)
            state = {"step": step + 1, "samples": (step + 1) * share.global_batch, "lanes": dict(states)}
            yield Step(micro_batches=self._micro_batches(samples, share.numbers(step)), state=state)
            step += 1

    def _micro_batches(self, samples: npt.NDArray[Any], numbers: npt.NDArray[np.int64]) -> list[Batch]:
        size = self._share.micro_batch
        return [self._collate.batch(samples[i : i + size], numbers[i : i + size]) for i in range(0, len(samples), size)]


def _next_multiple(number: int, of: int) -> int:
    return -(-number // of) * of
