"""A source opened through Hugging Face `datasets`, as numbered shards of rows that can be read from any row on.

Each shard is streamed alone (`IterableDataset.shard`), in its own order, by `.iter` in arrow format: that is the part of
`datasets` which is exact under resuming. The order of shards and rows is ours (rows.py).
"""

import logging
from collections.abc import Iterator, Sequence
from threading import Event
from typing import TYPE_CHECKING, Any, Protocol

from data.digits import digits_shards
from data.files import file_format, list_files
from data.image_files import COLUMNS, ImageFileShards, with_bytes
from data.retry import Backoff, passes, reason
from data.sources import Digits, Files, Hub, Plain, PythonStdlib, is_url
from data.stdlib import stdlib_shards

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import DatasetBuilder, IterableDataset

SMALL_BYTES = 1 << 23  # shards up to this size are kept in memory
CACHE_BYTES = 1 << 27  # and all of them up to this one
FEW = 4  # shards a lane: below it, a lane may be dealt empty ones alone, so they are looked for
PARQUET_ROWS = 1024  # at a time; the default is those of the first row group, which may be none or a gigabyte


class Shards(Protocol):
    """Numbered shards of rows."""

    count: int

    def name(self, shard: int) -> str:
        """What a person knows the shard by."""

    def read(self, shard: int, row: int, batch: int) -> "Iterator[pa.Table]":
        """Tables of `batch` rows (the last may be shorter), from `row` of `shard` on."""


class StreamedShards:
    """`columns` of a dataset, as `count` shards; `names` are its files, where they are known; about `together` rows are read at a time."""

    def __init__(self, dataset: "IterableDataset", columns: Sequence[str], names: Sequence[str], *, together: int = 1) -> None:
        self._dataset = dataset
        self._together = together
        self._columns = list(columns)
        self._names = names
        self._kept = list(range(dataset.num_shards))
        self._cache: dict[int, pa.Table] = {}
        self._room = CACHE_BYTES
        self.count = len(self._kept)

    def name(self, shard: int) -> str:
        """Its file, where there is one for each."""
        place, total = self._kept[shard], self._dataset.num_shards
        return self._names[place] if len(self._names) == total else f"shard {place} of {total} of {self._names[0]}"

    def read(self, shard: int, row: int, batch: int) -> "Iterator[pa.Table]":
        place = self._kept[shard]
        if place in self._cache:
            table = self._cache[place]
            return (table.slice(first, batch) for first in range(row, table.num_rows, batch))
        tables = self._stream(place, row, batch)
        return self._caching(place, tables) if row == 0 else tables

    def _stream(self, place: int, row: int, batch: int) -> "Iterator[pa.Table]":
        shard = self._dataset.shard(num_shards=self._dataset.num_shards, index=place)
        for table in self._many(shard, row, batch):
            yield from (table.slice(first, batch) for first in range(0, table.num_rows, batch))

    def _many(self, shard: "IterableDataset", row: int, batch: int) -> "Iterator[pa.Table]":
        """Tables of several batches each; of one where that fails, so that all rows before the damage come out."""
        for rows in (max(self._together, batch), batch):
            try:
                for table in (shard.skip(row) if row else shard).iter(rows):
                    row += table.num_rows
                    yield with_bytes(table.select(self._columns))
                return
            except Exception as error:  # whatever the file systems and formats raise
                if rows == batch or passes(reason(error)):
                    raise

    def _caching(self, place: int, tables: "Iterator[pa.Table]") -> "Iterator[pa.Table]":
        """`tables`, kept for the next epoch where they are small: opening a file takes `datasets` as long as reading a megabyte."""
        import pyarrow as pa

        kept: list[pa.Table] = []
        size = 0
        for table in tables:
            size += table.nbytes
            if size <= min(SMALL_BYTES, self._room):
                kept.append(table)
            else:
                kept.clear()  # what is not kept for good is better used again at once, by whoever reads the next table
            yield table
        if kept and size <= min(SMALL_BYTES, self._room):
            self._room -= size
            self._cache[place] = pa.concat_tables(kept).combine_chunks()

    def without_empty(self) -> "StreamedShards":
        """Only the shards that have rows, if any has: a lane must not be dealt empty ones alone."""
        full = [shard for shard in range(self.count) if self._has_rows(shard)]
        if full:
            self._kept = [self._kept[shard] for shard in full]
            self.count = len(full)
        return self

    def _has_rows(self, shard: int) -> bool:
        try:
            return next(self.read(shard, 0, 1), None) is not None
        except Exception as error:  # whatever the file systems and formats raise
            if passes(reason(error)):
                raise
            return True  # damaged: that is for whoever reads it


def open_shards(source: Plain, columns: Sequence[str], *, at_least: int = 1, retry_seconds: float = 0.0, closing: Event | None = None) -> Shards:
    """`source` with `columns`; where it has fewer files than `at_least`, parquet files are split by their row groups.

    Raises ValueError, in one line, for what is missing, refused or empty, and after `retry_seconds` for what cannot be reached.
    """
    backoff = Backoff(retry_seconds, closing or Event())
    while True:
        try:
            return _open(source, columns, at_least)
        except ValueError as error:
            raise ValueError(_explain(source, error)) from error
        except Exception as error:  # OSError and what network libraries have of their own
            if not passes(reason(error)) or not backoff.wait():
                raise ValueError(_explain(source, error)) from error


def _open(source: Plain, columns: Sequence[str], at_least: int) -> Shards:
    if isinstance(source, Files) and file_format(source, files := list_files(source)) == "image":
        if missing := set(columns) - set(COLUMNS):
            raise ValueError(missing_column(source, min(missing), COLUMNS))
        return ImageFileShards(files, columns, at_least)
    import datasets
    from datasets.packaged_modules.parquet.parquet import ParquetConfig

    _configure(datasets.config)
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    files, split = [], "train"
    try:
        match source:
            case PythonStdlib() | Digits():
                files = [str(path) for path in (stdlib_shards() if isinstance(source, PythonStdlib) else digits_shards())]
                builder = datasets.load_dataset_builder("parquet", data_files={"train": files})
            case Files():
                files = list_files(source)
                builder = _files_builder(datasets, source, files)
            case Hub():
                split = source.split
                builder = datasets.load_dataset_builder(source.dataset, source.config, revision=source.revision)
        config: Any = builder.config
        if isinstance(config, ParquetConfig):
            config.columns = list(columns)  # the others are not even read
            config.batch_size = PARQUET_ROWS
        dataset = builder.as_streaming_dataset(split=split)
    except StopIteration:
        raise ValueError(f"{_field(source)}: {files[0]} has no rows; give files with data") from None
    except FileNotFoundError:
        _ask_again(files)
        raise
    _check_columns(source, builder, dataset, columns, split)
    names = files or [f"{source.dataset} ({split})" if isinstance(source, Hub) else ""]
    if dataset.num_shards < at_least and isinstance(config, ParquetConfig):
        dataset = dataset.reshard()
    together = PARQUET_ROWS if isinstance(config, ParquetConfig) else 1
    shards = StreamedShards(dataset.with_format("arrow"), columns, names, together=together)
    return shards.without_empty() if shards.count < FEW * at_least else shards


def _files_builder(datasets: Any, source: Files, files: list[str]) -> "DatasetBuilder":
    kind = file_format(source, files)
    options = {"sample_by": source.sample_by} if kind == "text" else {}
    return datasets.load_dataset_builder(kind, data_files={"train": files}, **options)


def _check_columns(source: Plain, builder: "DatasetBuilder", dataset: "IterableDataset", columns: Sequence[str], split: str) -> None:
    """Each of `columns` is there; where the format does not say before it is read (text), the first rows do (rows.py)."""
    if dataset.column_names is None or set(columns) <= set(dataset.column_names):
        return
    missing = next(column for column in columns if column not in dataset.column_names)
    config: Any = builder.config
    config.columns = None
    builder.info.features = None
    raise ValueError(missing_column(source, missing, builder.as_streaming_dataset(split=split).column_names or []))


def missing_column(source: Plain, column: str, there: Sequence[str]) -> str:
    """The line for a column that is not there."""
    fix = "set data.text_column, data.image_column, data.label_column or data.key_column"
    return f"{_field(source)} has no column {column!r} (it has {', '.join(map(repr, there))}); {fix}"


def _field(source: Plain) -> str:
    """The config field and its value, for messages."""
    match source:
        case PythonStdlib() | Digits():
            return f"data.source = {source.name}"
        case Files(paths=paths):
            return f"data.source.paths = {', '.join(paths)}"
        case Hub():
            rest = [f"{key} = {value!r}" for key, value in (("config", source.config), ("split", source.split), ("revision", source.revision)) if value]
            return f"data.source.dataset = {source.dataset!r} ({', '.join(rest)})"


def _explain(source: Plain, error: Exception) -> str:
    """One line: field, value, what was said, and what to do."""
    said = " ".join(str(error).split())
    if not isinstance(error, ValueError) and reason(error) is not error:
        said = f"{said} ({' '.join(str(reason(error)).split())})"
    if said.startswith("data."):
        return said
    match source:
        case Hub():
            fix = "check the name, config, split and revision, HF_TOKEN (private and gated data) and the network"
        case PythonStdlib() | Digits() | Files():
            fix = "check the files, their format, the credentials and the network"
    return f"{_field(source)}: {said.rstrip('.')}; {fix}"


def _ask_again(files: Sequence[str]) -> None:
    """Raise what is behind "not found", which `datasets` says of every URL that does not answer."""
    from fsspec.core import url_to_fs

    urls = [file for file in files if is_url(file)]
    for url in urls:
        filesystem, path = url_to_fs(url)
        filesystem.info(path)
    if urls:
        raise ConnectionError(f"{urls[0]} did not answer at first")


def _configure(config: Any) -> None:
    """No word to the Hub about files that are not its own (5 s where there is no name server), and no retries inside a read.

    There `datasets` sleeps 20 times 5 s, deaf to closing; lanes retry themselves, from the last row that they have.
    """
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 1
    config.STREAMING_READ_RETRY_INTERVAL = config.STREAMING_OPEN_RETRY_INTERVAL = 0
    config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0
