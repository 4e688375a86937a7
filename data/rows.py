"""The rows of one lane: which shards it reads, in which order, epoch after epoch, over failures of the source.

A position is three numbers. Reading on from a position gives the same tables, to the byte, as never having stopped.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
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


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What to do about a source that fails."""

    retry_seconds: float
    skip: bool = False
    """Leave out what stays unreadable, rather than end the run."""
    closing: Event = field(default_factory=Event)
    """Set when nobody waits for the rows any more."""


class Rows:
    """The rows of lane `lane` of `lanes`: shards lane, lane + lanes, ..., in an order of (seed, lane, epoch).

    Where there are fewer shards than lanes, several lanes share a shard and take its rows in turn.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        lane: int,
        lanes: int,
        seed: int | str,
        position: Position,
        reading: Reading,
        skipped: Sequence[Sequence[int]] = (),
        wide: bool = False,
    ) -> None:
        self._shards = shards
        self._key = (seed, "shards", lane)
        self._mine = list(range(lane, shards.count, lanes)) or [lane % shards.count]
        self._turn = lane // shards.count if lane >= shards.count else 0
        self._turns = len(range(self._mine[0], lanes, shards.count)) if shards.count < lanes else 1
        self.wide = False
        """Whether the lane reads all shards, because it found nothing in its own."""
        self._reading = reading
        self._backoff = Backoff(reading.retry_seconds, reading.closing)
        self._tables: Iterator[pa.Table] | None = None
        self._ordered: tuple[int, list[int]] | None = None
        if wide:
            self.widen()
        self.position = position
        self.place = Place("", 0, 1)
        self.skipped = [list(place) for place in skipped]
        """[epoch, shard, row] from where on a shard could not be read: it ends there, also when it is read again."""

    def widen(self) -> None:
        """From now on read all rows of all shards, from the first epoch on."""
        self._mine, self._turn, self._turns, self.wide = list(range(self._shards.count)), 0, 1, True
        self._tables = self._ordered = None
        self.position = Position()

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
        here = [self.position.epoch, shard, self.position.row]
        while here not in self.skipped:
            try:
                if self._tables is None:
                    self._tables = self._shards.read(shard, self.position.row, BATCH)
                table = next(self._tables, None)
            except Exception as error:  # pyarrow, aiohttp, httpx, botocore and fsspec each raise their own
                self._tables = None
                if not self._again(error, self._shards.name(shard)):
                    self.skipped.append(here)
            else:
                self._backoff.progress()
                return table
        return None

    def _again(self, error: Exception, name: str) -> bool:
        """Wait, where the error may pass; False where the shard is to be skipped. Raises what ends the run."""
        behind = reason(error)
        said = " ".join(f"{type(behind).__name__}: {behind}".split())
        if passes(behind):
            log.warning("%s does not answer (%s); trying again", name, said)
            if self._backoff.wait():
                return True
            said = f"{name} has not answered for {self._reading.retry_seconds:g} s ({said})"
            problem: Exception = OSError(f"data.source: {said}; resume when it does, or raise data.retry_seconds")
        else:
            said = f"cannot read {name} ({said})"
            problem = ValueError(f"data.source: {said}; mend the file, take it out of the source, or set data.on_unreadable to skip")
        if not self._reading.skip:
            raise problem from error
        log.warning("%s; what is left of it is skipped from row %d on", said, self.position.row)
        self._backoff.progress()
        return False
