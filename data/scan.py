"""All rows of a source, once, in an order that only the source decides: for held-out sets and first looks."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from data.rows import Place, Position, Reading, Rows
from data.shards import open_shards
from data.sources import Plain, Source, parts_of

if TYPE_CHECKING:
    import pyarrow as pa

SEED = "held out"  # of the scan's shard order: one for all runs


def scan(source: Source, columns: Callable[[Plain], Sequence[str]], *, retry_seconds: float, skip: bool = False) -> "Iterator[tuple[pa.Table, Place, Plain]]":
    """(table, where its rows are from, the part of the source) of every table that has rows.

    Raises ValueError for what is wrong with the source, and where a part has no rows; OSError for what stopped answering.
    """
    for part in parts_of(source):
        shards = open_shards(part.source, columns(part.source), retry_seconds=retry_seconds)
        rows = Rows(shards, lane=0, lanes=1, seed=SEED, position=Position(), reading=Reading(retry_seconds=retry_seconds, skip=skip))
        empty = True
        while (table := rows.next()) is not None:
            if table.num_rows:
                empty = False
                yield table, rows.place, part.source
        if empty:
            raise ValueError(f"data.source: no rows in {', '.join(rows.names())}; give files with data")
