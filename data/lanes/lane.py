"""A lane: one deterministic stream of samples, which a few numbers bring back to any point.

A lane works in three steps:
1. Rows (rows.py) are collected into windows of documents, and each window is shuffled.
2. A window is cut into chunks of about half a megabyte, and a `SampleMaker` turns each chunk into
   samples.
3. The samples of a chunk are shuffled.

A state holds only what is needed to repeat this: the position at the window's start, the chunk's
first document, the tokens carried over from the chunk before, and how many samples were taken.
Resuming reads the window again and makes one chunk.
"""

from bisect import bisect_right
from collections.abc import Sequence, Sized
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from data.lanes.rows import Origin, Position, Rows, RowsState
from data.lanes.shuffle import permutation

if TYPE_CHECKING:
    import pyarrow as pa

# Samples are mixed within a chunk, which should stay in the CPU's cache.
# Part of the order, like rows.BATCH.
CHUNK_BYTES = 1 << 19
# A window ends early at this size, so that it does not fill the memory.
WINDOW_BYTES = 1 << 26

Samples = npt.NDArray[np.generic]
"""(samples, ...): windows of tokens, or records of an image and its label."""

Document = TypeVar("Document", bound=Sized)


class LaneState(RowsState):
    """Where the next sample of a lane begins, as JSON.

    The position is that of the window's first row.
    """

    document: int
    """Index in the window of the chunk's first document."""
    carry: list[int]
    """Tokens carried over from the chunk before."""
    documents: int
    """Number of documents in all finished chunks."""
    unreadable: int
    """How many of these documents could not be read."""
    taken: int
    """Number of samples taken from the chunk."""


class Chunk(NamedTuple):
    """The samples made of some consecutive documents."""

    samples: Samples
    """Read-only, so it may be a view."""
    carry: list[int]
    """Tokens left over for the next chunk."""
    unreadable: int
    """Number of documents left out because they cannot be read."""


class SampleMaker(Protocol[Document]):
    """Turns documents into samples: packs text, decodes images."""

    def documents(self, table: "pa.Table", origin: Origin) -> Sequence[Document]:
        """The training documents in the table; `len` of one is about its size in bytes."""

    def first_carry(self) -> list[int]:
        """The carry of a new lane."""

    def make(self, documents: Sequence[Document], carry: list[int]) -> Chunk:
        """All samples of `documents`, which follow `carry`."""


class Lane(Generic[Document]):
    """An endless stream of samples; after `take`, `state()` is where the next sample begins."""

    def __init__(
        self, rows: Rows, maker: SampleMaker[Document], *, lane: int, seed: int | str, window: int, state: LaneState
    ) -> None:
        self.rows = rows
        self.maker = maker
        self.lane = lane
        self.seed = seed
        self.window = window
        self.start = Position(epoch=state["epoch"], shard=state["shard"], row=state["row"])
        """Where the window begins."""
        self.document = state["document"]
        self.carry = state["carry"]
        self.taken = state["taken"]
        self.finished = state["documents"]
        self.unreadable = state["unreadable"]
        self._documents: list[Document] | None = None  # of the window, shuffled
        self._ends: list[int] = []  # of the window's chunks
        self._end = 0  # of this chunk
        self._chunk: Chunk | None = None
        self._fruitful = self.start != Position(epoch=self.start.epoch)  # whether the epoch has had documents
        self._barren_epoch: int | None = None  # the first of the epochs since which nothing could be read
        self._state: LaneState | None = None  # of this chunk, whatever was taken

    @staticmethod
    def first_state(maker: SampleMaker[Document], skipped: Sequence[Sequence[int]] = ()) -> LaneState:
        """The state of a lane at its start, which leaves out `skipped` (see RowsState)."""
        return LaneState(
            epoch=0,
            shard=0,
            row=0,
            document=0,
            carry=maker.first_carry(),
            documents=0,
            unreadable=0,
            wide=False,
            skipped=[list(position) for position in skipped],
            taken=0,
        )

    def state(self) -> LaneState:
        """Where the next sample begins; later calls do not change it."""
        if self._state is None:
            self._state = LaneState(
                epoch=self.start.epoch,
                shard=self.start.shard,
                row=self.start.row,
                document=self.document,
                carry=self.carry,
                documents=self.finished,
                unreadable=self.unreadable,
                wide=self.rows.wide,
                skipped=list(self.rows.skipped),
                taken=0,
            )
        return {**self._state, "taken": self.taken}

    def take(self, count: int) -> Samples:
        """The next `count` samples, (count, ...), read-only."""
        parts: list[Samples] = []
        while count:
            if self._chunk is None:
                self._chunk = self._make_chunk()
            elif self.taken == len(self._chunk.samples):
                self._finish_chunk(self._chunk)
            else:
                part = self._chunk.samples[self.taken : self.taken + count]
                self.taken += len(part)
                count -= len(part)
                parts.append(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _make_chunk(self) -> Chunk:
        """The chunk that begins at `document`, its samples shuffled."""
        if self._documents is None:
            self._documents = self._read_window()
            self._ends = _chunk_ends(self._documents)
        self._state = None
        self._end = self._ends[bisect_right(self._ends, self.document)]
        chunk = self.maker.make(self._documents[self.document : self._end], self.carry)
        order = permutation(len(chunk.samples), self.seed, "samples", self.lane, *self._start_key(), self.document)
        self._check_readable(chunk)
        return chunk._replace(samples=chunk.samples[order])  # all at once, while they are in the cache

    def _check_readable(self, chunk: Chunk) -> None:
        """Raises ValueError after a whole epoch in which no document could be read."""
        if chunk.unreadable < self._end - self.document:
            self._barren_epoch = None
        elif self._barren_epoch is None:
            self._barren_epoch = self.start.epoch
        elif self.start.epoch > self._barren_epoch + 1:
            raise self._no_documents("none can be read", "repair the source")

    def _finish_chunk(self, chunk: Chunk) -> None:
        """Move to the next chunk, and at the window's end to the next window."""
        assert self._documents is not None
        self.finished += self._end - self.document
        self.unreadable += chunk.unreadable
        self.carry = chunk.carry
        self.document = self._end
        self.taken = 0
        self._chunk = None
        self._state = None
        if self.document == len(self._documents):
            self.start = self.rows.position
            self.document = 0
            self._documents = None

    def _read_window(self) -> list[Document]:
        """The documents from `start` on, at least one, shuffled."""
        documents: list[Document] = []
        size = 0
        while len(documents) < self.window and size < WINDOW_BYTES:
            table = self.rows.next()
            if table is not None:
                documents.extend(self.maker.documents(table, self.rows.origin))
                size += table.nbytes
            elif documents:
                break
            else:
                self._check_epoch()
        self._fruitful = self.rows.position.shard > 0 or self.rows.position.row > 0
        order = permutation(len(documents), self.seed, "documents", self.lane, *self._start_key())
        return [documents[index] for index in order.tolist()]

    def _check_epoch(self) -> None:
        """At an epoch's end with the window still empty: widen after a whole empty epoch.

        Every later epoch would be empty too. Raises ValueError if all shards together have no
        documents.
        """
        if self._fruitful:
            self._fruitful = False
        elif not self.rows.wide:
            self.rows.widen()
            self.start = self.rows.position
        else:
            fix = "use more data, or a smaller run.objective.data.held_out"
            raise self._no_documents("all are empty or held out", fix)

    def _start_key(self) -> tuple[int, int, int]:
        return self.start.epoch, self.start.shard, self.start.row

    def _no_documents(self, why: str, fix: str) -> ValueError:
        names = self.rows.names()
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        reads = ", ".join(names[:3]) + more
        problem = f"lane {self.lane} has no documents to train on (it reads {reads}): {why}"
        return ValueError(f"run.objective.data.source: {problem}; {fix}")


def _chunk_ends(documents: Sequence[Sized]) -> list[int]:
    """Where chunks end: after about CHUNK_BYTES each, and at the end of the window."""
    chunk = np.cumsum(np.fromiter(map(len, documents), np.int64, len(documents))) // CHUNK_BYTES
    return [*(np.flatnonzero(np.diff(chunk)) + 1).tolist(), len(documents)]
