"""The source text of the Python standard library, as parquet shards: text on every machine."""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data.sources.cache import cache_folder, write_shards

if TYPE_CHECKING:
    import pyarrow as pa

SHARDS = 16
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def stdlib_shards() -> list[Path]:
    """The parquet shards (columns `key`: relative path, `text`), written first if they are missing.

    The folder's name carries a digest of the Python version and of every file. The folder appears
    by one rename, so several processes may ask at once.
    """
    files = list(_source_files(Path(sysconfig.get_path("stdlib"))))
    digest = hashlib.sha256(sys.version.encode())
    for key, text in files:
        digest.update(f"\0{key}\0{len(text)}\0".encode() + text)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache_folder() / f"python_stdlib-{version}-{digest.hexdigest()[:16]}"
    if not folder.is_dir():
        write_shards(folder, (_table(files[shard::SHARDS]) for shard in range(SHARDS)))
    return sorted(folder.glob("*.parquet"))


def _source_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """(relative path, UTF-8 text) of every source file but tests and packages, sorted."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - LEFT_OUT)
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix == ".py" and (text := path.read_bytes()) and _is_utf8(text):
                yield path.relative_to(root).as_posix(), text


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _table(files: list[tuple[str, bytes]]) -> "pa.Table":
    import pyarrow as pa

    schema = pa.schema({"key": pa.string(), "text": pa.string()})
    return pa.Table.from_pylist([{"key": key, "text": text.decode()} for key, text in files], schema)


def digits_shards() -> list[Path]:
    """The shards (columns `image`: 8 x 8 uint8, `label`: 0 to 9), written first if missing."""
    import numpy as np
    import pyarrow as pa
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # the pixels are counts from 0 to 16
    labels = digits.target.astype(np.int64)
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16]
    folder = cache_folder() / f"sklearn_digits-{digest}"
    if not folder.is_dir():
        kind = pa.list_(pa.list_(pa.uint8()))
        rows = (slice(number, None, SHARDS) for number in range(SHARDS))
        tables = (pa.table({"image": pa.array(images[own].tolist(), kind), "label": labels[own]}) for own in rows)
        write_shards(folder, tables)
    return sorted(folder.glob("*.parquet"))
