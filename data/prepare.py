"""Before workers start: that the data are there, and can be read."""

from threading import Event

from data.documents import text_column
from data.rows import Position, Rows
from data.shards import open_shards
from data.sources import PythonStdlib, Source
from data.stdlib import stdlib_shards
from data.text import TextConfig
from data.tokenizers import load_tokenizer


def prepare(config: TextConfig) -> None:
    """Write the standard library's shards where they are asked for and missing; read the first rows of any other source.

    Raises ValueError, in one line, for a source or tokenizer that is missing, refused, empty or without its columns.
    """
    load_tokenizer(config.tokenizer)
    _check(config.source, config.training_columns, config.retry_seconds)
    if config.eval_source:
        _check(config.eval_source, [config.text_column], config.retry_seconds)


def _check(source: Source, columns: list[str], retry_seconds: float) -> None:
    if isinstance(source, PythonStdlib):
        stdlib_shards()  # ours, and known to be right: nothing to read, nothing heavy to import
        return
    shards = open_shards(source, columns, retry_seconds=retry_seconds)
    rows = Rows(shards, lane=0, lanes=1, seed=0, position=Position(), retry_seconds=retry_seconds, closing=Event())
    while (table := rows.next()) is not None:
        if table.num_rows:
            text_column(table, columns[0])
            return
    raise ValueError(f"data.source: no rows in {', '.join(rows.names())}; give files with data")
