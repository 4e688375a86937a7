"""Before workers start: that the data are there, and can be read."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from data.digits import digits_shards
from data.documents import text_column
from data.image_rows import Images, ImageSamples
from data.images import ImageConfig
from data.rows import Place
from data.scan import scan
from data.sources import Digits, Plain, PythonStdlib, Source, parts_of
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
        case ImageConfig():
            images, samples = Images(config, held_out=0.0), ImageSamples(config)
            look = lambda table, place: samples.of(images.all(table, place))  # noqa: E731
    _check(config.source, config.columns, config.retry_seconds, look)
    if config.eval_source:
        _check(config.eval_source, lambda _: config.eval_columns, config.retry_seconds, look)


def _check(source: Source, columns: Callable[[Plain], list[str]], retry_seconds: float, look: Look) -> None:
    for part in parts_of(source):
        match part.source:
            case PythonStdlib() if "text" in columns(part.source):  # ours, and known to be right: nothing to read, nothing heavy to import
                stdlib_shards()
            case Digits() if "image" in columns(part.source):
                digits_shards()
            case _:
                table, place, _ = next(scan(part.source, columns, retry_seconds=retry_seconds))
                look(table, place)
