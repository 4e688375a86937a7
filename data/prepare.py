"""Before workers start: that the data are there, and can be read."""

from collections.abc import Callable, Sequence
from threading import Event
from typing import TYPE_CHECKING

from data.digits import digits_shards
from data.documents import text_column
from data.image_rows import Images, ImageSamples
from data.images import ImageConfig
from data.rows import Place, Position, Rows
from data.shards import open_shards
from data.sources import Digits, PythonStdlib, Source
from data.stdlib import stdlib_shards
from data.text import TextConfig
from data.tokenizers import load_tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

Look = Callable[["pa.Table", Place], object]


def prepare(config: TextConfig | ImageConfig) -> None:
    """Write the shards of our own sources where they are asked for and missing; read the first rows of any other source.

    Raises ValueError, in one line, for a source or tokenizer that is missing, refused, empty or without its columns.
    """
    match config:
        case TextConfig():
            load_tokenizer(config.tokenizer)
            look: Look = lambda table, place: text_column(table, config.text_column)  # noqa: E731
            eval_columns = [config.text_column]
        case ImageConfig():
            images, samples = Images(config, held_out=0.0), ImageSamples(config)
            look = lambda table, place: samples.of(images.all(table, place))  # noqa: E731
            eval_columns = config.eval_columns
    _check(config.source, config.training_columns, config.retry_seconds, look)
    if config.eval_source:
        _check(config.eval_source, eval_columns, config.retry_seconds, look)


def _check(source: Source, columns: Sequence[str], retry_seconds: float, look: Look) -> None:
    match source:
        case PythonStdlib() if "text" in columns:  # ours, and known to be right: nothing to read, nothing heavy to import
            stdlib_shards()
            return
        case Digits() if "image" in columns:
            digits_shards()
            return
    shards = open_shards(source, columns, retry_seconds=retry_seconds)
    rows = Rows(shards, lane=0, lanes=1, seed=0, position=Position(), retry_seconds=retry_seconds, closing=Event())
    while (table := rows.next()) is not None:
        if table.num_rows:
            look(table, rows.place)
            return
    raise ValueError(f"data.source: no rows in {', '.join(rows.names())}; give files with data")
