"""Data sets written once and reused: parquet shards in a folder that appears by one rename."""

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from data.sources.kinds import SourceError

if TYPE_CHECKING:
    import pyarrow as pa


def cache_folder() -> Path:
    """The folder of prepared data: $SWITCHWORK_CACHE, or ~/.cache/switchwork."""
    return Path(os.environ.get("SWITCHWORK_CACHE") or Path.home() / ".cache" / "switchwork").expanduser().absolute()


def write_shards(folder: Path, shards: Iterable["pa.Table"]) -> None:
    """Write `folder`, with one parquet file per table.

    Several processes may do so at once, with the same content.
    """
    import pyarrow.parquet as pq

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        problem = f"cannot write to the cache {folder.parent} ({error.strerror})"
        raise SourceError(f"SWITCHWORK_CACHE: {problem}; set it to a folder that you may write to") from error
    try:
        for number, table in enumerate(shards):
            pq.write_table(table, scratch / f"{number:05d}.parquet", row_group_size=64)
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was first
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
