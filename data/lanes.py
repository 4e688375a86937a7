"""A lane: one deterministic stream of samples, which a few numbers bring back to any place.

rows (rows.py) -> windows of documents, shuffled -> chunks of about half a megabyte -> samples of the chunk, shuffled.
Only what a state needs is kept: the position at the window's start, the chunk's first document, what was left over of
the chunk before, and how many samples were taken. Resuming reads the window again and makes one chunk.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from data.rows import Place, Position, Rows
from data.shuffle import permutation

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_BYTES = 1 << 19  # samples are mixed within a chunk, which should stay in the cache of the CPU; part of the order, like rows.BATCH
WINDOW_BYTES = 1 << 26  # a window ends early rather than fill the memory

State = dict[str, Any]
Samples = npt.NDArray[Any]


class Made(NamedTuple):
    """What became of some documents."""

    samples: Samples
    """(samples, ...); only read, so that it may be a view."""
    carry: list[int]
    """What is left over for the next chunk."""
    unreadable: int
    """Documents that were left out because they cannot be read."""


class Maker(Protocol):
    """What makes samples of documents: packing for text, decoding for images."""

    def documents(self, table: "pa.Table", place: Place) -> Sequence[Any]:
        """The training documents among the rows, which come from `place`; `len` of one is about its bytes."""

    def first_carry(self) -> list[int]:
        """What a new lane has left over from nothing."""

    def make(self, documents: Sequence[Any], carry: list[int]) -> Made:
        """All the samples of `documents` after `carry`."""


class Lane:
    """Samples without end; `state()` after `take` is where the next one begins."""

    def __init__(self, rows: Rows, maker: Maker, *, lane: int, seed: int | str, window: int, state: State) -> None:
        self._rows = rows
        self._maker = maker
        self._lane = lane
        self._key = seed
        self._window = window
        self._start: dict[str, int] = {key: state[key] for key in asdict(Position())}
        self._document: int = state["document"]
        self._carry: list[int] = state["carry"]
        self._taken: int = state["taken"]
        self._counts = {key: state[key] for key in ("documents", "unreadable")}
        self._documents: list[Any] | None = None  # of the window, in the order in which they come
        self._made: Made | None = None  # of the chunk
        self._fruitful = self._start != asdict(Position(epoch=self._start["epoch"]))
        self._barren_epoch: int | None = None
        self._place: State | None = None  # what a state holds besides `taken`, until the next chunk

    @staticmethod
    def first_state(maker: Maker) -> State:
        """The state of a lane from which nothing was taken."""
        counts = {"documents": 0, "unreadable": 0, "wide": False, "skipped": []}
        return {**asdict(Position()), "document": 0, "carry": maker.first_carry(), "taken": 0, **counts}

    def state(self) -> State:
        """Where the next sample begins: JSON-able, and not changed by later calls.

        With it the documents of all finished chunks, those of them that were unreadable, and where shards were (rows.py).
        """
        if self._place is None:
            place = {**self._start, "document": self._document, "carry": self._carry}
            self._place = {**place, **self._counts, "wide": self._rows.wide, "skipped": list(self._rows.skipped)}
        return {**self._place, "taken": self._taken}

    def take(self, count: int) -> Samples:
        """The next `count` samples, (count, ...), to be read only."""
        parts: list[Samples] = []
        while count:
            if self._made is None:
                self._make_chunk()
            elif self._taken == len(self._samples):
                self._next_chunk()
            else:
                part = self._samples[self._taken : self._taken + count]
                self._taken += len(part)
                count -= len(part)
                parts.append(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _make_chunk(self) -> None:
        """The samples of the chunk that begins at `_document`, and their order."""
        if self._documents is None:
            self._documents = self._read_window()
            self._ends = _chunk_ends(self._documents)
        self._place = None
        self._end = self._ends[bisect_right(self._ends, self._document)]
        self._made = self._maker.make(self._documents[self._document : self._end], self._carry)
        order = permutation(len(self._made.samples), self._key, "samples", self._lane, *self._start.values(), self._document)
        self._samples = self._made.samples[order]  # all at once, while they are in the cache
        if self._made.unreadable < self._end - self._document:
            self._barren_epoch = None
        elif self._barren_epoch is None:
            self._barren_epoch = self._start["epoch"]
        elif self._start["epoch"] > self._barren_epoch + 1:
            raise ValueError(_nothing(self._lane, self._rows.names(), "none can be read", "mend the source"))

    def _next_chunk(self) -> None:
        """Move the state over the chunk's edge, and over the window's where that ends too."""
        assert self._documents is not None
        assert self._made is not None
        self._place = None
        made = self._end - self._document
        self._counts = {"documents": self._counts["documents"] + made, "unreadable": self._counts["unreadable"] + self._made.unreadable}
        self._carry, self._document, self._taken, self._made = self._made.carry, self._end, 0, None
        if self._document == len(self._documents):
            self._start, self._document, self._documents = asdict(self._rows.position), 0, None

    def _read_window(self) -> list[Any]:
        """Documents from `_start` on, at least one, shuffled."""
        documents: list[Any] = []
        size = 0
        while len(documents) < self._window and size < WINDOW_BYTES:
            table = self._rows.next()
            if table is not None:
                documents.extend(self._maker.documents(table, self._rows.place))
                size += table.nbytes
            elif documents:
                break
            else:
                self._check_epoch()
        self._fruitful = self._rows.position.shard > 0 or self._rows.position.row > 0
        order = permutation(len(documents), self._key, "documents", self._lane, *self._start.values())
        return [documents[place] for place in order.tolist()]

    def _check_epoch(self) -> None:
        """An epoch ended and this window is empty: if the whole epoch was, so will all others be, and the lane reads what all lanes read."""
        if self._fruitful:
            self._fruitful = False
        elif not self._rows.wide:
            self._rows.widen()
            self._start = asdict(self._rows.position)
        else:
            fix = "give more data, or a smaller data.held_out"
            raise ValueError(_nothing(self._lane, self._rows.names(), "all are empty or held out", fix))


def _chunk_ends(documents: Sequence[Any]) -> list[int]:
    """The places where chunks end: after about CHUNK_BYTES each, at the latest at the end."""
    chunk = np.cumsum(np.fromiter(map(len, documents), np.int64, len(documents))) // CHUNK_BYTES
    return [*(np.flatnonzero(np.diff(chunk)) + 1).tolist(), len(documents)]


def _nothing(lane: int, names: Sequence[str], why: str, fix: str) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"data.source: lane {lane} has no documents to train on (it reads {shown}): {why}; {fix}"
