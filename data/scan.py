"""All rows of a source, once, in an order that depends only on the source."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from data.rows import Origin, Reading, Rows
from data.shards import open_shards
from data.sources import Plain, Source, parts_of

if TYPE_CHECKING:
    import pyarrow as pa

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
