"""What exactly a run trains on: frozen at its start, so that a source which changed is seen on resume."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data.digits import digits_shards
from data.files import file_tag, list_files
from data.images import ImageConfig
from data.sources import Digits, Files, Hub, Mixture, Plain, PythonStdlib, Source, parts_of
from data.stdlib import stdlib_shards
from data.text import TextConfig
from data.tokenizers import load_tokenizer


def manifest(config: TextConfig | ImageConfig, *, seed: int | None = None, lanes: int | None = None) -> dict[str, Any]:
    """What the order of samples depends on: files with size and tag, lanes, window, seed, how samples are made; and a digest over it. JSON-able.

    Files of our own sources go by their name and the digest in their folder's, so that the cache may lie elsewhere.
    """
    contents: dict[str, Any] = {
        "source": _tags(config.source),
        "eval_source": _tags(config.eval_source) if config.eval_source else [],
        "columns": {part.source.name: config.columns(part.source) for part in parts_of(config.source)},
        "held_out": config.training_held_out,
        "lanes": lanes or config.lanes,
        "window": config.window,
        "seed": seed,
        **_samples(config),
    }
    return {**contents, "digest": hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()}


def _samples(config: TextConfig | ImageConfig) -> dict[str, Any]:
    """How samples are made of documents."""
    match config:
        case TextConfig():
            return {"seq_len": config.seq_len, "tokenizer": load_tokenizer(config.tokenizer).digest}
        case ImageConfig():
            return {"size": config.size, "channels": config.channels, "flip": config.flip}


def check_manifest(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ValueError, in one line that names the first file or field, unless a run with manifest `saved` can go on exactly with `now`.

    What is evaluated on and the number of lanes are left to the checkpoint, which knows them.
    """
    for problem in _changes(saved, now):
        raise ValueError(f"{problem}; a resumed run would not see what an unbroken one had: bring it back, or begin a new run")


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    then = {file["name"]: file for file in saved["source"]}
    here = {file["name"]: file for file in now["source"]}
    for name, file in then.items():
        if name not in here:
            yield f"data.source: {name} is missing; the run began with it"
        elif here[name]["size"] != file["size"]:
            yield f"data.source: {name} has changed: {file['size']} bytes when the run began, {here[name]['size']} now"
        elif here[name] != file:
            what = next(key for key in file if here[name].get(key) != file[key])
            yield f"data.source: {name} has changed: its {what} was {file[what]!r} when the run began, and is {here[name].get(what)!r}"
    for name in here:
        if name not in then:
            yield f"data.source: {name} is new; the run began without it"
    if list(then) != list(here):
        yield "data.source: its files come in another order than when the run began"
    for key in sorted((saved.keys() | now.keys()) - {"source", "eval_source", "lanes", "digest"}):
        if saved.get(key) != now.get(key):
            yield f"data.{key} was {saved.get(key)!r} when the run began, and is {now.get(key)!r}"


def _tags(source: Source) -> list[dict[str, Any]]:
    """The files of all parts; of a mixture's with the part's number and weight."""
    if isinstance(source, Mixture):
        parts = enumerate(source.parts)
        return [{**tag, "name": f"part {n}: {tag['name']}", "weight": part.weight} for n, part in parts for tag in _file_tags(part.source)]
    return _file_tags(source)


def _file_tags(source: Plain) -> list[dict[str, Any]]:
    match source:
        case PythonStdlib() | Digits():
            shards = stdlib_shards() if isinstance(source, PythonStdlib) else digits_shards()
            return [{"name": path.name, "size": path.stat().st_size, "tag": path.parent.name} for path in shards]
        case Files():
            return [file_tag(file) for file in list_files(source)]
        case Hub():
            return [_hub_tag(source)]


def _hub_tag(source: Hub) -> dict[str, Any]:
    """The dataset at the commit that its revision means now."""
    if Path(source.dataset).exists():
        return {"name": source.dataset, "size": None, "tag": ""}
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        commit = HfApi().dataset_info(source.dataset, revision=source.revision).sha
    except (HfHubHTTPError, OSError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"data.source.dataset = {source.dataset!r}: the Hub does not tell its revision ({said}); check the name and the network") from error
    return {"name": f"{source.dataset}/{source.config or 'default'}/{source.split}", "size": None, "tag": commit}
