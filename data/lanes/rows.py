"""The rows of one lane: which shards it reads and in which order, across failures of the source.

Three numbers make a position. Reading from a position gives the same tables, to the byte, as never
having stopped.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from threading import Event
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np

from data.lanes.shuffle import permutation
from data.sources.kinds import Plain, Source, parts_of
from data.sources.retry import OUTAGE, Backoff, Outage, passes, reason
from data.sources.shards import Shards, open_shards

if TYPE_CHECKING:
    import pyarrow as pa

if TYPE_CHECKING:
    import pyarrow as pa

# Rows per table. Windows end with a table, so another number here is another order of samples.
BATCH = 64

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a lane is in its rows."""

    epoch: int = 0
    shard: int = 0
    """Index into the epoch's order of the lane's shards."""
    row: int = 0
    """Number of rows already read of that shard, including the rows of other lanes."""


class RowsState(TypedDict):
    """The part of a lane's state from which `Rows` continues."""

    epoch: int
    shard: int
    row: int
    wide: bool
    """Whether the lane reads all shards, because its own have no documents."""
    skipped: list[list[int]]
    """[epoch, shard, row] where a shard became unreadable; it ends there whenever it is read."""


class Origin(NamedTuple):
    """Which rows of which shard a table holds, for messages: `first`, `first` + `stride`, ..."""

    shard: str
    first: int
    stride: int

    def row(self, index: int) -> str:
        """The name of the table's row at `index`."""
        return f"{self.shard}, row {self.first + index * self.stride}"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How `Rows` treats a source that fails."""

    retry_seconds: float
    """How long to retry without progress."""
    skip: bool = False
    """Whether to skip what stays unreadable; otherwise it ends the run."""
    closing: Event = field(default_factory=Event)
    """Set when the consumer has closed."""
    outage: Outage = OUTAGE
    """Checked before every table is read."""


class Rows:
    """The rows of lane `lane` of `lanes`: those of the shards lane, lane + lanes, ...

    The order of the shards is a function of (seed, lane, epoch). If there are fewer shards than
    lanes, several lanes share a shard and take its rows in turn.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        lane: int,
        lanes: int,
        seed: int | str,
        reading: Reading,
        state: RowsState | None = None,
    ) -> None:
        self.shards = shards
        self.reading = reading
        self.key = (seed, "shards", lane)
        self.own = list(range(lane, shards.count, lanes)) or [lane % shards.count]
        """Numbers of the shards that this lane reads."""
        self.turn = lane // shards.count if lane >= shards.count else 0
        self.turns = len(range(self.own[0], lanes, shards.count)) if shards.count < lanes else 1
        """Of every `turns` rows of a shard, the lane takes the one numbered `turn`."""
        self.wide = False
        self.position = Position()
        self.origin = Origin("", 0, 1)
        """Where the rows of the last table come from."""
        self.skipped: list[list[int]] = []
        """As in `RowsState`."""
        self._backoff = Backoff(reading.retry_seconds, reading.closing)
        self._tables: Iterator[pa.Table] | None = None
        self._ordered: tuple[int, list[int]] | None = None
        if state is not None:
            self._restore(state)

    def _restore(self, state: RowsState) -> None:
        if state["wide"]:
            self.widen()
        self.position = Position(epoch=state["epoch"], shard=state["shard"], row=state["row"])
        self.skipped = [list(position) for position in state["skipped"]]

    def widen(self) -> None:
        """Read all rows of all shards from now on, starting with the first epoch."""
        self.own = list(range(self.shards.count))
        self.turn = 0
        self.turns = 1
        self.wide = True
        self.position = Position()
        self._tables = None
        self._ordered = None

    def names(self) -> list[str]:
        """The names of this lane's shards, for messages."""
        return [self.shards.name(shard) for shard in self.own]

    def next(self) -> "pa.Table | None":
        """The next table, which may have no rows; None at the end of an epoch.

        Updates `position` and `origin`.
        """
        at = self.position
        while at.shard < len(self.own):
            shard = self._order(at.epoch)[at.shard]
            table = self._read(shard)
            if table is None:
                self._tables = None
                at = Position(epoch=at.epoch, shard=at.shard + 1)
                self.position = at
                continue
            self.position = replace(at, row=at.row + table.num_rows)
            first = (self.turn - at.row) % self.turns
            self.origin = Origin(self.shards.name(shard), at.row + first, self.turns)
            return table if self.turns == 1 else table.take(np.arange(first, table.num_rows, self.turns))
        self.position = Position(epoch=at.epoch + 1)
        return None

    def _order(self, epoch: int) -> list[int]:
        """The lane's shards in the order of `epoch`."""
        if self._ordered is None or self._ordered[0] != epoch:
            order = permutation(len(self.own), *self.key, epoch)
            self._ordered = epoch, [self.own[index] for index in order]
        return self._ordered[1]

    def _read(self, shard: int) -> "pa.Table | None":
        """The next table of `shard`; None at its end, or where the rest is skipped."""
        start = [self.position.epoch, shard, self.position.row]
        while start not in self.skipped:
            try:
                self.reading.outage.check()
                if self._tables is None:
                    self._tables = self.shards.read(shard, self.position.row, BATCH)
                table = next(self._tables, None)
            except Exception as error:  # pyarrow, aiohttp, httpx, botocore and fsspec each raise their own
                self._tables = None
                if not self._retry(error, self.shards.name(shard)):
                    self.skipped.append(start)
            else:
                self._backoff.progress()
                return table
        return None

    def _retry(self, error: Exception, name: str) -> bool:
        """Wait if the error may pass; False if the rest of the shard is skipped.

        Raises if the run must end.
        """
        cause = reason(error)
        detail = " ".join(f"{type(cause).__name__}: {cause}".split())
        problem: Exception
        if passes(cause):
            log.warning("%s does not answer (%s); trying again", name, detail)
            if self._backoff.wait():
                return True
            summary = f"{name} has not answered for {self.reading.retry_seconds:g} s ({detail})"
            fix = "resume when it does, or raise run.objective.data.retry_seconds"
            problem = OSError(f"run.objective.data.source: {summary}; {fix}")
        else:
            summary = f"cannot read {name} ({detail})"
            fix = "repair the file, remove it from the source, or set run.objective.data.on_unreadable to skip"
            problem = ValueError(f"run.objective.data.source: {summary}; {fix}")
        if not self.reading.skip:
            raise problem from error
        log.warning("%s; skipping the rest of it from row %d", summary, self.position.row)
        self._backoff.progress()
        return False


# The key of the scan's shard order, the same in all runs.
SEED = "held out"


def scan(
    source: Source,
    columns: Callable[[Plain], Sequence[str]],
    *,
    retry_seconds: float,
    skip: bool = False,
) -> "Iterator[tuple[pa.Table, Origin, Plain]]":
    """(table, origin of its rows, part of the source) of every table that has rows.

    Raises ValueError for a problem with the source and for a part without rows; OSError for a
    source that stopped answering.
    """
    for part in parts_of(source):
        shards = open_shards(part.source, columns(part.source), retry_seconds=retry_seconds)
        reading = Reading(retry_seconds=retry_seconds, skip=skip)
        rows = Rows(shards, lane=0, lanes=1, seed=SEED, reading=reading)
        empty = True
        while (table := rows.next()) is not None:
            if table.num_rows:
                empty = False
                yield table, rows.origin, part.source
        if empty:
            raise ValueError(f"run.objective.data.source: no rows in {', '.join(rows.names())}; use files with data")
