"""Config of the images that a run trains on; imports nothing heavy."""

from dataclasses import dataclass, field
from typing import Literal

from data.config import StreamConfig
from data.sources import Digits, Plain, Source


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
