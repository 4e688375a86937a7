"""Rows with images: which of them are held out, and how they become samples."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import xxhash

from data.config import ImageConfig
from data.images.decode import Decoder, Pixels, StoredImage, Unreadable
from data.lanes.lane import Chunk
from data.lanes.rows import Origin, scan
from data.sources.arrow import views

if TYPE_CHECKING:
    import pyarrow as pa

Records = npt.NDArray[np.void]
"""(N,) records of "image" uint8 (C, H, W) and "label" int64."""

log = logging.getLogger(__name__)


class Images:
    """The images in a table's rows: training or held-out, by a hash of the key alone."""

    def __init__(self, config: ImageConfig, *, held_out: float) -> None:
        self.config = config
        self.limit = int(held_out * 2.0**64)
        """Keys with a hash below it are held out."""

    def all(self, table: "pa.Table", origin: Origin) -> list[StoredImage]:
        """Every row of `table`.

        Raises ValueError for a column that does not hold images or labels.
        """
        config = self.config
        values: list[tuple[Pixels, str | None]] = []
        for chunk in table.column(config.image_column).chunks:
            values += images_of(chunk, config.image_column)
        labels = [0] * len(values)
        if config.label_column:
            labels = _labels(table.column(config.label_column), config.label_column)
        rows = enumerate(zip(values, labels, strict=True))
        return [
            StoredImage(data=data, label=label, origin=origin, row=row, path=path)
            for row, ((data, path), label) in rows
        ]

    def training(self, table: "pa.Table", origin: Origin) -> list[StoredImage]:
        """The images that are not held out."""
        images = self.all(table, origin)
        if self.limit == 0:
            return images
        held_out = self._are_held_out(table, images)
        return [image for image, held in zip(images, held_out, strict=True) if not held]

    def held_out(self, table: "pa.Table", origin: Origin) -> list[StoredImage]:
        """The held-out images."""
        images = self.all(table, origin)
        held_out = self._are_held_out(table, images)
        return [image for image, held in zip(images, held_out, strict=True) if held]

    def _are_held_out(self, table: "pa.Table", images: list[StoredImage]) -> list[bool]:
        limit = self.limit
        digest = xxhash.xxh3_64_intdigest
        if self.config.key_column is None:
            return [digest(np.ascontiguousarray(image.data).data) < limit for image in images]
        return [digest(str(key).encode()) < limit for key in table.column(self.config.key_column).to_pylist()]


class ImageSamples:
    """Makes one sample per image, a record of its pixels and label; nothing is carried over."""

    def __init__(self, config: ImageConfig) -> None:
        self.images = Images(config, held_out=config.training_held_out)
        self.records = ImageRecords(config)
        self.skip = config.on_unreadable == "skip"

    def documents(self, table: "pa.Table", origin: Origin) -> list[StoredImage]:
        return self.images.training(table, origin)

    def first_carry(self) -> list[int]:
        return []

    def make(self, documents: Sequence[StoredImage], carry: list[int]) -> Chunk:
        samples = self.records.of(documents, skip=self.skip)
        return Chunk(samples, carry, unreadable=len(documents) - len(samples))


class ImageRecords:
    """Decodes stored images to records of one shape: of `size`, else of the first image."""

    def __init__(self, config: ImageConfig) -> None:
        self.config = config
        self.decoder = Decoder(config.channels, config.size)
        self.shape: tuple[int, ...] | None = (config.channels, config.size, config.size) if config.size else None
        self._logged: set[str] = set()

    def of(self, images: Sequence[StoredImage], *, skip: bool = False) -> Records:
        """The records of `images`.

        Raises ValueError for an unreadable one, or leaves it out with `skip`.
        """
        pixels = []
        labels = []
        for image in images:
            try:
                pixels.append(self._checked(image))
                labels.append(image.label)
            except Unreadable as error:
                if not skip:
                    raise
                self._log_once(error)
        fields = [("image", np.uint8, self.shape or (1, 1, 1)), ("label", np.int64)]
        records = np.empty(len(pixels), np.dtype(fields))
        if pixels:
            np.stack(pixels, out=records["image"])
            records["label"] = labels
        return records

    def _log_once(self, error: Unreadable) -> None:
        if str(error) not in self._logged:
            self._logged.add(str(error))
            log.warning("%s; skipped", error)

    def _checked(self, image: StoredImage) -> Pixels:
        """The image's pixels. Raises ValueError if its label or its shape does not fit."""
        classes = self.config.classes
        if image.label < 0 or (classes is not None and image.label >= classes):
            bounds = f"labels go from 0 to {classes - 1}" if classes else "labels begin at 0"
            problem = f"{image}: label {image.label} in {self.config.label_column!r}, but {bounds}"
            raise ValueError(f"run.objective.data.source: {problem}; repair it, or set run.objective.data.classes")
        pixels = self.decoder.decode(image)
        if self.shape is None:
            self.shape = pixels.shape
        if pixels.shape != self.shape:
            sizes = " and ".join(f"{height} x {width}" for _, height, width in (pixels.shape, self.shape))
            problem = f"{image}: images of {sizes} cannot go into one batch"
            raise ValueError(f"run.objective.data.source: {problem}; set run.objective.data.size")
        return pixels


def images_of(array: "pa.Array", name: str) -> list[tuple[Pixels, str | None]]:
    """(encoded bytes or pixels, path if known) of each value of an arrow array.

    Raises ValueError if it has no images.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    kind = array.type
    if pa.types.is_struct(kind) and {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}:
        paths = pc.struct_field(array, "path").to_pylist()
        return list(zip(views(pc.struct_field(array, "bytes")), paths, strict=True))
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [(data, None) for data in views(array)]
    if _depth(kind) in (2, 3):
        return [(pixels, None) for pixels in _arrays(array)]
    fix = "use a column of encoded images or of 2-D or 3-D arrays of uint8"
    raise ValueError(f"run.objective.data.image_column: {name!r} holds {kind}, not images; {fix}")


def _depth(kind: "pa.DataType") -> int:
    """How deep lists of uint8 are nested; 0 for anything else."""
    import pyarrow as pa

    depth = 0
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
        depth += 1
    return depth if pa.types.is_uint8(kind) else 0


def _arrays(array: "pa.Array") -> list[Pixels]:
    """Each value of nested lists as an array; without a loop if all have the same shape."""
    import pyarrow.compute as pc

    if len(array) == 0:
        return []
    shape = [len(array)]
    level = array
    while _depth(level.type):
        lengths = pc.list_value_length(level)
        low, high = pc.min_max(lengths).as_py().values()
        if lengths.null_count or low != high:
            return [np.array(value, np.uint8) for value in array.to_pylist()]
        shape.append(high)
        level = level.flatten()
    return list(level.to_numpy(zero_copy_only=False).reshape(shape))


def _labels(column: "pa.ChunkedArray", name: str) -> list[int]:
    import pyarrow as pa

    field = f"run.objective.data.label_column: {name!r}"
    if not (pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)):
        fix = "use a column of integers, or set it to null"
        raise ValueError(f"{field} holds {column.type}, not class numbers; {fix}")
    if column.null_count:
        raise ValueError(f"{field} has rows without a label; use a full column, or set it to null")
    return [int(label) for label in column.to_pylist()]


def image_shape(config: ImageConfig) -> tuple[int, int, int]:
    """(C, H, W) of every image: of `size`, else of the first image.

    Raises ValueError for a source without images.
    """
    if config.size:
        return config.channels, config.size, config.size
    images = Images(config, held_out=0.0)
    for table, origin, _ in scan(config.source, lambda _: config.eval_columns, retry_seconds=config.retry_seconds):
        records = ImageRecords(config).of(images.all(table, origin)[:1])
        channels, height, width = records["image"].shape[1:]
        return channels, height, width
    raise AssertionError("a scan has rows, or raises")
