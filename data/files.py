"""Paths and globs to a fixed list of files, their format, and what tells one version of a file from the next."""

from pathlib import Path
from typing import Any

from data.sources import Files, is_url

ENDINGS = {
    "parquet": (".parquet", ".pq"),
    "json": (".json", ".jsonl", ".ndjson"),
    "text": (".txt", ".text", ".md"),
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"),
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
MAGIC = frozenset("*?[")


def list_files(source: Files) -> list[str]:
    """The files of `source`, absolute, each pattern's in sorted order, none twice. Raises ValueError for what is missing or empty."""
    if not source.paths:
        raise ValueError("data.source.paths is empty; name at least one file, glob or URL")
    files = [file for pattern in source.paths for file in _expand(pattern)]
    return list(dict.fromkeys(files))


def file_format(source: Files, files: list[str]) -> str:
    """`parquet`, `json` or `text`: the name of the builder in `datasets`; or `image` (image_files.py)."""
    if source.format != "auto":
        return source.format
    formats = {_format_of(file) for file in files}
    if len(formats) > 1:
        raise ValueError(f"data.source.paths mixes formats ({', '.join(sorted(formats))}); give files of one format, or set data.source.format")
    return formats.pop()


def file_tag(file: str) -> dict[str, Any]:
    """{"name", "size", "tag"} of one file: the tag is the server's ETag or the time of modification."""
    if not is_url(file):
        stat = Path(file).stat()
        return {"name": file, "size": stat.st_size, "tag": str(stat.st_mtime_ns)}
    from fsspec.core import url_to_fs

    filesystem, path = url_to_fs(file)
    info = filesystem.info(path)
    tags = [str(info[key]).strip('"') for key in ("ETag", "etag", "LastModified", "last_modified", "mtime", "created") if info.get(key)]
    return {"name": file, "size": info.get("size"), "tag": tags[0] if tags else str(filesystem.ukey(path))}


def _expand(pattern: str) -> list[str]:
    if is_url(pattern):
        return _expand_url(pattern)
    path = Path(pattern).expanduser().absolute()
    if path.is_dir():
        raise ValueError(f"data.source.paths: {pattern} is a folder; name its files by a glob such as {pattern.rstrip('/')}/*.parquet")
    if path.exists():
        found = [path]
    elif MAGIC & set(pattern):
        found = sorted(p for p in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if p.is_file())
    else:
        raise ValueError(f"data.source.paths: no such file: {pattern}; relative paths are taken from the folder where the command was given")
    if not found:
        raise ValueError(f"data.source.paths: nothing matches {pattern}; check the glob")
    if not any(p.stat().st_size for p in found):
        raise ValueError(f"data.source.paths: {pattern} is empty (0 bytes in {len(found)} files); give files with data")
    return [str(p) for p in found]


def _expand_url(pattern: str) -> list[str]:
    """A URL as it is, or all that its glob finds; http(s) has no listing, and a `?` there begins a query."""
    if pattern.startswith(("http://", "https://")) or not MAGIC & set(pattern):
        return [pattern]
    from fsspec.core import url_to_fs

    try:
        filesystem, path = url_to_fs(pattern)
        found = sorted(filesystem.glob(path))
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(f"data.source.paths: cannot list {pattern} ({error}); check the address and the credentials") from error
    if not found:
        raise ValueError(f"data.source.paths: nothing matches {pattern}; check the glob")
    return [str(filesystem.unstrip_protocol(name)) for name in found]


def _format_of(file: str) -> str:
    name = file.split("?", 1)[0] if is_url(file) else file
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    for kind, endings in ENDINGS.items():
        if name.lower().endswith(endings):
            return kind
    known = ", ".join(ending for endings in ENDINGS.values() for ending in endings)
    raise ValueError(f"data.source.format = auto cannot tell the format of {file} (known endings: {known}); set it to parquet, json, text or image")
