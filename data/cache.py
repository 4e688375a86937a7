"""Data sets that are written once and found again: parquet shards in a folder of the cache that appears by one rename."""

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


def cache_folder() -> Path:
    """Where prepared data live: $SWITCHWORK_CACHE, or ~/.cache/switchwork."""
    return Path(os.environ.get("SWITCHWORK_CACHE") or Path.home() / ".cache" / "switchwork").expanduser().absolute()


def write_shards(folder: Path, shards: Iterable["pa.Table"]) -> None:
    """`folder` with a parquet file for each of `shards`; several processes may do it at once, with the same content."""
    import pyarrow.parquet as pq

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ValueError(f"cannot write to the cache {folder.parent} ({error.strerror}); set SWITCHWORK_CACHE to a folder that can be written") from error
    try:
        for number, table in enumerate(shards):
            pq.write_table(table, scratch / f"{number:05d}.parquet", row_group_size=64)
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
