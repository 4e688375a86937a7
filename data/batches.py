"""The batches of one rank, from its lanes: the same global batches for any number of ranks.

Sample n of the run comes from lane (n // group) % lanes, and rank lane % world serves that lane. A
background thread keeps a few steps ready. A step carries the state after its own samples, so steps
that were prefetched but not used are not counted. data/text/collate.py and data/images/collate.py
turn samples into tensors.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Queue
from threading import Event, Thread
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from data.lanes.lane import Samples
from data.lanes.mixture import Counted, CountedState
from data.share import Batch, RunState, Share
from data.sources.retry import Closed


@dataclass(frozen=True, kw_only=True)
class Step:
    """One rank's data for one optimiser step."""

    micro_batches: list[Batch]
    """In ascending order of `sample`."""
    state: RunState
    """The state after this step, of this rank's lanes."""


class Collate(Protocol):
    """Turns samples into batches."""

    def room(self, count: int, like: Samples) -> Samples:
        """An uninitialised array for `count` samples with the shape and type of `like`."""

    def batch(self, samples: Samples, numbers: npt.NDArray[np.int64]) -> Batch:
        """The tensors of one micro-batch."""


def merge_states(states: Sequence[RunState]) -> RunState:
    """Merge the states of all ranks into one, from which a run of any world size can resume."""
    steps = {state["step"] for state in states}
    assert len(steps) == 1, f"states of different steps: {sorted(steps)}"
    lanes: dict[str, CountedState | None] = {}
    for state in states:
        assert not lanes.keys() & state["lanes"].keys(), "a lane is in the states of two ranks"
        lanes.update(state["lanes"])
    ordered = dict(sorted(lanes.items(), key=lambda item: int(item[0])))
    return {**states[0], "lanes": ordered}


Given = dict[int, tuple[Samples, CountedState]]
"""The contributions to a step: for each lane number, its samples and its state after them."""


class LaneSource(Protocol):
    """The lanes of a rank, in this process or in others."""

    def next(self) -> Given:
        """What the lanes that take part in the next step give to it."""

    def close(self) -> None:
        """Release what the lanes hold."""


class OwnLanes:
    """Lanes in this process."""

    def __init__(self, lanes: Mapping[int, Counted], share: Share, *, total: int, step: int) -> None:
        self.lanes = lanes
        self.share = share
        self.total = total
        self.step = step

    def next(self) -> Given:
        counts = self.share.counts(self.step, self.total)
        self.step += 1
        taking_part = {number: lane for number, lane in self.lanes.items() if number in counts}
        return {number: (lane.take(counts[number]), lane.state()) for number, lane in taking_part.items()}

    def close(self) -> None:
        pass


class LaneStream:
    """Iterates over the steps of one rank, endlessly. Close it, or use it as a context manager."""

    def __init__(
        self,
        source: LaneSource,
        collate: Collate,
        share: Share,
        *,
        states: Mapping[str, CountedState | None],
        total: int,
        prefetch: int,
        step: int,
        closing: Event,
    ) -> None:
        self.source = source
        self.collate = collate
        self.share = share
        self.total = total
        self.closing = closing
        self._error: Exception | None = None
        self._steps = self._make_steps(step, dict(states))
        self._queue: Queue[Step | Exception] = Queue(maxsize=max(prefetch, 1))
        self._thread = Thread(target=self._fill, name="data", daemon=True) if prefetch else None
        if self._thread:
            self._thread.start()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        """The next step.

        Raises the source's error, on every further call too; StopIteration once closed.
        """
        if self._error:
            raise self._error
        if self.closing.is_set():
            raise StopIteration
        item = self._queue.get() if self._thread else self._next_step()
        if isinstance(item, Exception):
            self._error = item
            raise item
        return item

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the background work; waits for a read that is under way in this process."""
        self.closing.set()
        self.source.close()
        while self._thread and self._thread.is_alive():
            with suppress(Empty):
                self._queue.get(timeout=0.02)  # the thread may be waiting for room in the queue

    def _fill(self) -> None:
        item: Step | Exception | None = None
        while not self.closing.is_set() and not isinstance(item, Exception):
            item = self._next_step()
            self._queue.put(item)

    def _next_step(self) -> Step | Exception:
        try:
            return next(self._steps)
        except Closed:
            return StopIteration()
        except Exception as error:
            return error

    def _make_steps(self, step: int, states: dict[str, CountedState | None]) -> Iterator[Step]:
        share = self.share
        while True:
            given = self.source.next()
            counts = share.counts(step, self.total)
            assert given.keys() == counts.keys(), "the lanes took part in another step"
            states |= {str(number): given[number][1] for number in counts}
            samples = self._interleave([given[number][0] for number in counts])
            state = RunState(step=step + 1, samples=(step + 1) * share.global_batch, lanes=dict(states))
            yield Step(micro_batches=self._micro_batches(samples, share.numbers(step)), state=state)
            step += 1

    def _interleave(self, parts: Sequence[Samples]) -> Samples:
        """The samples of one step in the order of their numbers, from those of the lanes."""
        share = self.share
        samples = self.collate.room(share.size, parts[0])
        groups = samples.reshape(-1, share.group, *samples.shape[1:])
        for index, part in enumerate(parts):
            if part.dtype != parts[0].dtype:
                problem = "its shards have images of different sizes"
                raise ValueError(f"run.objective.data.source: {problem}; set run.objective.data.size")
            into = groups[index :: self.total // share.world]
            into[...] = part.reshape(into.shape)
        return samples

    def _micro_batches(self, samples: Samples, numbers: npt.NDArray[np.int64]) -> list[Batch]:
        size = self.share.micro_batch
        starts = range(0, len(samples), size)
        return [self.collate.batch(samples[start : start + size], numbers[start : start + size]) for start in starts]
