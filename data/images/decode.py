"""Decodes images to arrays of uint8, (C, H, W).

Data sets that fit into the cache are decoded once: decoding a PNG of 28 x 28 takes as long as
copying 100 such arrays.
"""

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import xxhash

from data.lanes.rows import Origin

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[np.uint8]

CACHE_BYTES = 1 << 28


@dataclass(slots=True, kw_only=True)
class StoredImage:
    """An image as it is stored: encoded, (bytes,), or an array (H, W), (H, W, C) or (C, H, W)."""

    data: Pixels
    label: int
    origin: Origin
    """Origin of the table that holds the image."""
    row: int
    """Row of that table."""
    path: str | None

    def __len__(self) -> int:
        return self.data.size

    def __str__(self) -> str:
        return self.path if self.path and "/" in self.path else self.origin.row(self.row)


class Unreadable(ValueError):
    """An image that cannot be decoded."""


class Decoder:
    """Decodes images to `channels`, scaled and cut to `size` if that is given.

    Raises Unreadable, with the image's name.
    """

    def __init__(self, channels: int, size: int | None) -> None:
        self.channels = channels
        self.size = size
        self._cache: dict[int, Pixels] = {}
        self._room = CACHE_BYTES

    def decode(self, image: StoredImage) -> Pixels:
        """The pixels, (C, H, W)."""
        if image.data.ndim > 1:
            return self._from_array(image)
        key = xxhash.xxh3_128_intdigest(image.data.data)
        pixels = self._cache.get(key)
        if pixels is None:
            pixels = self._from_bytes(image)
            if pixels.nbytes <= self._room:  # nothing is ever evicted: each epoch comes in another order
                self._room -= pixels.nbytes
                self._cache[key] = pixels
        return pixels

    def _from_bytes(self, image: StoredImage) -> Pixels:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(image.data.data)) as opened:
                return self._scale(opened)
        except (
            UnidentifiedImageError,
            OSError,
            SyntaxError,  # raised by PIL's PNG reader
            ValueError,
            Image.DecompressionBombError,
        ) as error:
            if not image.data.size:
                detail = "no such file, or an empty one"
            elif isinstance(error, UnidentifiedImageError):
                detail = "in no known format"
            else:
                detail = " ".join(str(error).split())
            fix = "repair it, remove it from the source, or set run.objective.data.on_unreadable to skip"
            problem = f"{image}: not a readable image ({detail})"
            raise Unreadable(f"run.objective.data.source: {problem}; {fix}") from error

    def _from_array(self, image: StoredImage) -> Pixels:
        """An array with its channels first, as many as asked for."""
        pixels = image.data
        if pixels.ndim == 2:
            pixels = pixels[None]
        elif pixels.shape[0] not in (1, 3) and pixels.shape[2] in (1, 3):
            pixels = pixels.transpose(2, 0, 1)
        fits = self.size is None or pixels.shape[1:] == (self.size, self.size)
        if pixels.shape[0] == self.channels and fits:
            return pixels
        if pixels.shape[0] not in (1, 3):
            problem = f"{image}: an array of {image.data.shape}"
            fix = "use (H, W), or 1 or 3 channels first or last"
            raise ValueError(f"run.objective.data.source: {problem}; {fix}")
        from PIL import Image

        return self._scale(Image.fromarray(pixels[0] if pixels.shape[0] == 1 else pixels.transpose(1, 2, 0)))

    def _scale(self, image: "Image.Image") -> Pixels:
        """The image in `channels`, its shorter side scaled to `size` and the middle cut out."""
        from PIL import Image

        image = image.convert("L" if self.channels == 1 else "RGB")
        if self.size is not None and image.size != (self.size, self.size):
            side = min(image.size)
            left, top = ((length - side) / 2 for length in image.size)
            box = (left, top, left + side, top + side)
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(image)
        return pixels[None] if self.channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
