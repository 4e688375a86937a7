"""Which images a run trains on: the config alone, with nothing heavy to import."""

from dataclasses import dataclass, field
from typing import Literal

from data.sources import Digits, Plain, Source


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Which images a run trains on, and how they become samples."""

    name: Literal["images"] = "images"
    """Selects images, where toy data could be meant."""
    source: Source = field(default_factory=Digits)
    """Training images."""
    eval_source: Source | None = None
    """Held-out images; None: a share of `source` is kept apart."""
    image_column: str = "image"
    """The column that holds the images: encoded (PNG, JPEG, ...), as the `Image` feature or as bytes, or arrays of uint8."""
    label_column: str | None = "label"
    """The column of class numbers; null: all are 0."""
    key_column: str | None = None
    """What tells images apart when some are held out; null: the image itself, as it is stored."""
    size: int | None = None
    """Height and width: the shorter side is scaled to it and the middle cut out; null: as they are, all of one size."""
    channels: Literal[1, 3] = 1
    """1: grey, 3: red, green and blue."""
    classes: int | None = None
    """How many classes there are: labels go from 0 up to (not including) it; null: not told."""
    flip: bool = False
    """Mirror a training image left to right with probability 1/2, drawn from (seed, sample number)."""
    lanes: int | None = None
    """Deterministic streams that the run is dealt from: a multiple of every number of workers it may ever have. None: 8, or more where 8 does not divide."""
    window: int = 1024
    """Images shuffled together in a lane."""
    held_out: float = 0.1
    """Share of the images kept for evaluation, by a hash of their key; unused with `eval_source`."""
    max_eval_samples: int | None = None
    """Evaluate on the first so many held-out images; None: on all, which reads the whole source."""
    prefetch: int = 8
    """Steps made ready in the background; 0: none."""
    processes: int = 0
    """Processes of a worker that read and decode ahead, its lanes divided among them; 0: a thread of the worker does it."""
    retry_seconds: float = 300.0
    """How long a source that does not answer is tried again before it counts as unreadable."""
    on_unreadable: Literal["fail", "skip"] = "fail"
    """What cannot be read ends the run, with its name; or that image, or the rest of that shard, is left out, counted and logged."""

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("prefetch", 0), ("processes", 0), ("retry_seconds", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} = {getattr(self, name)} is less than {least}; set it to {least} or more")
        for name in ("size", "classes", "lanes", "max_eval_samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"data.{name} = {value} is less than 1; leave it out or set it to 1 or more")
        if not 0.0 <= self.held_out < 1.0:
            raise ValueError(f"data.held_out = {self.held_out} is not a share from 0 up to (not including) 1; the usual one is 0.1")

    @property
    def training_held_out(self) -> float:
        """The share of `source` that is not trained on."""
        return 0.0 if self.eval_source else self.held_out

    def columns(self, source: Plain) -> list[str]:
        """What is read of a part of `source`."""
        return [*self.eval_columns, *([self.key_column] if self.key_column and self.training_held_out else [])]

    @property
    def eval_columns(self) -> list[str]:
        """What is read of `eval_source`."""
        return [self.image_column, *([self.label_column] if self.label_column else [])]
