"""The source text of the Python standard library, written once as parquet shards: real text on every machine, with no network."""

import hashlib
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

SHARDS = 16
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def cache_folder() -> Path:
    """Where prepared data live: $SWITCHWORK_CACHE, or ~/.cache/switchwork."""
    return Path(os.environ.get("SWITCHWORK_CACHE") or Path.home() / ".cache" / "switchwork").expanduser().absolute()


def stdlib_shards() -> list[Path]:
    """The parquet shards (columns `key`: relative path, `text`), written first if this interpreter's are not there yet.

    The folder's name carries a digest of the version and of every file. It appears by one rename, so that several processes may ask at once.
    """
    files = list(_source_files(Path(sysconfig.get_path("stdlib"))))
    digest = hashlib.sha256(sys.version.encode())
    for key, text in files:
        digest.update(f"\0{key}\0{len(text)}\0".encode() + text)
    folder = cache_folder() / f"python_stdlib-{sys.version_info.major}.{sys.version_info.minor}-{digest.hexdigest()[:16]}"
    if not folder.is_dir():
        _write(folder, files)
    return sorted(folder.glob("*.parquet"))


def _source_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """(relative path, UTF-8 text) of every source file, in sorted order; tests and installed packages are left out."""
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


def _write(folder: Path, files: list[tuple[str, bytes]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ValueError(f"cannot write to the cache {folder.parent} ({error.strerror}); set SWITCHWORK_CACHE to a folder that can be written") from error
    schema = pa.schema({"key": pa.string(), "text": pa.string()})
    try:
        for shard in range(SHARDS):
            rows = [{"key": key, "text": text.decode()} for key, text in files[shard::SHARDS]]
            pq.write_table(pa.Table.from_pylist(rows, schema), scratch / f"{shard:05d}.parquet", row_group_size=64)
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, with the same content
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
