"""Which images a run trains on: the config alone, with nothing heavy to import."""

from dataclasses import dataclass, field
from typing import Literal

from data.config import StreamConfig
from data.sources import Digits, Plain, Source


@dataclass(frozen=True, kw_only=True)
class ImageConfig(StreamConfig):
    """Which images a run trains on, and how they become samples."""

    name: Literal["images"] = "images"
    """Selects images, where toy data could be meant."""
    source: Source = field(default_factory=Digits)
    """Training images."""
    held_out: float = 0.1
    """Share of the images kept for evaluation, by a hash of their key; unused with `eval_source`."""
    image_column: str = "image"
    """The column that holds the images: encoded (PNG, JPEG, ...), as the `Image` feature or as bytes, or arrays of uint8."""
    label_column: str | None = "label"
    """The column of class numbers; null: all are 0."""
    size: int | None = None
    """Height and width: the shorter side is scaled to it and the middle cut out; null: as they are, all of one size."""
    channels: Literal[1, 3] = 1
    """1: grey, 3: red, green and blue."""
    classes: int | None = None
    """How many classes there are: labels go from 0 up to (not including) it; null: not told."""
    flip: bool = False
    """Mirror a training image left to right with probability 1/2, drawn from (seed, sample number)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("size", "classes")

    def columns(self, source: Plain) -> list[str]:
        """What is read of a part of `source`."""
        return [*self.eval_columns, *([self.key_column] if self.key_column and self.training_held_out else [])]

    @property
    def eval_columns(self) -> list[str]:
        """What is read of `eval_source`."""
        return [self.image_column, *([self.label_column] if self.label_column else [])]
