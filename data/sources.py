"""Where documents come from: one dataclass for each kind of source."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PythonStdlib:
    """The source text of the Python standard library on this machine: real text, with no network."""

    name: Literal["python_stdlib"] = "python_stdlib"


@dataclass(frozen=True, kw_only=True)
class Digits:
    """The 1,797 handwritten digits of 8 x 8 grey pixels that ship inside scikit-learn: real images, with no network."""

    name: Literal["sklearn_digits"] = "sklearn_digits"


@dataclass(frozen=True, kw_only=True)
class Files:
    """Parquet, JSON (lines), text or image files, local or remote."""

    name: Literal["files"] = "files"
    paths: tuple[str, ...]
    """Paths, globs, and URLs of any kind that fsspec knows: http://, https://, s3://, gs://, hf://..."""
    format: Literal["auto", "parquet", "json", "text", "image"] = "auto"
    """auto: by the names' endings. The label of an image file is its folder's place among the folders' names, sorted."""
    sample_by: Literal["line", "paragraph", "document"] = "paragraph"
    """Text files only: what one document is. A paragraph ends at an empty line; document: the whole file."""


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A dataset of the Hugging Face Hub (HF_ENDPOINT and HF_TOKEN are honoured)."""

    name: Literal["hub"] = "hub"
    dataset: str
    """Its name, as in `allenai/c4`."""
    config: str | None = None
    """Also called subset; needed where the dataset has several."""
    split: str = "train"
    revision: str | None = None
    """Branch, tag or commit; None: the newest."""


Plain = PythonStdlib | Digits | Files | Hub


@dataclass(frozen=True, kw_only=True)
class Part:
    """One source of a mixture."""

    weight: float
    """Its share of the samples, next to the other parts' weights."""
    source: Plain
    """What it reads."""

    def __post_init__(self) -> None:
        if not 0.0 < self.weight < math.inf:
            raise ValueError(f"weight = {self.weight} is not above 0; leave the part out, or give it a share")


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several sources, each sample drawn from one of them with probability weight / sum of weights: a function of (seed, lane, place)."""

    name: Literal["mixture"] = "mixture"
    parts: tuple[Part, ...]
    """Each goes through its own epochs."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("data.source.parts is empty; name at least one part, with its weight and source")


Source = Plain | Mixture


def parts_of(source: Source) -> list[Part]:
    """The parts of a mixture; any other source is the only part."""
    return list(source.parts) if isinstance(source, Mixture) else [Part(weight=1.0, source=source)]


def absolute(source: Source, folder: Path) -> Source:
    """`source` with its relative local paths taken from `folder`: a worker's working folder is not the user's."""
    if isinstance(source, Mixture):
        parts = (dataclasses.replace(part, source=_absolute(part.source, folder)) for part in source.parts)
        return dataclasses.replace(source, parts=tuple(parts))
    return _absolute(source, folder)


def _absolute(source: Plain, folder: Path) -> Plain:
    match source:
        case Files(paths=paths):
            return dataclasses.replace(source, paths=tuple(path if is_url(path) else str(folder / Path(path).expanduser()) for path in paths))
        case PythonStdlib() | Digits() | Hub():
            return source


def is_url(path: str) -> bool:
    """Whether `path` names another file system than the local one."""
    return "://" in path
