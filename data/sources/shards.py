"""A source opened by Hugging Face `datasets`, as numbered shards that can be read from any row on.

Each shard is streamed alone (`IterableDataset.shard`), in its own order, by `.iter` in arrow
format: the part of `datasets` that resumes exactly. The order of shards and rows is decided here
(rows.py).
"""

import logging
from collections.abc import Iterator, Sequence
from threading import Event
from typing import TYPE_CHECKING, NamedTuple, Protocol

from data.sources.builtin import digits_shards, stdlib_shards
from data.sources.files import file_format, list_files
from data.sources.image_files import COLUMNS, ImageFileShards, with_bytes
from data.sources.kinds import Digits, Files, Hub, Plain, PythonStdlib, SourceError, is_url
from data.sources.retry import Backoff, passes, reason

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import DatasetBuilder, IterableDataset

# Shards up to this size are kept in memory, and all of them together up to CACHE_BYTES.
SMALL_BYTES = 1 << 23
CACHE_BYTES = 1 << 27
# With fewer shards per lane, a lane could get only empty ones, so the empty ones are looked for.
FEW_SHARDS_PER_LANE = 4
# Read at a time. The default is the size of the first row group, which may be none or a gigabyte.
PARQUET_ROWS = 1024


class Shards(Protocol):
    """Numbered shards of rows."""

    count: int

    def name(self, shard: int) -> str:
        """The name by which a person knows the shard."""

    def read(self, shard: int, row: int, batch: int) -> "Iterator[pa.Table]":
        """Tables of `batch` rows (the last may be shorter), from `row` of `shard` on."""


class StreamedShards:
    """`columns` of a dataset, as `count` shards.

    `names` are its files, if known; about `read_rows` rows are read at a time.
    """

    def __init__(
        self, dataset: "IterableDataset", columns: Sequence[str], names: Sequence[str], *, read_rows: int = 1
    ) -> None:
        self.dataset = dataset
        self.columns = list(columns)
        self.names = names
        self.read_rows = read_rows
        self.kept = list(range(dataset.num_shards))
        """The dataset's shards that are dealt out."""
        self.count = len(self.kept)
        self._cache: dict[int, pa.Table] = {}
        self._room = CACHE_BYTES

    def name(self, shard: int) -> str:
        """The shard's file, if there is one per shard."""
        index = self.kept[shard]
        total = self.dataset.num_shards
        return self.names[index] if len(self.names) == total else f"shard {index} of {total} of {self.names[0]}"

    def read(self, shard: int, row: int, batch: int) -> "Iterator[pa.Table]":
        index = self.kept[shard]
        if index in self._cache:
            table = self._cache[index]
            return (table.slice(first, batch) for first in range(row, table.num_rows, batch))
        tables = self._stream(index, row, batch)
        return self._caching(index, tables) if row == 0 else tables

    def _stream(self, index: int, row: int, batch: int) -> "Iterator[pa.Table]":
        shard = self.dataset.shard(num_shards=self.dataset.num_shards, index=index)
        for table in self._large_tables(shard, row, batch):
            yield from (table.slice(first, batch) for first in range(0, table.num_rows, batch))

    def _large_tables(self, shard: "IterableDataset", row: int, batch: int) -> "Iterator[pa.Table]":
        """Tables of several batches each, or of one after an error: no row before it is lost."""
        for rows in (max(self.read_rows, batch), batch):
            try:
                for table in (shard.skip(row) if row else shard).iter(rows):
                    row += table.num_rows
                    yield with_bytes(table.select(self.columns))
                return
            except Exception as error:  # whatever the file systems and formats raise
                if rows == batch or passes(reason(error)):
                    raise

    def _caching(self, index: int, tables: "Iterator[pa.Table]") -> "Iterator[pa.Table]":
        """Pass `tables` on, and keep them for the next epoch if they are small.

        `datasets` takes as long to open a file as to read a megabyte.
        """
        import pyarrow as pa

        kept: list[pa.Table] = []
        size = 0
        for table in tables:
            size += table.nbytes
            if size <= min(SMALL_BYTES, self._room):
                kept.append(table)
            else:
                kept.clear()  # drop the tables now so that their memory is reused for the next one
            yield table
        if kept and size <= min(SMALL_BYTES, self._room):
            self._room -= size
            self._cache[index] = pa.concat_tables(kept).combine_chunks()

    def without_empty(self) -> "StreamedShards":
        """Deal out only the shards that have rows, if any has: no lane may get only empty ones."""
        full = [shard for shard in range(self.count) if self._has_rows(shard)]
        if full:
            self.kept = [self.kept[shard] for shard in full]
            self.count = len(full)
        return self

    def _has_rows(self, shard: int) -> bool:
        try:
            return next(self.read(shard, 0, 1), None) is not None
        except Exception as error:  # whatever the file systems and formats raise
            if passes(reason(error)):
                raise
            return True  # damaged: its reader will raise, or skip it


def open_shards(
    source: Plain,
    columns: Sequence[str],
    *,
    at_least: int = 1,
    retry_seconds: float = 0.0,
    closing: Event | None = None,
) -> Shards:
    """`source` with `columns`, as shards.

    With fewer files than `at_least`, parquet files are split by their row groups. Raises
    SourceError, in one line, for a missing, refused or empty source, and after `retry_seconds` for
    one that does not answer.
    """
    backoff = Backoff(retry_seconds, closing or Event())
    while True:
        try:
            return _open(source, columns, at_least)
        except SourceError:
            raise
        except ValueError as error:
            raise _explained(source, error) from error
        except Exception as error:  # OSError, and the errors of network libraries
            if not passes(reason(error)) or not backoff.wait():
                raise _explained(source, error) from error


def _open(source: Plain, columns: Sequence[str], at_least: int) -> Shards:
    files = _files_of(source)
    if isinstance(source, Files) and file_format(source, files) == "image":
        if missing := set(columns) - set(COLUMNS):
            raise missing_column(source, min(missing), COLUMNS)
        return ImageFileShards(files, columns, at_least)
    try:
        opened = _stream(source, files, columns)
    except StopIteration:
        raise SourceError(f"{_field(source)}: {files[0]} has no rows; use files with data") from None
    except FileNotFoundError:
        _raise_cause(files)
        raise
    opened.check_columns(source, columns)
    dataset = opened.dataset
    if opened.is_parquet and dataset.num_shards < at_least:
        dataset = dataset.reshard()
    names = files or [f"{source.dataset} ({source.split})" if isinstance(source, Hub) else ""]
    read_rows = PARQUET_ROWS if opened.is_parquet else 1
    shards = StreamedShards(dataset.with_format("arrow"), columns, names, read_rows=read_rows)
    return shards.without_empty() if shards.count < FEW_SHARDS_PER_LANE * at_least else shards


def _files_of(source: Plain) -> list[str]:
    match source:
        case PythonStdlib():
            return [str(path) for path in stdlib_shards()]
        case Digits():
            return [str(path) for path in digits_shards()]
        case Files():
            return list_files(source)
        case Hub():
            return []


class _Opened(NamedTuple):
    """A source opened by `datasets`."""

    builder: "DatasetBuilder"
    dataset: "IterableDataset"
    split: str
    is_parquet: bool

    def check_columns(self, source: Plain, columns: Sequence[str]) -> None:
        """Raises SourceError for a missing column.

        Some formats (text) know their columns only once they are read; there the first rows will
        tell.
        """
        names = self.dataset.column_names
        if names is None or set(columns) <= set(names):
            return
        missing = next(column for column in columns if column not in names)
        self.builder.config.columns = None
        self.builder.info.features = None
        everything = self.builder.as_streaming_dataset(split=self.split)
        raise missing_column(source, missing, everything.column_names or [])


def _stream(source: Plain, files: list[str], columns: Sequence[str]) -> _Opened:
    import datasets
    from datasets.packaged_modules.parquet.parquet import ParquetConfig

    _configure()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    split = "train"
    match source:
        case PythonStdlib() | Digits():
            builder = datasets.load_dataset_builder("parquet", data_files={"train": files})
        case Files():
            kind = file_format(source, files)
            options = {"sample_by": source.sample_by} if kind == "text" else {}
            builder = datasets.load_dataset_builder(kind, data_files={"train": files}, **options)
        case Hub():
            split = source.split
            builder = datasets.load_dataset_builder(source.dataset, source.config, revision=source.revision)
    is_parquet = isinstance(builder.config, ParquetConfig)
    if is_parquet:
        builder.config.columns = list(columns)  # the others are not even read
        builder.config.batch_size = PARQUET_ROWS
    return _Opened(builder, builder.as_streaming_dataset(split=split), split, is_parquet)


def missing_column(source: Plain, column: str, columns: Sequence[str]) -> SourceError:
    """The error for a column that the source, which has `columns`, lacks."""
    names = [f"run.objective.data.{kind}_column" for kind in ("text", "image", "label", "key")]
    fix = f"set {', '.join(names[:-1])} or {names[-1]}"
    return SourceError(f"{_field(source)}: no column {column!r} (it has {', '.join(map(repr, columns))}); {fix}")


def _field(source: Plain) -> str:
    """The config field and its value, for messages."""
    match source:
        case PythonStdlib() | Digits():
            return f"run.objective.data.source: {source.name}"
        case Files(paths=paths):
            return f"run.objective.data.source.paths: {', '.join(paths)}"
        case Hub():
            options = {"config": source.config, "split": source.split, "revision": source.revision}
            given = ", ".join(f"{key} {value!r}" for key, value in options.items() if value)
            return f"run.objective.data.source.dataset: {source.dataset!r} ({given})"


def _explained(source: Plain, error: Exception) -> SourceError:
    """One line: field, value, reason, fix."""
    detail = " ".join(str(error).split())
    if not isinstance(error, ValueError) and reason(error) is not error:
        detail = f"{detail} ({' '.join(str(reason(error)).split())})"
    match source:
        case Hub():
            fix = "check the name, config, split and revision, HF_TOKEN (private and gated data) and the network"
        case PythonStdlib() | Digits() | Files():
            fix = "check the files, their format, the credentials and the network"
    return SourceError(f"{_field(source)}: {detail.rstrip('.')}; {fix}")


def _raise_cause(files: Sequence[str]) -> None:
    """Raise the real error: `datasets` says "not found" of any URL that does not answer."""
    from fsspec.core import url_to_fs

    urls = [file for file in files if is_url(file)]
    for url in urls:
        filesystem, path = url_to_fs(url)
        filesystem.info(path)
    if urls:
        raise ConnectionError(f"{urls[0]} did not answer at first")


def _configure() -> None:
    """Send no download counts to the Hub (5 s without a name server); do not retry inside a read.

    In a retry `datasets` sleeps 20 times 5 s, deaf to closing. Lanes retry themselves, from the
    last row they have.
    """
    from datasets import config

    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    config.STREAMING_READ_MAX_RETRIES = 1
    config.STREAMING_OPEN_MAX_RETRIES = 1
    config.STREAMING_READ_RETRY_INTERVAL = 0
    config.STREAMING_OPEN_RETRY_INTERVAL = 0
    config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0
    config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0
