"""Lanes over several sources, and the count and digest of the samples that a lane has given."""

from collections.abc import Sequence
from typing import Protocol, TypedDict, cast, final

import numpy as np
import numpy.typing as npt
import xxhash

from data.lanes.lane import LaneState, Samples
from data.lanes.shuffle import splitmix64, stable_hash


class MixtureState(TypedDict):
    """Where the next sample of a mixed lane begins, as JSON."""

    drawn: int
    """Number of samples drawn from all parts."""
    parts: list[LaneState]
    """The state of each part's lane."""


class Counts(TypedDict):
    """What a lane has given so far: the evidence that the ledger keeps (ledger.py)."""

    samples: int
    digest: str
    """Digest of all samples in order, 16 hexadecimal digits."""


@final
class CountedLaneState(LaneState, Counts):
    """The state of a counted lane over one source."""


@final
class CountedMixtureState(MixtureState, Counts):
    """The state of a counted lane over a mixture."""


CountedState = CountedLaneState | CountedMixtureState


class PartLane(Protocol):
    """The lane of one part."""

    def take(self, count: int) -> Samples: ...
    def state(self) -> LaneState: ...


class SampleStream(Protocol):
    """An endless stream of samples; after `take`, `state()` is where the next sample begins."""

    def take(self, count: int) -> Samples: ...
    def state(self) -> LaneState | MixtureState: ...


class MixedLane:
    """Draws each sample from one of `parts`, by weight: a function of (seed, lane, index)."""

    def __init__(
        self, parts: Sequence[PartLane], weights: Sequence[float], *, lane: int, seed: int, drawn: int
    ) -> None:
        self.parts = parts
        self.drawn = drawn
        self._edges = np.cumsum(weights)[:-1] / np.sum(weights)
        self._key = np.uint64(stable_hash(seed, "mixture", lane))

    def state(self) -> MixtureState:
        return {"drawn": self.drawn, "parts": [part.state() for part in self.parts]}

    def take(self, count: int) -> Samples:
        """The next `count` samples, (count, ...)."""
        choices = self.choices(count)
        self.drawn += count
        samples: Samples | None = None
        for number, part in enumerate(self.parts):
            chosen = np.flatnonzero(choices == number)
            if len(chosen) == 0:
                continue
            taken = part.take(len(chosen))
            if samples is None:
                samples = np.empty((count, *taken.shape[1:]), taken.dtype)
            elif taken.dtype != samples.dtype:
                problem = "the parts of the mixture have images of different sizes"
                raise ValueError(f"run.objective.data.source: {problem}; set run.objective.data.size")
            samples[chosen] = taken
        assert samples is not None, "take(0)"
        return samples

    def choices(self, count: int) -> npt.NDArray[np.intp]:
        """The part that each of the next `count` samples comes from."""
        indices = np.arange(self.drawn, self.drawn + count, dtype=np.uint64)
        uniform = (splitmix64(splitmix64(indices) ^ self._key) >> np.uint64(11)) * 2.0**-53
        return np.searchsorted(self._edges, uniform, side="right")


class Counted:
    """A stream that counts its samples and keeps a digest of all of them, in order."""

    def __init__(self, stream: SampleStream, counts: Counts) -> None:
        self.stream = stream
        self.samples = counts["samples"]
        self.digest = int(counts["digest"], 16)

    def take(self, count: int) -> Samples:
        """The next `count` samples. The digest depends on how they are divided into takes."""
        samples = self.stream.take(count)
        self.samples += count
        self.digest = chained(self.digest, samples)
        return samples

    def state(self) -> CountedState:
        """The state of the stream, and the counts up to it."""
        counts = Counts(samples=self.samples, digest=f"{self.digest:016x}")
        return cast(CountedState, {**self.stream.state(), **counts})


def chained(digest: int, samples: Samples) -> int:
    """The digest of `samples` after the samples that `digest` stands for."""
    data = samples.data if samples.dtype.names is None else samples.view(np.uint8).data
    return xxhash.xxh3_64_intdigest(data, digest)


def counts_of(state: CountedState | None) -> Counts:
    """The counts in a lane's state; those of a lane at its start for None."""
    if state is None:
        return {"samples": 0, "digest": f"{0:016x}"}
    return {"samples": state["samples"], "digest": state["digest"]}
