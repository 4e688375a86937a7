"""The rows of one lane: which shards it reads, in which order, epoch after epoch, over failures of the source.

A position is three numbers. Reading on from a position gives the same tables, to the byte, as never having stopped.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from threading import Event
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data.retry import Backoff, passes, reason
from data.shards import Shards
from data.shuffle import permutation

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 64  # rows to a table; windows end with a table, so another number here is another order of samples

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a lane stands in its rows."""

    epoch: int = 0
    shard: int = 0
    """A place in the epoch's order of the lane's shards."""
    row: int = 0
    """Rows read of that shard, those of other lanes included."""


class Place(NamedTuple):
    """Which rows of which shard a table holds, for messages: `first`, `first` + `every`, ..."""

    name: str
    first: int
    every: int

    def row(self, index: int) -> str:
        """The row at `index` of the table."""
        return f"{self.name}, row {self.first + index * self.every}"


class Rows:
    """The rows of lane `lane` of `lanes`: shards lane, lane + lanes, ..., in an order of (seed, lane, epoch).

    Where there are fewer shards than lanes, several lanes share a shard and take its rows in turn.
    """

    def __init__(self, shards: Shards, *, lane: int, lanes: int, seed: int | str, position: Position, retry_seconds: float, closing: Event) -> None:
        self._shards = shards
        self._key = (seed, "shards", lane)
        self._mine = list(range(lane, shards.count, lanes)) or [lane % shards.count]
        self._turn = lane // shards.count if lane >= shards.count else 0
        self._turns = len(range(self._mine[0], lanes, shards.count)) if shards.count < lanes else 1
        self._retry_seconds = retry_seconds
        self._backoff = Backoff(retry_seconds, closing)
        self._tables: Iterator[pa.Table] | None = None
        self._ordered: tuple[int, list[int]] | None = None
        self.position = position
        self.place = Place("", 0, 1)

    def names(self) -> list[str]:
        """The shards of this lane, for messages."""
        return [self._shards.name(shard) for shard in self._mine]

    def next(self) -> "pa.Table | None":
        """The next table (it may have no rows), which `place` tells of, and `position` moves on; None where an epoch ends."""
        at = self.position
        while at.shard < len(self._mine):
            table = self._read(shard := self._order(at.epoch)[at.shard])
            if table is None:
                self._tables = None
                self.position = at = Position(epoch=at.epoch, shard=at.shard + 1)
                continue
            self.position = replace(at, row=at.row + table.num_rows)
            first = (self._turn - at.row) % self._turns
            self.place = Place(self._shards.name(shard), at.row + first, self._turns)
            return table if self._turns == 1 else table.take(np.arange(first, table.num_rows, self._turns))
        self.position = Position(epoch=at.epoch + 1)
        return None

    def _order(self, epoch: int) -> list[int]:
        """The lane's shards as they come in `epoch`."""
        if self._ordered is None or self._ordered[0] != epoch:
            places = permutation(len(self._mine), *self._key, epoch)
            self._ordered = epoch, [self._mine[place] for place in places]
        return self._ordered[1]

    def _read(self, shard: int) -> "pa.Table | None":
        while True:
            try:
                if self._tables is None:
                    self._tables = self._shards.read(shard, self.position.row, BATCH)
                table = next(self._tables, None)
            except Exception as error:  # pyarrow, aiohttp, httpx, botocore and fsspec each raise their own
                self._tables = None
                self._wait(error, self._shards.name(shard))
            else:
                self._backoff.progress()
                return table

    def _wait(self, error: Exception, name: str) -> None:
        behind = reason(error)
        said = " ".join(f"{type(behind).__name__}: {behind}".split())
        if not passes(behind):
            raise ValueError(f"data.source: cannot read {name} ({said}); mend the file or take it out of the source") from error
        log.warning("%s does not answer (%s); trying again", name, said)
        if not self._backoff.wait():
            waited = f"{name} has not answered for {self._retry_seconds:g} s ({said})"
            raise OSError(f"data.source: {waited}; resume when it does, or raise data.retry_seconds") from error
