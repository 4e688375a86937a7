"""Image files as shards of rows: {"image": {"bytes", "path"}, "label": the place of the file's folder among all folders' names}."""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from data.retry import passes, reason
from data.sources import is_url

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("image", "label")
FILES = 256  # in a shard


class ImageFileShards:
    """Shard i of n holds the files i, i + n, ...: so each has files of every folder."""

    def __init__(self, files: Sequence[str], columns: Sequence[str], at_least: int) -> None:
        self._files = files
        self._columns = list(columns)
        folders = [PurePosixPath(file).parent.name for file in files]
        classes = {name: number for number, name in enumerate(sorted(set(folders)))}
        self._held: dict[int, bytes | None] = {}  # of a table that is being read: one file that fails does not undo the others
        self._labels = [classes[name] for name in folders]
        self.count = min(len(files), max(at_least, -(-len(files) // FILES)))

    def name(self, shard: int) -> str:
        return f"{self._files[shard]} and every {self.count}th file after it"

    def read(self, shard: int, row: int, batch: int) -> "Iterator[pa.Table]":
        import pyarrow as pa

        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        places = range(shard, len(self._files), self.count)
        for first in range(row, len(places), batch):
            mine = places[first : first + batch]
            for place in mine:
                if place not in self._held:
                    self._held[place] = _read_file(self._files[place])
            images = [{"bytes": self._held.pop(place), "path": self._files[place]} for place in mine]
            table = pa.table({"image": pa.array(images, kind), "label": pa.array([self._labels[place] for place in mine], pa.int64())})
            yield table.select(self._columns)


def with_bytes(table: "pa.Table") -> "pa.Table":
    """`table` with the files read that an `Image` feature names instead of holding them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for place, column in enumerate(table.columns):
        kind = column.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and kind.get_field_index("path") >= 0:
            found = column.combine_chunks()
            if pc.struct_field(found, "bytes").null_count:
                images = [
                    {**image, "bytes": _read_file(image["path"])} if image and image["bytes"] is None and image["path"] else image
                    for image in found.to_pylist()
                ]
                table = table.set_column(place, table.schema.field(place), pa.array(images, kind))
    return table


def _read_file(path: str) -> bytes | None:
    """All of a local file, or of what a URL names (also a chained one, such as zip://a.png::https://...); None for what is not there or refused."""
    try:
        if not is_url(path):
            return Path(path).read_bytes()
        import fsspec

        with fsspec.open(path, "rb") as file:
            return bytes(file.read())
    except Exception as error:  # each file system has its own
        if passes(reason(error)):
            raise
        return None
