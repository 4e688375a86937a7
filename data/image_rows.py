"""Rows with images: which are held out, and how they become samples."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from data.arrow import views
from data.decode import Decoder, Pixels, Stored, Unreadable
from data.images import ImageConfig
from data.lanes import Made, Samples
from data.rows import Place

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)


class Images:
    """What a table's rows are: images, each in the training or in the held-out share, by a hash of its key alone."""

    def __init__(self, config: ImageConfig, *, held_out: float) -> None:
        self._config = config
        self._limit = int(held_out * 2.0**64)

    def all(self, table: "pa.Table", place: Place) -> list[Stored]:
        """Every row of `table`, which comes from `place`. Raises ValueError for a column that holds neither images nor labels."""
        config = self._config
        stored = [image for chunk in table.column(config.image_column).chunks for image in images_of(chunk, config.image_column)]
        labels = _labels(table.column(config.label_column), config.label_column) if config.label_column else [0] * len(stored)
        return [Stored(data, label, (place, row), path) for row, ((data, path), label) in enumerate(zip(stored, labels, strict=True))]

    def training(self, table: "pa.Table", place: Place) -> list[Stored]:
        """The rows that are not held out."""
        images = self.all(table, place)
        return images if self._limit == 0 else [image for image, held in zip(images, self._held_out(table, images)) if not held]

    def held_out(self, table: "pa.Table", place: Place) -> list[Stored]:
        """The rows that are."""
        images = self.all(table, place)
        return [image for image, held in zip(images, self._held_out(table, images)) if held]

    def _held_out(self, table: "pa.Table", images: list[Stored]) -> list[bool]:
        limit, digest = self._limit, xxhash.xxh3_64_intdigest
        if self._config.key_column is None:
            return [digest(np.ascontiguousarray(image.data).data) < limit for image in images]
        return [digest(str(key).encode()) < limit for key in table.column(self._config.key_column).to_pylist()]


class ImageMaker:
    """Decodes images to records of "image" (C, H, W) uint8 and "label" int64; nothing is left over."""

    def __init__(self, config: ImageConfig) -> None:
        self._images = Images(config, held_out=config.training_held_out)
        self._samples = ImageSamples(config)
        self._skip = config.on_unreadable == "skip"

    def documents(self, table: "pa.Table", place: Place) -> list[Stored]:
        return self._images.training(table, place)

    def first_carry(self) -> list[int]:
        return []

    def make(self, documents: Sequence[Stored], carry: list[int]) -> Made:
        samples = self._samples.of(documents, skip=self._skip)
        return Made(samples, carry, len(documents) - len(samples))


class ImageSamples:
    """Stored images to arrays of one shape: that of the first one, where `size` does not say."""

    def __init__(self, config: ImageConfig) -> None:
        self._config = config
        self._decoder = Decoder(config.channels, config.size)
        self._said: set[str] = set()
        self.shape: tuple[int, ...] | None = (config.channels, config.size, config.size) if config.size else None

    def of(self, images: Sequence[Stored], *, skip: bool = False) -> Samples:
        """(N,) records of "image" and "label"; with `skip` without those that cannot be read, else these raise ValueError."""
        pixels, labels = [], []
        for image in images:
            try:
                pixels.append(self._checked(image))
                labels.append(image.label)
            except Unreadable as error:
                if not skip:
                    raise
                self._log_once(error)
        samples = np.empty(len(pixels), np.dtype([("image", np.uint8, self.shape or (1, 1, 1)), ("label", np.int64)]))
        if pixels:
            np.stack(pixels, out=samples["image"])
            samples["label"] = labels
        return samples

    def _log_once(self, error: Unreadable) -> None:
        if str(error) not in self._said:
            self._said.add(str(error))
            log.warning("%s; skipped", error)

    def _checked(self, image: Stored) -> Pixels:
        classes = self._config.classes
        if image.label < 0 or (classes is not None and image.label >= classes):
            fix = f"labels go from 0 to {classes - 1}" if classes else "labels begin at 0"
            raise ValueError(f"data.source: {image}: label {image.label} in {self._config.label_column!r}, but {fix}; mend it, or set data.classes")
        pixels = self._decoder.decode(image)
        if self.shape is None:
            self.shape = pixels.shape
        if pixels.shape != self.shape:
            sizes = " and ".join(f"{height} x {width}" for _, height, width in (pixels.shape, self.shape))
            raise ValueError(f"data.source: {image}: images of {sizes} cannot go into one batch; set data.size")
        return pixels


def images_of(array: "pa.Array", name: str) -> list[tuple[Pixels, str | None]]:
    """(encoded bytes or pixels, path where there is one) of each value of an arrow array. Raises ValueError where it holds something else."""
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
    raise ValueError(f"data.image_column = {name!r} holds {kind}, not images; name a column of encoded images or of 2-D or 3-D arrays of uint8")


def _depth(kind: "pa.DataType") -> int:
    """How deep lists of uint8 are nested; 0 for anything else."""
    import pyarrow as pa

    depth = 0
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    return depth if pa.types.is_uint8(kind) else 0


def _arrays(array: "pa.Array") -> list[Pixels]:
    """Each value of nested lists as an array; as one block, without a loop over them, where all have the same shape."""
    import pyarrow.compute as pc

    if len(array) == 0:
        return []
    shape, level = [len(array)], array
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

    if not (pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)):
        raise ValueError(f"data.label_column = {name!r} holds {column.type}, not class numbers; name a column of integers, or set it to null")
    if column.null_count:
        raise ValueError(f"data.label_column = {name!r} has rows without a label; name a full column, or set it to null")
    return [int(label) for label in column.to_pylist()]
