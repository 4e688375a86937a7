"""Expands paths and globs to a fixed list of files; tells their format and tags their versions."""

from pathlib import Path
from typing import NotRequired, TypedDict

from data.sources.kinds import Files, SourceError, is_url

ENDINGS = {
    "parquet": (".parquet", ".pq"),
    "json": (".json", ".jsonl", ".ndjson"),
    "text": (".txt", ".text", ".md"),
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"),
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
GLOB_CHARACTERS = frozenset("*?[")
PATHS = "run.objective.data.source.paths"


class FileTag(TypedDict):
    """One version of one file, as JSON."""

    name: str
    size: int | None
    """Size in bytes; None if unknown."""
    tag: str | None
    """The server's ETag, or the time of modification."""
    weight: NotRequired[float]
    """Weight of the file's part of a mixture."""


def list_files(source: Files) -> list[str]:
    """The files of `source`, absolute, sorted within each pattern, without duplicates.

    Raises SourceError for missing and empty files.
    """
    if not source.paths:
        raise SourceError(f"{PATHS}: empty; name at least one file, glob or URL")
    files: dict[str, None] = {}
    for pattern in source.paths:
        files |= dict.fromkeys(_expand(pattern))
    return list(files)


def file_format(source: Files, files: list[str]) -> str:
    """The format of `files`: `parquet`, `json` or `text` (builders of `datasets`), or `image`."""
    if source.format != "auto":
        return source.format
    formats = sorted({_format_of(file) for file in files})
    if len(formats) > 1:
        fix = "use files of one format, or set run.objective.data.source.format"
        raise SourceError(f"{PATHS}: mixes formats ({', '.join(formats)}); {fix}")
    return formats[0]


def file_tag(file: str) -> FileTag:
    """The current version of one file."""
    if not is_url(file):
        stat = Path(file).stat()
        return {"name": file, "size": stat.st_size, "tag": str(stat.st_mtime_ns)}
    from fsspec.core import url_to_fs

    filesystem, path = url_to_fs(file)
    info = filesystem.info(path)
    keys = ("ETag", "etag", "LastModified", "last_modified", "mtime", "created")
    tags = [str(info[key]).strip('"') for key in keys if info.get(key)]
    return {"name": file, "size": info.get("size"), "tag": tags[0] if tags else str(filesystem.ukey(path))}


def _expand(pattern: str) -> list[str]:
    if is_url(pattern):
        return _expand_url(pattern)
    path = Path(pattern).expanduser().absolute()
    if path.is_dir():
        glob = f"{pattern.rstrip('/')}/*.parquet"
        raise SourceError(f"{PATHS}: {pattern} is a folder; name its files by a glob such as {glob}")
    if path.exists():
        matches = [path]
    elif GLOB_CHARACTERS & set(pattern):
        root = Path(path.anchor)
        matches = sorted(match for match in root.glob(str(path.relative_to(root))) if match.is_file())
    else:
        fix = "check the path; relative paths start from the folder of the command"
        raise SourceError(f"{PATHS}: no such file: {pattern}; {fix}")
    if not matches:
        raise SourceError(f"{PATHS}: nothing matches {pattern}; check the glob")
    if not any(match.stat().st_size for match in matches):
        raise SourceError(f"{PATHS}: {pattern} is empty (0 bytes in {len(matches)} files); use files with data")
    return [str(match) for match in matches]


def _expand_url(pattern: str) -> list[str]:
    """The matches of a URL's glob, or the URL itself.

    http(s) has no listing, and there a `?` begins a query.
    """
    if pattern.startswith(("http://", "https://")) or not GLOB_CHARACTERS & set(pattern):
        return [pattern]
    from fsspec.core import url_to_fs

    try:
        filesystem, path = url_to_fs(pattern)
        matches = sorted(filesystem.glob(path))
    except (OSError, ImportError, ValueError) as error:
        fix = "check the address and the credentials"
        raise SourceError(f"{PATHS}: cannot list {pattern} ({error}); {fix}") from error
    if not matches:
        raise SourceError(f"{PATHS}: nothing matches {pattern}; check the glob")
    return [str(filesystem.unstrip_protocol(match)) for match in matches]


def _format_of(file: str) -> str:
    name = file.split("?", 1)[0] if is_url(file) else file
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    for kind, endings in ENDINGS.items():
        if name.lower().endswith(endings):
            return kind
    known = ", ".join(", ".join(endings) for endings in ENDINGS.values())
    problem = f"auto cannot tell the format of {file} (known endings: {known})"
    raise SourceError(f"run.objective.data.source.format: {problem}; use parquet, json, text or image")
