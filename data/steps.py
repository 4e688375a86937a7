"""The batches of one rank, from its lanes: the same global batches for every number of ranks, with the state after each.

Sample n of the run comes from lane (n // group) % lanes, and rank lane % world serves it. A background thread keeps a few
steps ready; the state that travels with a step is that of what the step holds, so what was prefetched never matters.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Queue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from data.lanes import Lane, State
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
    """{"step": the next one, "samples": how many before it, "lanes": {lane: where it stands}} for the lanes of this rank; JSON-able."""


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

    def numbers(self, step: int) -> npt.NDArray[np.int64]:
        """The running numbers of this rank's samples in `step`, ascending, (size,)."""
        groups = np.arange(self.rank, self.global_batch // self.group, self.world, dtype=np.int64)
        return (step * self.global_batch + groups[:, None] * self.group + np.arange(self.group)).reshape(-1)

    def first_step(self, state: "State | None") -> int:
        """The step that `state` leads to. Raises ValueError where it was made with another global batch."""
        if state is None:
            return 0
        step, samples = int(state["step"]), int(state["samples"])
        if step * self.global_batch != samples:
            fix = f"set global_batch = {samples // max(step, 1)} to resume it"
            raise ValueError(f"global_batch = {self.global_batch}, but the checkpoint's {step} steps held {samples} samples; {fix}")
        return step


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


class LaneStream:
    """Iterates over the steps of one rank, without end. Close it, or use it as a context manager."""

    def __init__(self, lanes: Mapping[int, Lane], collate: Collate, share: Share, *, total: int, prefetch: int, step: int, closing: Event) -> None:
        self._lanes = lanes
        self._collate = collate
        self._share = share
        self._total = total
        self._closing = closing
        self._error: Exception | None = None
        self._steps = self._make_steps(step)
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
        if self._thread is None:
            return next(self._steps)
        item = self._queue.get()
        if isinstance(item, Exception):
            self._error = item
            raise item
        return item

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the background thread; waits for a read that is under way."""
        self._closing.set()
        while self._thread and self._thread.is_alive():
            with suppress(Empty):
                self._queue.get(timeout=0.02)  # whoever waits for room must see that it is no longer needed

    def _fill(self) -> None:
        try:
            while not self._closing.is_set():
                self._queue.put(next(self._steps))
        except Closed:
            pass
        except Exception as error:
            self._queue.put(error)

    def _make_steps(self, step: int) -> Iterator[Step]:
        share = self._share
        states = {str(number): lane.state() for number, lane in self._lanes.items()}
        while True:
            groups, samples = share.size // share.group, None
            first = step * share.global_batch // share.group + share.rank
            for place in range(min(len(self._lanes), groups)):
                number = (first + place * share.world) % self._total
                count = len(range(place, groups, len(self._lanes)))
                part = self._lanes[number].take(count * share.group)
                if samples is None:
                    samples = self._collate.room(share.size, part)
                into = samples.reshape(groups, share.group, *part.shape[1:])[place :: len(self._lanes)]
                into[...] = part.reshape(into.shape)
                states[str(number)] = self._lanes[number].state()
            assert samples is not None, "a rank has at least one lane and one group"
            state = {"step": step + 1, "samples": (step + 1) * share.global_batch, "lanes": dict(states)}
            yield Step(micro_batches=self._micro_batches(samples, share.numbers(step)), state=state)
            step += 1

    def _micro_batches(self, samples: npt.NDArray[Any], numbers: npt.NDArray[np.int64]) -> list[Batch]:
        size = self._share.micro_batch
        return [self._collate.batch(samples[i : i + size], numbers[i : i + size]) for i in range(0, len(samples), size)]


def _next_multiple(number: int, of: int) -> int:
    return -(-number // of) * of
