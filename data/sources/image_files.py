"""Image files as shards of rows: {"image": {"bytes", "path"}, "label"}.

The label is the index of the file's folder among the sorted folder names.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypedDict

from data.sources.kinds import is_url
from data.sources.retry import passes, reason

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("image", "label")
FILES_PER_SHARD = 256


class ImageValue(TypedDict):
    """A value of an `Image` feature."""

    bytes: bytes | None
    path: str | None


class ImageFileShards:
    """Shard i of n holds the files i, i + n, ..., so every shard has files of every folder."""

    def __init__(self, files: Sequence[str], columns: Sequence[str], at_least: int) -> None:
        self.files = files
        self.columns = list(columns)
        self.count = min(len(files), max(at_least, -(-len(files) // FILES_PER_SHARD)))
        folders = [PurePosixPath(file).parent.name for file in files]
        classes = {name: number for number, name in enumerate(sorted(set(folders)))}
        self.labels = [classes[name] for name in folders]
        # Contents read of the table under way: a file that fails does not discard the others.
        self._contents: dict[int, bytes | None] = {}

    def name(self, shard: int) -> str:
        return f"{self.files[shard]} and every {self.count}th file after it"

    def read(self, shard: int, row: int, batch: int) -> "Iterator[pa.Table]":
        import pyarrow as pa

        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        numbers = range(shard, len(self.files), self.count)
        for first in range(row, len(numbers), batch):
            own = numbers[first : first + batch]
            for number in own:
                if number not in self._contents:
                    self._contents[number] = _read_file(self.files[number])
            images = [{"bytes": self._contents.pop(number), "path": self.files[number]} for number in own]
            labels = pa.array([self.labels[number] for number in own], pa.int64())
            table = pa.table({"image": pa.array(images, kind), "label": labels})
            yield table.select(self.columns)


def with_bytes(table: "pa.Table") -> "pa.Table":
    """`table` with the contents of files that an `Image` feature only names."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for index, column in enumerate(table.columns):
        kind = column.type
        if not (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and kind.get_field_index("path") >= 0):
            continue
        values = column.combine_chunks()
        if pc.struct_field(values, "bytes").null_count:
            images = [_with_content(image) for image in values.to_pylist()]
            table = table.set_column(index, table.schema.field(index), pa.array(images, kind))
    return table


def _with_content(image: ImageValue | None) -> ImageValue | None:
    if image and image["bytes"] is None and image["path"]:
        return {**image, "bytes": _read_file(image["path"])}
    return image


def _read_file(path: str) -> bytes | None:
    """The content of a local file or a URL, also a chained one such as zip://a.png::https://...

    None if it is missing or refused.
    """
    try:
        if not is_url(path):
            return Path(path).read_bytes()
        import fsspec

        with fsspec.open(path, "rb") as file:
            return bytes(file.read())
    except Exception as error:  # every file system has its own
        if passes(reason(error)):
            raise
        return None
