"""The manifest of a run's data, frozen at its start: a resumed run notices a changed source."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NotRequired, TypedDict

from data.config import ImageConfig, TextConfig
from data.sources.builtin import digits_shards, stdlib_shards
from data.sources.files import FileTag, file_tag, list_files
from data.sources.kinds import Digits, Files, Hub, Mixture, Plain, PythonStdlib, Source, SourceError, parts_of
from data.text.tokenizers import load_tokenizer


class Contents(TypedDict):
    """Everything that the order of samples depends on, as JSON."""

    source: list[FileTag]
    eval_source: list[FileTag]
    columns: dict[str, list[str]]
    """The columns read of each kind of source."""
    held_out: float
    lanes: int | None
    window: int
    seed: int | None
    seq_len: NotRequired[int]
    tokenizer: NotRequired[str]
    """Digest of the tokenizer."""
    size: NotRequired[int | None]
    channels: NotRequired[int]
    flip: NotRequired[bool]


class Manifest(Contents):
    """The contents and their digest."""

    digest: str


def manifest(config: TextConfig | ImageConfig, *, seed: int | None = None, lanes: int | None = None) -> Manifest:
    """The manifest of a run's data: its files, its order, and how samples are made.

    Files of the built-in sources are named relative to the cache, with the digest in their folder's
    name as tag: the cache may be elsewhere on another machine.
    """
    contents: Contents = {
        "source": _tags(config.source),
        "eval_source": _tags(config.eval_source) if config.eval_source else [],
        "columns": {part.source.name: config.columns(part.source) for part in parts_of(config.source)},
        "held_out": config.training_held_out,
        "lanes": lanes or config.lanes,
        "window": config.window,
        "seed": seed,
    }
    match config:
        case TextConfig():
            contents["seq_len"] = config.seq_len
            contents["tokenizer"] = load_tokenizer(config.tokenizer).digest
        case ImageConfig():
            contents["size"] = config.size
            contents["channels"] = config.channels
            contents["flip"] = config.flip
    digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    return {**contents, "digest": digest}


def check_manifest(saved: Manifest, now: Manifest) -> None:
    """Raises ValueError if a run cannot continue exactly, in one line that names the first change.

    `saved` is from the run's start. The evaluation data and the number of lanes are left to the
    checkpoint, which knows them.
    """
    for problem in _changes(saved, now):
        effect = "a resumed run would see other samples than an unbroken one"
        raise ValueError(f"{problem}; {effect}: restore it, or begin a new run")


_FIELDS = {"seed": "run.seed", "teacher": "run.objective.teacher"}
"""The fields of a job that a manifest holds and that are not below run.objective.data."""


def _changes(saved: Manifest, now: Manifest) -> Iterator[str]:
    yield from _file_changes(saved["source"], now["source"])
    for key in sorted((saved.keys() | now.keys()) - {"source", "eval_source", "lanes", "digest"}):
        if saved.get(key) != now.get(key):
            field = _FIELDS.get(key, f"run.objective.data.{key}")
            yield f"{field}: it was {saved.get(key)!r} when the run began, and is {now.get(key)!r}"


def _file_changes(saved: list[FileTag], now: list[FileTag]) -> Iterator[str]:
    field = "run.objective.data.source"
    before = {file["name"]: file for file in saved}
    after = {file["name"]: file for file in now}
    for name, file in before.items():
        if name not in after:
            yield f"{field}: {name} is missing; the run began with it"
        elif after[name] != file:
            yield f"{field}: {name} has changed: {_file_change(file, after[name])}"
    for name in after:
        if name not in before:
            yield f"{field}: {name} is new; the run began without it"
    if list(before) != list(after):
        yield f"{field}: its files come in another order than when the run began"


def _file_change(before: FileTag, after: FileTag) -> str:
    if before["size"] != after["size"]:
        return f"{before['size']} bytes when the run began, {after['size']} now"
    old: Mapping[str, object] = before
    new: Mapping[str, object] = after
    key = next(key for key in [*old, *new] if old.get(key) != new.get(key))
    return f"its {key} was {old.get(key)!r} when the run began, and is {new.get(key)!r}"


def _tags(source: Source) -> list[FileTag]:
    """The files of all parts; those of a mixture with the part's number and weight."""
    if not isinstance(source, Mixture):
        return _file_tags(source)
    tags: list[FileTag] = []
    for number, part in enumerate(source.parts):
        for tag in _file_tags(part.source):
            tags.append({**tag, "name": f"part {number}: {tag['name']}", "weight": part.weight})
    return tags


def _file_tags(source: Plain) -> list[FileTag]:
    match source:
        case PythonStdlib() | Digits():
            shards = stdlib_shards() if isinstance(source, PythonStdlib) else digits_shards()
            return [{"name": path.name, "size": path.stat().st_size, "tag": path.parent.name} for path in shards]
        case Files():
            return [file_tag(file) for file in list_files(source)]
        case Hub():
            return [_hub_tag(source)]


def _hub_tag(source: Hub) -> FileTag:
    """The dataset at the commit to which its revision points now."""
    if Path(source.dataset).exists():
        return {"name": source.dataset, "size": None, "tag": ""}
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        commit = HfApi().dataset_info(source.dataset, revision=source.revision).sha
    except (HfHubHTTPError, OSError) as error:
        problem = f"{source.dataset!r}: the Hub does not tell its revision ({' '.join(str(error).split())})"
        fix = "check the name and the network"
        raise SourceError(f"run.objective.data.source.dataset: {problem}; {fix}") from error
    return {"name": f"{source.dataset}/{source.config or 'default'}/{source.split}", "size": None, "tag": commit}
