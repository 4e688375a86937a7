"""Checks, before workers start, that the data exist and can be read."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from data.config import ImageConfig, TextConfig
from data.images.records import ImageRecords, Images
from data.lanes.rows import Origin, scan
from data.sources.builtin import digits_shards, stdlib_shards
from data.sources.kinds import Digits, Plain, PythonStdlib, Source, parts_of
from data.text.documents import text_column
from data.text.tokenizers import load_tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

Check = Callable[["pa.Table", Origin], object]


def prepare(config: TextConfig | ImageConfig) -> None:
    """Write the shards of built-in sources, and read the first rows of any other source.

    Raises ValueError, in one line, for a source or tokenizer that is missing, refused, empty or
    without its columns.
    """
    check: Check
    match config:
        case TextConfig():
            load_tokenizer(config.tokenizer)
            check = lambda table, _: text_column(table, config.text_column)  # noqa: E731
        case ImageConfig():
            images = Images(config, held_out=0.0)
            records = ImageRecords(config)
            check = lambda table, origin: records.of(images.all(table, origin))  # noqa: E731
    _check(config.source, config.columns, check, retry_seconds=config.retry_seconds)
    if config.eval_source:
        _check(config.eval_source, lambda _: config.eval_columns, check, retry_seconds=config.retry_seconds)


def _check(source: Source, columns: Callable[[Plain], list[str]], check: Check, *, retry_seconds: float) -> None:
    for part in parts_of(source):
        match part.source:
            # The built-in sources are known to be right: nothing to read or to import.
            case PythonStdlib() if "text" in columns(part.source):
                stdlib_shards()
            case Digits() if "image" in columns(part.source):
                digits_shards()
            case _:
                table, origin, _ = next(scan(part.source, columns, retry_seconds=retry_seconds))
                check(table, origin)
