"""Where documents come from: one dataclass per kind of source."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


class SourceError(ValueError):
    """A problem with a source, already explained in one line."""


@dataclass(frozen=True, kw_only=True)
class PythonStdlib:
    """The source text of this machine's Python standard library: real text, without a network."""

    name: Literal["python_stdlib"] = "python_stdlib"
    """Selects this source."""


@dataclass(frozen=True, kw_only=True)
class Digits:
    """The 1,797 handwritten digits (8 x 8, grey) inside scikit-learn: images without a network."""

    name: Literal["sklearn_digits"] = "sklearn_digits"
    """Selects this source."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """Parquet, JSON (lines), text or image files, local or remote."""

    name: Literal["files"] = "files"
    """Selects this source."""
    paths: tuple[str, ...]
    """Paths, globs, and URLs that fsspec knows: http://, https://, s3://, gs://, hf://..."""
    format: Literal["auto", "parquet", "json", "text", "image"] = "auto"
    """auto: by the file names' endings.
    An image's label is the index of its folder among the sorted folder names."""
    sample_by: Literal["line", "paragraph", "document"] = "paragraph"
    """How text files are cut into documents.
    A paragraph ends at an empty line. document: the whole file."""


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A dataset of the Hugging Face Hub; HF_ENDPOINT and HF_TOKEN are honoured."""

    name: Literal["hub"] = "hub"
    """Selects this source."""
    dataset: str
    """Name of the dataset, such as `allenai/c4`."""
    config: str | None = None
    """Configuration of the dataset, also called subset; required if it has several."""
    split: str = "train"
    """Split of the dataset."""
    revision: str | None = None
    """Branch, tag or commit. null: the newest."""


Plain = PythonStdlib | Digits | Files | Hub


@dataclass(frozen=True, kw_only=True)
class Part:
    """One source of a mixture."""

    weight: float
    """Share of the samples, relative to the weights of the other parts."""
    source: Plain
    """Source of this part."""

    def __post_init__(self) -> None:
        if not 0.0 < self.weight < math.inf:
            raise ValueError(f"weight is {self.weight}; it must be above 0 and finite, or leave the part out")


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several sources.

    Each sample is drawn from one of them by weight: a function of (seed, lane, index in the lane).
    """

    name: Literal["mixture"] = "mixture"
    """Selects this source."""
    parts: tuple[Part, ...]
    """Sources and their weights; each goes through its own epochs."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("parts is empty; name at least one part, with its weight and source")


Source = Plain | Mixture


def parts_of(source: Source) -> list[Part]:
    """The parts of a mixture; any other source is its own only part."""
    return list(source.parts) if isinstance(source, Mixture) else [Part(weight=1.0, source=source)]


def absolute(source: Source, folder: Path) -> Source:
    """`source` with relative local paths taken from `folder`: a worker runs in another one."""
    if isinstance(source, Mixture):
        parts = (dataclasses.replace(part, source=_absolute(part.source, folder)) for part in source.parts)
        return dataclasses.replace(source, parts=tuple(parts))
    return _absolute(source, folder)


def _absolute(source: Plain, folder: Path) -> Plain:
    match source:
        case Files(paths=paths):
            absolute_paths = (path if is_url(path) else str(folder / Path(path).expanduser()) for path in paths)
            return dataclasses.replace(source, paths=tuple(absolute_paths))
        case PythonStdlib() | Digits() | Hub():
            return source


def is_url(path: str) -> bool:
    """Whether `path` names a file system other than the local one."""
    return "://" in path
