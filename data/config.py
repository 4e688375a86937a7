"""The config that text and images share: where the data come from, and how they are dealt out."""

from dataclasses import dataclass, field
from typing import Literal

from data.sources.kinds import Digits, Plain, PythonStdlib, Source


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """The data that a run trains on, dealt out in lanes."""

    source: Source
    """Training data."""
    eval_source: Source | None = None
    """Evaluation data. null: a share of `source` is held out."""
    key_column: str | None = None
    """Column whose hash decides which samples are held out.
    null: the sample itself (`key` for python_stdlib)."""
    held_out: float = 0.02
    """Share of `source` held out for evaluation by a hash of the key; unused with `eval_source`."""
    max_eval_samples: int | None = None
    """Number of held-out samples to evaluate on. null: all, which reads the whole source."""
    lanes: int | None = None
    """Number of deterministic streams that serve the run, a multiple of every number of workers.
    null: 8, or a multiple of 8."""
    window: int = 1024
    """Number of documents or images that are shuffled together in a lane."""
    prefetch: int = 8
    """Number of steps prepared in the background. 0: none."""
    processes: int = 0
    """Number of processes per worker that read and decode ahead. 0: a thread does it."""
    retry_seconds: float = 300.0
    """How long to retry a source that does not answer before it counts as unreadable."""
    on_unreadable: Literal["fail", "skip"] = "fail"
    """fail: the run ends and names what is unreadable, an image or a shard.
    skip: it is left out, counted and logged."""

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("prefetch", 0), ("processes", 0), ("retry_seconds", 0)):
            self._check_least(name, least)
        self._check_positive("lanes", "max_eval_samples")
        if not 0.0 <= self.held_out < 1.0:
            fix = f"use at least 0 and less than 1, such as {type(self).held_out}"
            raise ValueError(f"run.objective.data.held_out: {self.held_out} is not a share; {fix}")

    def _check_least(self, name: str, least: float) -> None:
        value = getattr(self, name)
        if value < least:
            raise ValueError(f"run.objective.data.{name}: {value} is less than {least}; use {least} or more")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                self._check_least(name, 1)

    @property
    def training_held_out(self) -> float:
        """The share of `source` that is kept out of training."""
        return 0.0 if self.eval_source else self.held_out


@dataclass(frozen=True, kw_only=True)
class ImageConfig(StreamConfig):
    """The images that a run trains on, and how they become samples."""

    name: Literal["images"] = "images"
    """Selects images; the other names are toy data."""
    source: Source = field(default_factory=Digits)
    """Training images."""
    held_out: float = 0.1
    """Share of images held out for evaluation by a hash of the key; unused with `eval_source`."""
    image_column: str = "image"
    """Column of images: the `Image` feature, encoded bytes (PNG, JPEG, ...), or arrays of uint8."""
    label_column: str | None = "label"
    """Column of class numbers. null: every label is 0."""
    size: int | None = None
    """Height and width: the shorter side is scaled to it, the middle cut out.
    null: as stored, all of one size."""
    channels: Literal[1, 3] = 1
    """1: grey. 3: red, green and blue."""
    classes: int | None = None
    """Number of classes; labels are at least 0 and less than it. null: unknown."""
    flip: bool = False
    """Mirror half of the training images left to right, drawn from (seed, sample number)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("size", "classes")

    def columns(self, source: Plain) -> list[str]:
        """The columns to read of a part of `source`."""
        key = [self.key_column] if self.key_column and self.training_held_out else []
        return [*self.eval_columns, *key]

    @property
    def eval_columns(self) -> list[str]:
        """The columns to read of `eval_source`."""
        return [self.image_column, *([self.label_column] if self.label_column else [])]


@dataclass(frozen=True, kw_only=True)
class TextConfig(StreamConfig):
    """The text that a run trains on, and how it becomes samples."""

    source: Source = field(default_factory=PythonStdlib)
    """Training documents."""
    held_out: float = 0.02
    """Share of documents held out for evaluation, by a hash of the key; unused with eval_source."""
    text_column: str = "text"
    """Column of the text."""
    tokenizer: str = "bytes"
    """`bytes`, or a Hugging Face tokenizer: a folder, a tokenizer.json, or a Hub name."""
    seq_len: int = 256
    """Number of tokens that a sample predicts; it holds one more."""
    document_mask: bool = False
    """Add `segments` to batches, so that attention stays within a document."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("seq_len")

    def key(self, source: Plain) -> str:
        """The column whose hash decides which documents of `source` are held out."""
        return self.key_column or ("key" if isinstance(source, PythonStdlib) else self.text_column)

    def columns(self, source: Plain) -> list[str]:
        """The columns to read of a part of `source`."""
        if not self.training_held_out:
            return self.eval_columns
        return list(dict.fromkeys([self.text_column, self.key(source)]))

    @property
    def eval_columns(self) -> list[str]:
        """The columns to read of `eval_source`."""
        return [self.text_column]
