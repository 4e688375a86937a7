"""Image files as shards of rows: {"image": {"bytes", "path"}, "label": the place of the file's folder among all folders' names}."""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

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
            images = [{"bytes": read_file(self._files[place]), "path": self._files[place]} for place in mine]
            table = pa.table({"image": pa.array(images, kind), "label": pa.array([self._labels[place] for place in mine], pa.int64())})
            yield table.select(self._columns)


def read_file(path: str) -> bytes:
    """All of a local file, or of what a URL (also a chained one, such as zip://a.png::https://...) names."""
    if not is_url(path):
        return Path(path).read_bytes()
    import fsspec

    with fsspec.open(path, "rb") as file:
        return bytes(file.read())
