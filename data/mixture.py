"""Lanes over several sources, and the count of what a lane has given."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from data.lanes import Samples, State
from data.shuffle import splitmix64, stable_hash


class Stream(Protocol):
    """Samples without end; `state()` after `take` is where the next one begins."""

    def take(self, count: int) -> Samples: ...
    def state(self) -> State: ...


class MixedLane:
    """Each sample from one of `parts`, drawn with their weights from (seed, lane, its place in the lane) alone."""

    def __init__(self, parts: Sequence[Stream], weights: Sequence[float], *, lane: int, seed: int, taken: int) -> None:
        self._parts = parts
        self._edges = np.cumsum(weights)[:-1] / np.sum(weights)
        self._key = np.uint64(stable_hash(seed, "mixture", lane))
        self._taken = taken

    def state(self) -> State:
        return {"drawn": self._taken, "parts": [part.state() for part in self._parts]}

    def take(self, count: int) -> Samples:
        """The next `count` samples, (count, ...)."""
        choices = self.choices(count)
        self._taken += count
        samples: Samples | None = None
        for number, part in enumerate(self._parts):
            mine = np.flatnonzero(choices == number)
            if len(mine):
                taken = part.take(len(mine))
                if samples is None:
                    samples = np.empty((count, *taken.shape[1:]), taken.dtype)
                elif taken.dtype != samples.dtype:
                    raise ValueError("data.source: the parts of the mixture have images of different sizes; set data.size")
                samples[mine] = taken
        assert samples is not None, "nothing was asked for"
        return samples

    def choices(self, count: int) -> npt.NDArray[np.intp]:
        """Which part each of the next `count` samples comes from."""
        places = np.arange(self._taken, self._taken + count, dtype=np.uint64)
        uniform = (splitmix64(splitmix64(places) ^ self._key) >> np.uint64(11)) * 2.0**-53
        return np.searchsorted(self._edges, uniform, side="right")


class Counted:
    """A stream that counts its samples and keeps a digest of all that it gave, in its order: the ledger's evidence (ledger.py)."""

    def __init__(self, stream: Stream, *, samples: int, digest: str) -> None:
        self._stream = stream
        self._samples = samples
        self._digest = int(digest, 16)

    def take(self, count: int) -> Samples:
        """The next `count` samples; the digest is chained from take to take."""
        samples = self._stream.take(count)
        self._samples += count
        self._digest = chained(self._digest, samples)
        return samples

    def state(self) -> State:
        state = self._stream.state()
        state["samples"], state["digest"] = self._samples, f"{self._digest:016x}"
        return state


def chained(digest: int, samples: Samples) -> int:
    """The digest of what `digest` stands for and then `samples`."""
    return xxhash.xxh3_64_intdigest(samples.data if samples.dtype.names is None else samples.view(np.uint8).data, digest)


FIRST: dict[str, Any] = {"samples": 0, "digest": f"{0:016x}"}
